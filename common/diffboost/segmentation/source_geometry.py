"""Between a source's own geometry, in which cases are measured, and the network's slices."""

from collections.abc import Sequence

import nibabel as nib
import numpy as np
import torch
from monai.transforms import Activationsd, Compose, Invertd, Lambdad
from monai.utils import convert_to_dst_type

from diffboost.data.slices import read_store
from diffboost.data.tasks import AXCODES, VOLUMES, read_task
from diffboost.data.transforms import MapLabelsd, OrientLikeImaged, case_preprocessing


def most_likely(pred: torch.Tensor) -> torch.Tensor:
    """The class of the highest value, as ``AsDiscrete(argmax=True)``, in a tenth of its time.

    Args:
        pred: logits or probabilities, (classes, ...).

    Returns:
        Class index (1, ...), integer, with the metadata of ``pred``.

    Source: engineering choice (torch.argmax is slow over few classes on processors)
    """
    index = torch.as_tensor(pred).as_subclass(torch.Tensor).max(dim=0, keepdim=True).indices
    return convert_to_dst_type(index, pred, dtype=index.dtype)[0]


def source_preprocessing(store_dir: str) -> Compose:
    """The store's preprocessing of ``image``, with ``label`` on the grid of the source's image.

    The label's values are mapped to class indices and its axes turned as the image's: metrics are
    taken in the image's own geometry, into which Invertd brings the prediction.

    Args:
        store_dir: slice store, for its task and image size.

    Source: facts 31 (whole volumes, not stretched slices)
    """
    header = read_store(store_dir).header
    task, image_size = read_task(header["task"]), header["preprocessing"]["image_size"]
    load = case_preprocessing(task, image_size, with_label=True).transforms[:2]
    prepare = case_preprocessing(task, image_size, with_label=False).transforms[2:]
    turn = [OrientLikeImaged("label")] if task["layout"] in VOLUMES else []
    return Compose([*load, *turn, MapLabelsd("label", task), *prepare])


def source_labels(transform: Compose) -> Compose:
    """Logits of a preprocessed case to class indices in the source's geometry.

    Probabilities, not classes, are interpolated.

    Args:
        transform: what ``image`` went through.

    Returns:
        Transforms of ``pred``: (classes, S, S, D) logits to (1, ...) class index.

    Source: facts 31
    """
    return Compose(
        [
            Activationsd("pred", softmax=True),
            Invertd("pred", transform, orig_keys="image", nearest_interp=False),
            Lambdad("pred", func=most_likely),
        ]
    )


def stack_slices(volume: torch.Tensor, axis: int, slices: Sequence[int]) -> torch.Tensor:
    """Some slices of a volume, stacked and stretched to the volume's depth by nearest neighbor.

    Args:
        volume: (H, W, D), in any order of axes.
        axis: the axis along which slices lie.
        slices: numbers of the slices to keep, ascending; at least one.

    Returns:
        A tensor of the shape of ``volume``.

    Source: facts 31 (the released evaluation; the depth of a case is lost in it)
    """
    depth = volume.shape[axis]
    places = torch.arange(depth) * len(slices) // depth
    return volume.index_select(axis, torch.as_tensor(slices)[places])


def slice_axis_of(affine: np.ndarray, slice_axis: str) -> tuple[int, bool]:
    """The axis of a source's array along which slices lie, and whether they run backward on it.

    Args:
        affine: the source's, (4, 4).
        slice_axis: the task's, axial, coronal or sagittal.

    Source: engineering choice
    """
    world = "RAS".index(AXCODES[slice_axis][2])
    axes = nib.io_orientation(np.asarray(affine))
    axis = int(np.flatnonzero(axes[:, 0] == world)[0])
    return axis, bool(axes[axis, 1] < 0)
