"""What the quality filter says of each variant: kept or rejected, with the reason in words."""

from collections.abc import Mapping

import numpy as np
import pandas as pd

from diffboost.audit.calibration import Judge
from diffboost.audit.quality_scores import EMPTY_FAMILIES, FAMILIES

# The columns that the filter adds to a manifest, and the scores that they hold.
COLUMNS = {
    "segmenter_agreement": "dice",
    "edge_agreement": "edge_agreement",
    "border_contrast": "contrast",
    "intensity_distance": "intensity_distance",
    "texture_distance": "texture_distance",
    "quality": "quality",
}
REASONS = {
    "segmenter": "the segmenter finds something else than the label (agreement {dice:.2f})",
    "border": "the image shows no such border as the label's (contrast {contrast:.2f})",
    "edges": "the image does not follow its hint (edge agreement {edge_agreement:.2f})",
    "intensity": "gray levels or texture unlike real slices (distances {intensity_distance:.1f} "
    "and {texture_distance:.1f})",
}
EMPTY_REASONS = REASONS | {
    "segmenter": "the label is empty, but the segmenter finds foreground (a share of "
    "{found_share:.3f})"
}


def with_verdicts(
    manifest: pd.DataFrame, scores: pd.DataFrame, judges: Mapping[str, Judge | None]
) -> pd.DataFrame:
    """The manifest with COLUMNS, and ``kept`` and ``reason`` where a judge rejects.

    Args:
        manifest: a row a variant.
        scores: of the same rows, as ``Instruments.score_items`` gives them.
        judges: of each group; None judges nothing.

    Source: engineering choice (issue 5, "Quality filter").
    """
    scores = scores.assign(quality=np.nan)
    reasons = pd.Series("", index=manifest.index)
    for name, judge in judges.items():
        chosen = scores.group == name
        if judge is None or not chosen.any():
            continue
        rows = scores[chosen]
        scores.loc[chosen, "quality"] = judge.verdict(rows)
        reasons[chosen] = _reasons(rows, judge, name)
    judged = manifest.assign(**{column: scores[score] for column, score in COLUMNS.items()})
    judged["kept"] = reasons == ""
    judged["reason"] = reasons
    return judged


def _reasons(rows: pd.DataFrame, judge: Judge, group: str) -> list[str]:
    """Why each row is rejected; empty for those that are kept."""
    empty = group == "empty"
    families, words = (EMPTY_FAMILIES, EMPTY_REASONS) if empty else (FAMILIES, REASONS)
    parts, verdicts, reasons = judge.parts(rows), judge.verdict(rows), []
    for (_, row), part, verdict in zip(rows.iterrows(), parts, verdicts, strict=True):
        against = {
            family: sum(part[judge.names.index(name)] for name in names)
            for family, names in families.items()
        }
        worst = min(against, key=against.get)
        reasons.append(f"{worst}: {words[worst].format(**row)}" if verdict < 0 else "")
    return reasons


def family_of(reasons: pd.Series) -> pd.Series:
    """The family that speaks most against each rejected variant; maybe there are none.

    Source: engineering choice.
    """
    return reasons.str.split(":").str[0]


def count_verdicts(judged: pd.DataFrame) -> dict:
    """How many variants were kept, rejected by family of reason, or not judged.

    Args:
        judged: what ``with_verdicts`` gives.

    Source: engineering choice.
    """
    families = family_of(judged.reason[~judged.kept]).value_counts()
    return {
        "variants": len(judged),
        "kept": int(judged.kept.sum()),
        "rejected": {name: int(families.get(name, 0)) for name in FAMILIES},
        "not_judged": int(judged.quality.isna().sum()),
    }
