"""Training beside the augmentation: the items of an arm, those of selection, and batches."""

import logging
from collections.abc import Sequence

from monai.engines import PrepareBatchDefault, PrepareBatchExtraInput
from monai.engines.utils import PrepareBatch

from diffboost.data.manifest import read_manifest, refuse_other_slicing
from diffboost.data.slices import read_store, slice_items
from diffboost.knobs import nearest
from diffboost.segmentation.arms import SYNTHETIC_ARM, split_arm
from diffboost.segmentation.merging import own_labels, variants_by_slice

SELECTIONS = ("inner_validation", "test")
STORE_CHANNELS = 1  # a slice store holds gray slices

logger = logging.getLogger(__name__)


def training_items(
    store_dir: str,
    arm: str,
    fold: int,
    image_size: int,
    num_classes: int,
    synthetic_dir: str | None = None,
    in_channels: int = 1,
    size_divisor: int = 1,
    min_foreground_px: int = 0,
    inner_fraction: float = 0.2,
    num_cases: int | None = None,
    num_variants: int | None = None,
) -> list[dict]:
    """The training slices of a fold; where the arm needs variants, each knows their files.

    A slice stands in the list once, whatever the ratio: an epoch has as many steps in every arm.
    A slice whose variants were all rejected by the quality filter stands in for its own variant;
    arm synthetic, of variants alone, leaves it out. The log says how many these are.

    Args:
        store_dir: slice store.
        arm: see ``split_arm``.
        fold: fold whose training cases (without inner validation) are taken.
        image_size: side of the slices in pixels, as the store has them.
        num_classes: number of classes with background, as the store's task has them.
        synthetic_dir: synthetic store; needed by arms with variants and refused in others.
        in_channels: channels that the network takes; a slice store has one.
        size_divisor: the network needs slices of a multiple of this side, and of two at least.
        min_foreground_px: slices with fewer labeled pixels are left out (paper: 21).
        inner_fraction: part of the fold's training cases kept for inner validation.
        num_cases: train on this many cases only; all if None.
        num_variants: use the first so many variants of a slice; all if None. Like alpha, nothing
            to arms without variants.

    Returns:
        Dictionaries of ``slice_items``; where they are needed with ``variants`` (paths) and,
        where their anatomy was deformed, ``variant_labels``.

    Raises:
        ValueError: arm and synthetic_dir disagree, a size or number does not fit the store,
            training slices have no variant in the manifest, or variants of a case's name were made
            from other files than the case.

    Source: facts 23
    """
    needs_variants, _ = split_arm(arm)
    if needs_variants != (synthetic_dir is not None):
        need = "needs a synthetic_dir" if needs_variants else "takes no synthetic_dir"
        raise ValueError(f"arm {arm!r} {need}, but synthetic_dir is {synthetic_dir!r}")
    check_store(store_dir, image_size, num_classes, in_channels, size_divisor)
    items = slice_items(
        store_dir,
        fold,
        "training",
        min_foreground_px=min_foreground_px,
        inner_fraction=inner_fraction,
        num_cases=num_cases,
    )
    if not needs_variants:
        return items
    _refuse_other_sources(items, store_dir, synthetic_dir)
    variants = variants_by_slice(synthetic_dir, num_variants)
    missing = [item for item in items if _place(item) not in variants]
    if missing:
        names = ", ".join(f"{item['case']} slice {item['slice']}" for item in missing[:5])
        raise ValueError(
            f"synthetic_dir: {synthetic_dir} has no variant of {len(missing)} of "
            f"{len(items)} training slices of fold {fold}, e.g. {names}"
        )
    items = [item | with_labels(variants[_place(item)]) for item in items]
    return _without_rejected(items, arm, synthetic_dir)


def with_labels(variants: list[str]) -> dict:
    """What an item says of its variants: their files, and those of labels that are their own.

    Args:
        variants: files of a slice's variants.

    Source: engineering choice
    """
    labels = own_labels(variants)
    return {"variants": variants} | ({} if labels is None else {"variant_labels": labels})


def _refuse_other_sources(items: Sequence[dict], store_dir: str, synthetic_dir: str) -> None:
    """Raises ValueError for variants of another scan or label that has a training case's name.

    Or of the same ones, if their slices were cut in another way.
    """
    store, key = read_store(store_dir), f"synthetic_dir: {synthetic_dir}"
    rows = read_manifest(synthetic_dir, ["case", "source_sha256", "slicing"])
    refuse_other_slicing(rows["slicing"], store.header["task"], key)
    rows = rows[rows["case"].isin({item["case"] for item in items})]
    own = rows["case"].map(store.source_sha256())
    wrong = rows[rows["source_sha256"] != own]
    if len(wrong):
        case, sha256 = wrong.iloc[0][["case", "source_sha256"]]
        raise ValueError(
            f"synthetic_dir: {synthetic_dir}: the variants of case '{case}' were made from files "
            f"of source_sha256 {sha256[:12]}…, the case of this name in {store_dir} has "
            f"{own[wrong.index[0]][:12]}…: another scan or another label, as in "
            f"{wrong['case'].nunique()} training cases. Synthesize from this store, or name in "
            "store_dir the one that the variants were made from"
        )


def _place(item: dict) -> tuple[str, int]:
    return item["case"], int(item["slice"])


def _without_rejected(items: Sequence[dict], arm: str, synthetic_dir: str) -> list[dict]:
    """Items whose variants the quality filter all rejected: left out, or merged with themselves."""
    rejected = sum(not item["variants"] for item in items)
    if not rejected:
        return list(items)
    counted = (
        f"synthetic_dir: {synthetic_dir} keeps no variant of {rejected} of {len(items)} slices"
    )
    if arm != SYNTHETIC_ARM:
        logger.warning("%s; they are trained on as they are", counted)
        return [item | {"variants": item["variants"] or [item["image"]]} for item in items]
    if rejected == len(items):
        raise ValueError(f"{counted}, so that arm {arm!r} has nothing to train on")
    logger.warning("%s; arm %r leaves them out", counted, arm)
    return [item for item in items if item["variants"]]


def selection_items(
    store_dir: str,
    fold: int,
    selection: str = "inner_validation",
    min_foreground_px: int = 0,
    inner_fraction: float = 0.2,
    num_cases: int | None = None,
    training: Sequence[dict] = (),
) -> list[dict]:
    """The slices on which the best epoch is chosen.

    Args:
        store_dir: slice store.
        fold: fold that is held out.
        selection: "inner_validation": all slices of cases of the training fold that are not trained
            on; "test": the test slices that have ``min_foreground_px``, as the released code does.
            The scores of a model that was chosen on them are too good.
        min_foreground_px: as in training.
        inner_fraction: part of the fold's training cases kept for inner validation.
        num_cases: of the training fold, see ``training_items``.
        training: what is trained on; next to a client's volumes no slice of the store is meant.

    Raises:
        ValueError: unknown selection, or no case is kept for inner validation.

    Source: facts 14, 25
    """
    if selection not in SELECTIONS:
        raise ValueError(f"selection: {selection!r} is unknown; {nearest(selection, SELECTIONS)}")
    if are_volumes(training):
        return []
    if selection == "test":
        return slice_items(store_dir, fold, "test", min_foreground_px=min_foreground_px)
    return slice_items(
        store_dir, fold, selection, inner_fraction=inner_fraction, num_cases=num_cases
    )


def are_volumes(items: Sequence[dict]) -> bool:
    """Whether items are a client's volumes or pictures with labels, not slices of a store.

    Source: engineering choice (MONAI Label lists ``{image, label}`` alone).
    """
    return len(items) > 0 and "case" not in items[0]


def check_store(
    store_dir: str, image_size: int, num_classes: int, in_channels: int = 1, size_divisor: int = 1
) -> None:
    """Refuses a store whose slices or labels are not what the network is built for.

    Args:
        store_dir: slice store.
        image_size: side of the slices in pixels.
        num_classes: number of classes with background.
        in_channels: channels of a slice.
        size_divisor: the network halves its slices down to this part of their side; one pixel is
            too little for its normalization.

    Raises:
        ValueError: the store or the network has another of these numbers.

    Source: engineering choice
    """
    if image_size % size_divisor or image_size < 2 * size_divisor:
        raise ValueError(
            f"image_size: {image_size}; this network needs a multiple of {size_divisor} from "
            f"{2 * size_divisor} up"
        )
    header = read_store(store_dir).header
    stored = {
        "image_size": header["preprocessing"]["image_size"],
        "num_classes": len(header["labels"]),
        "in_channels": STORE_CHANNELS,
    }
    given = {"image_size": image_size, "num_classes": num_classes, "in_channels": in_channels}
    for key, value in given.items():
        if value != stored[key]:
            raise ValueError(
                f"{key}: {value} does not fit the store {store_dir}, which has {stored[key]}"
            )


def prepare_batch(arm: str) -> PrepareBatch:
    """MONAI's batch preparation: image and label, and in a diffboost arm what MergeInferer needs.

    Args:
        arm: see ``split_arm``.

    Source: engineering choice
    """
    needs_variants, _ = split_arm(arm)
    if needs_variants and arm != SYNTHETIC_ARM:
        return PrepareBatchExtraInput({"synthetic": "synthetic", "merge_mask": "merge_mask"})
    return PrepareBatchDefault()
