"""Training beside the augmentation: the items of an arm and its batches."""

from monai.engines import PrepareBatchDefault, PrepareBatchExtraInput
from monai.engines.utils import PrepareBatch

from diffboost.data.slices import read_store, slice_items
from diffboost.segmentation.merging import split_arm, variants_by_slice


def training_items(
    store_dir: str,
    arm: str,
    fold: int,
    image_size: int,
    num_classes: int,
    synthetic_dir: str | None = None,
    size_divisor: int = 1,
    min_foreground_px: int = 0,
    inner_fraction: float = 0.2,
    num_cases: int | None = None,
) -> list[dict]:
    """The training slices of a fold; in a diffboost arm each knows the files of its variants.

    A slice stands in the list once, whatever the ratio: an epoch has as many steps in every arm.

    Args:
        store_dir: slice store.
        arm: see ``split_arm``.
        fold: fold whose training cases (without inner validation) are taken.
        image_size: side of the slices in pixels, as the store has them.
        num_classes: number of classes with background, as the store's task has them.
        synthetic_dir: synthetic store; needed by diffboost arms and refused in others.
        size_divisor: the network needs slices of a multiple of this side.
        min_foreground_px: slices with fewer labeled pixels are left out (paper: 20).
        inner_fraction: part of the fold's training cases kept for inner validation.
        num_cases: train on this many cases only; all if None.

    Returns:
        Dictionaries of ``slice_items``, with ``variants`` (list of paths) in a diffboost arm.

    Raises:
        ValueError: arm and synthetic_dir disagree, image_size, num_classes or inner_fraction do
            not fit, or training slices have no variant.

    Source: facts 23
    """
    synthetic, _ = split_arm(arm)
    if synthetic != (synthetic_dir is not None):
        need = "needs a synthetic_dir" if synthetic else "takes no synthetic_dir"
        raise ValueError(f"arm {arm!r} {need}, but synthetic_dir is {synthetic_dir!r}")
    if image_size % size_divisor:
        raise ValueError(
            f"image_size: {image_size} is no multiple of {size_divisor}, the network's"
        )
    if not 0 < inner_fraction < 1:
        raise ValueError(f"inner_fraction: {inner_fraction} is not between 0 and 1")
    check_store(store_dir, image_size, num_classes)
    items = slice_items(
        store_dir,
        fold,
        "training",
        min_foreground_px=min_foreground_px,
        inner_fraction=inner_fraction,
        num_cases=num_cases,
    )
    if not synthetic:
        return items
    variants = variants_by_slice(synthetic_dir)
    missing = [item for item in items if (item["case"], int(item["slice"])) not in variants]
    if missing:
        names = ", ".join(f"{item['case']} slice {item['slice']}" for item in missing[:5])
        raise ValueError(
            f"synthetic_dir: {synthetic_dir} has no kept variant of {len(missing)} of "
            f"{len(items)} training slices of fold {fold}, e.g. {names}"
        )
    return [item | {"variants": variants[item["case"], int(item["slice"])]} for item in items]


def check_store(store_dir: str, image_size: int, num_classes: int) -> None:
    """Refuses a store whose slices or labels are not what the network is built for.

    Args:
        store_dir: slice store.
        image_size: side of the slices in pixels.
        num_classes: number of classes with background.

    Raises:
        ValueError: the store has another image size or number of classes.

    Source: engineering choice
    """
    header = read_store(store_dir).header
    stored = {
        "image_size": header["preprocessing"]["image_size"],
        "num_classes": len(header["labels"]),
    }
    for key, value in {"image_size": image_size, "num_classes": num_classes}.items():
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
    synthetic, _ = split_arm(arm)
    if synthetic:
        return PrepareBatchExtraInput({"synthetic": "synthetic", "merge_mask": "merge_mask"})
    return PrepareBatchDefault()
