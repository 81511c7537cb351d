"""The verdict of an audit of memorization, and its files: figures, a row a variant, a picture."""

import json
import logging
from collections.abc import Mapping
from pathlib import Path

import pandas as pd

from diffboost.audit.memorization import (
    FALSE_ALARMS,
    LEAST_CASES,
    LEAST_REAL,
    OWN_FALSE_ALARMS,
    Audit,
    membership_gap,
    own_threshold,
    tail_threshold,
)
from diffboost.audit.memorization_figure import draw_memorization
from diffboost.files import write_aside

logger = logging.getLogger(__name__)

QUANTILES = (0.05, 0.5, 0.95, 1.0)


def judge_memorization(audit: Audit) -> dict:
    """Thresholds, error rates, distances, membership gap and a plain verdict.

    Args:
        audit: what ``measure_memorization`` gave; its ``variants`` get the columns ``copy`` and
            ``own_copy`` (None where nothing held out says what the edges explain).

    Source: engineering choice (issue 5, "Memorization audit").
    """
    tables = {"real": audit.real, "variants": audit.variants, "held_out": audit.held_out}
    threshold = tail_threshold(audit.real.likeness, FALSE_ALARMS)
    audit.variants["copy"] = audit.variants.likeness >= threshold
    far = float(audit.real.likeness.quantile(0.95))
    figures = {
        "variants": len(audit.variants),
        "training_images": len(audit.training),
        "training_cases": int(audit.training.case.nunique()),
        "copies": {
            "found": int(audit.variants["copy"].sum()),
            "threshold": threshold,
            "false_alarms": _false_alarms(audit, threshold),
            "recall": _recall(audit.planted, threshold),
        },
        "nearest_other_patient": {name: _quantiles(table) for name, table in tables.items()}
        | {"nearer_than_95_percent_of_real_pairs": float((audit.variants.likeness > far).mean())},
        "membership": _membership(audit),
        "own_source": _own_source(audit),
    }
    figures["notes"] = audit.notes + _doubts(figures, len(audit.real))
    return {"verdict": _verdict(figures), **figures}


def _quantiles(table: pd.DataFrame) -> dict:
    """Likeness at some quantiles, and how many; empty tables have none."""
    values = table.likeness.quantile(list(QUANTILES)) if len(table) else {}
    return {"n": len(table)} | {f"q{100 * q:g}": float(v) for q, v in dict(values).items()}


def _false_alarms(audit: Audit, threshold: float) -> dict:
    """Nominal rate, and how many real pairs and held-out variants pass for copies."""
    real, held_out = ((table.likeness >= threshold).sum() for table in (audit.real, audit.held_out))
    return {
        "nominal": FALSE_ALARMS,
        "real_pairs": [int(real), len(audit.real)],
        "held_out_variants": [int(held_out), len(audit.held_out)],
    }


def _recall(planted: pd.DataFrame, threshold: float) -> dict:
    """Planted copies that are found, by kind; those changed in several ways count for each."""
    found = planted.right & (planted.likeness >= threshold)
    kinds = sorted({kind for names in planted.kinds for kind in names.split()})
    by_kind = {kind: planted.kinds.str.split().map(set(kind.split()).issubset) for kind in kinds}
    return {
        "found": int(found.sum()),
        "of": len(planted),
        "by_kind": {k: [int(found[rows].sum()), int(rows.sum())] for k, rows in by_kind.items()},
    }


def _reference(held_out: pd.DataFrame, own_test_set: bool) -> pd.DataFrame:
    """Held-out variants to compare with: of a given test set of other origin, none if possible."""
    inner = held_out[held_out.part == "inner_validation"]
    return inner if own_test_set and inner.case.nunique() > 1 else held_out


def _membership(audit: Audit) -> dict:
    """The gap by likeness and SSIM against the reference, and by likeness against each part."""
    if audit.held_out.empty:
        return {}
    reference = _reference(audit.held_out, audit.own_test_set)
    found = {"parts": sorted(set(reference.part))}
    for name in ("likeness", "ssim"):
        column = f"source_{name}"
        sides = (table.groupby("case")[column].mean() for table in (audit.variants, reference))
        found[name] = membership_gap(*sides)
    training = audit.variants.groupby("case").source_likeness.mean()
    found["likeness_by_part"] = {
        part: membership_gap(training, rows.groupby("case").source_likeness.mean())
        for part, rows in audit.held_out.groupby("part")
    }
    return found


def _own_source(audit: Audit) -> dict:
    """Variants that are more like their source than held-out ones are like theirs."""
    reference = _reference(audit.held_out, audit.own_test_set).source_likeness
    if len(reference) < 2:
        audit.variants["own_copy"] = None
        return {}
    threshold = own_threshold(reference, OWN_FALSE_ALARMS)
    audit.variants["own_copy"] = audit.variants.source_likeness >= threshold
    return {
        "beyond_edges": int(audit.variants.own_copy.sum()),
        "threshold": threshold,
        "false_alarms": {
            "nominal": OWN_FALSE_ALARMS,
            "held_out_variants": [int((reference >= threshold).sum()), len(reference)],
        },
    }


def _doubts(figures: Mapping, num_real: int) -> list[str]:
    """What makes the figures less sure than they look."""
    doubts = []
    if num_real < LEAST_REAL:
        doubts.append(f"the threshold of copies comes from {num_real} real images only: rough")
    if figures["membership"]:
        cases = figures["membership"]["likeness"]["cases"]
        if min(cases) < LEAST_CASES:
            doubts.append(f"the membership gap compares {cases[0]} training cases with {cases[1]} "
                          "held-out ones: too few for its interval to be trusted")  # fmt: skip
    recall = figures["copies"]["recall"]
    if recall["found"] < 0.99 * recall["of"]:
        doubts.append(f"only {recall['found']} of {recall['of']} planted copies are found here")
    doubts.append("pretraining images that are in no case of this store are not searched")
    return doubts


def _verdict(figures: Mapping) -> str:
    """One sentence a question."""
    copies, gap = figures["copies"], figures["membership"]
    found = f"{copies['found']} of {figures['variants']} variants are copies of another patient"
    if not copies["found"]:
        found = f"no copy of another patient in {figures['variants']} variants"
    if not gap:
        return f"{found}; membership gap not measured"
    interval = gap["likeness"]["ci95"]
    number = f"{gap['likeness']['gap']:+.3f}"
    if interval is None:
        told = f"membership gap {number}: too few cases to judge"
    else:
        number += f", 95 % interval {interval[0]:+.3f} to {interval[1]:+.3f}"
        told = f"no membership gap shown ({number})"
        if interval[0] > 0:
            told = f"membership gap shown ({number}): the generator knows its training images"
    own = figures["own_source"]
    if not own:
        return f"{found}; {told}; copies of the own source not measured"
    share = own["beyond_edges"] / figures["variants"]
    return (
        f"{found}; {told}; {share:.1%} of the variants are more like their source than "
        f"{1 - OWN_FALSE_ALARMS:.0%} of held-out ones"
    )


def write_memorization(
    audit: Audit, figures: Mapping, synthetic_dir: str | Path, output_dir: str | Path
) -> None:
    """Writes memorization.json, memorization.csv and memorization.png.

    Args:
        audit: judged by ``judge_memorization``.
        figures: what that gave.
        synthetic_dir: holds the variants that are shown.
        output_dir: the folder.

    Source: engineering choice (issue 5, "Memorization audit").
    """
    folder = Path(output_dir)
    text = json.dumps(figures, indent=1) + "\n"
    write_aside(folder / "memorization.json", lambda path: path.write_text(text, encoding="utf-8"))
    near = audit.training.iloc[audit.variants.nearest]
    table = audit.variants.drop(columns="nearest").assign(
        nearest_case=near["case"].to_numpy(), nearest_slice=near["slice"].to_numpy()
    )
    write_aside(folder / "memorization.csv", lambda path: table.to_csv(path, index=False))
    figure = draw_memorization(audit, figures, Path(synthetic_dir))
    write_aside(
        folder / "memorization.png", lambda path: figure.savefig(path, format="png", dpi=110)
    )
