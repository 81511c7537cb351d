"""The commands `diffboost audit …`; each imports its module late, for torch takes seconds."""

import logging
import sys

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
        fold: only this fold; all, or the one that a lineage names, if left out.
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
) -> None:
    """Says what a synthetic PNG, or a folder of them, was made by, and verifies it; exits with 1.

    Args:
        path: a PNG, a synthetic store, or a folder.
        store_dir: the slice store, whose hashes are compared with what the files say.
        generator_dir: the generator's folder, with model.pt and lineage.json; likewise.
        backbone: the one that the generator was finetuned on; likewise.
        regenerate: make the files again from what they say and compare the bytes.
    """
    from diffboost.audit.provenance import audit_provenance, describe  # torch takes seconds

    try:
        audits = audit_provenance(path, store_dir, generator_dir, backbone, regenerate)
    except (OSError, ValueError) as error:
        raise SystemExit(str(error)) from None
    sys.stdout.write("\n".join(describe(audits)) + "\n")
    if any(audit.failures for audit in audits):
        raise SystemExit(1)


AUDITS = {"leaks": leaks, "provenance": provenance}
