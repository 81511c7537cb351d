"""The commands `diffboost audit …`; each imports its module late, for torch takes seconds."""

import logging
import sys
from pathlib import Path

from diffboost.stages import stage_configs

logger = logging.getLogger(__name__)


def leaks(
    store_dir: str,
    synthetic_dir: str | None = None,
    generator_dir: str | None = None,
    model_dir: str | None = None,
    fold: int | None = None,
    inner_fraction: float = 0.2,
    output: str | None = None,
) -> None:
    """Searches a slice store, and what was made from it, for leaks; names the pairs, exits with 1.

    Args:
        store_dir: the slice store.
        synthetic_dir: a synthetic store made from it.
        generator_dir: a generator's folder, with lineage.json.
        model_dir: a segmenter's folder, with lineage.json and run.json.
        fold: only this fold; left out: all, but a model or its variants on the one that their
            run.json or lineage names, if one does.
        inner_fraction: share of the training cases kept for inner validation.
        output: a CSV file for the leaks.
    """
    from diffboost.audit.leaks import audit_leaks, write_leaks  # torch takes seconds

    try:
        found = audit_leaks(
            store_dir, synthetic_dir, generator_dir, model_dir, fold, inner_fraction
        )
    except (OSError, ValueError) as error:
        raise SystemExit(str(error)) from None
    for leak in found:
        logger.error("leak: %s", leak)
    if output is not None:
        write_leaks(output, found)
    if found:
        raise SystemExit(1)
    logger.info("no leak in %s", store_dir)


def provenance(
    path: str,
    store_dir: str | None = None,
    generator_dir: str | None = None,
    backbone: str | None = None,
    regenerate: bool = False,
    decoder: str | None = None,
) -> None:
    """Says what a synthetic PNG, or a folder of them, was made by, and verifies it; exits with 1.

    Args:
        path: a PNG, a synthetic store, or a folder.
        store_dir: the slice store, whose hashes are compared with what the files say.
        generator_dir: the generator's folder, with model.pt and lineage.json; likewise.
        backbone: the one that the generator was finetuned on; likewise.
        regenerate: make the files again from what they say and compare the bytes.
        decoder: the folder of the tiny decoder, where files name one that is not shipped.
    """
    from diffboost.audit.provenance import audit_provenance  # torch takes seconds
    from diffboost.audit.provenance_text import describe

    try:
        audits = audit_provenance(path, store_dir, generator_dir, backbone, regenerate, decoder)
    except (OSError, ValueError) as error:
        raise SystemExit(str(error)) from None
    sys.stdout.write("\n".join(describe(audits)) + "\n")
    if any(audit.failures for audit in audits):
        raise SystemExit(1)


def quality(
    synthetic_dir: str,
    store_dir: str,
    segmenter_dir: str,
    output_dir: str,
    segmenter_configs: str | list[str] | None = None,
    max_lost: float = 0.05,
    num_calibrated: int = 200,
    seed: int = 0,
    edge_weights: str | None = None,
) -> None:
    """Scores the variants of a finished store and says which the quality filter would reject.

    The store stays as it is. Fold and inner split are those of the segmenter's run.json.

    Args:
        synthetic_dir: the synthetic store.
        store_dir: the slice store that it was made from.
        segmenter_dir: a segmenter of arm baseline, trained on the same fold.
        output_dir: gets quality.parquet, quality.json and rejected.png.
        segmenter_configs: config files that trained it; left out: the segmentation bundle's own.
        max_lost: share of good variants that may be rejected.
        num_calibrated: slices of the inner validation to calibrate on.
        seed: draws these slices and their planted defects.
        edge_weights: file or hub id of the store's edge weights; left out: cache, pip or hub.
    """
    from diffboost.audit.quality import audit_quality  # torch takes seconds

    try:
        configs = segmenter_configs or str(stage_configs()["segmentation"])
        audit_quality(
            store_dir,
            synthetic_dir,
            segmenter_dir,
            output_dir,
            configs,
            max_lost,
            num_calibrated,
            seed,
            edge_weights,
        )
    except (OSError, ValueError) as error:
        raise SystemExit(str(error)) from None


def memorization(
    synthetic_dir: str,
    store_dir: str,
    generator_dir: str | None = None,
    output_dir: str | None = None,
    num_variants: int | None = None,
    num_held_out: int = 150,
    num_planted: int = 60,
    seed: int = 0,
    device: str | None = None,
) -> None:
    """Audits what variants give away of training images; exits with 1 at copies of other patients.

    Writes memorization.json, memorization.csv and memorization.png, and held_out/ with variants of
    slices that the generator has not seen, which nothing may be trained on.

    Args:
        synthetic_dir: the synthetic store.
        store_dir: the slice store that it was made from.
        generator_dir: the generator that made it; left out: no membership gap is measured.
        output_dir: for the files; left out: SYNTHETIC_DIR.memorization.
        num_variants: look at so many, evenly spread; all if left out.
        num_held_out: held-out slices of each part of the split, a variant each.
        num_planted: planted copies by which the recall is measured.
        seed: draws the planted copies.
        device: for the generator; the first GPU, else the processor, if left out.
    """
    import torch  # takes seconds

    from diffboost.audit.memorization import measure_memorization
    from diffboost.audit.memorization_report import judge_memorization, write_memorization

    output_dir = output_dir or f"{Path(synthetic_dir)}.memorization"
    device = device or ("cuda:0" if torch.cuda.is_available() else "cpu")
    sizes = (num_variants, num_held_out, num_planted, seed)
    try:
        audit = measure_memorization(
            synthetic_dir, store_dir, generator_dir, output_dir, *sizes, device
        )
        figures = judge_memorization(audit)
        write_memorization(audit, figures, synthetic_dir, output_dir)
    except (OSError, ValueError) as error:
        raise SystemExit(str(error)) from None
    for note in figures["notes"]:
        logger.warning("note: %s", note)
    logger.info("%s: %s", synthetic_dir, figures["verdict"])
    if figures["copies"]["found"]:
        raise SystemExit(1)


AUDITS = {
    "leaks": leaks,
    "memorization": memorization,
    "provenance": provenance,
    "quality": quality,
}
