"""How much data a study has: from its store, from the headers of its files, or as told."""

import inspect
from collections.abc import Mapping
from pathlib import Path

import nibabel as nib
import pandas as pd

from diffboost.data.dicom_geometry import series_affine
from diffboost.data.dicom_series import is_dicom, read_headers
from diffboost.data.images import picture_size
from diffboost.data.phantom_volumes import write_decathlon_task
from diffboost.data.slices import read_store
from diffboost.data.sources import IMAGE_SUFFIXES, Case, read_source
from diffboost.data.splits import assign_folds
from diffboost.data.tasks import AXCODES, PHANTOMS
from diffboost.data.volumes import open_volume
from diffboost.plans import Experiment

WORLD_AXES = "RAS"


def study_slices(
    experiment: Experiment,
    task: Mapping,
    dataset_dir: str,
    store_dir: Path | None = None,
    num_slices: int | None = None,
) -> tuple[pd.DataFrame, str]:
    """The slices that prepare would make, or made; no pixel is read.

    Args:
        experiment: says folds and how many cases are prepared.
        task: a task as ``read_task`` gives it.
        dataset_dir: folder of the scans, or ``phantoms``.
        store_dir: a slice store; where there is one, it is what counts.
        num_slices: take so many cases of one slice each instead.

    Returns:
        Index with a row a slice (case, section, fold, pixels, and from a store foreground_px and
        prompt), and a sentence that says where it comes from.

    Raises:
        FileNotFoundError: no such data; says which flags tell the number.
        ValueError: ``num_slices`` is below the number of folds.

    Source: engineering choice
    """
    if num_slices is not None:
        if type(num_slices) is not int or num_slices < experiment.num_folds:
            raise ValueError(
                f"num_slices: {num_slices!r}; a whole number from num_folds "
                f"({experiment.num_folds}) up is needed"
            )
        index = _index({f"case{i}": ("training", 1, None) for i in range(num_slices)})
        said = f"{num_slices} cases of one slice each, as --num_slices says"
    elif store_dir is not None and (store_dir / "dataset.json").is_file():
        index = read_store(store_dir).index.assign(pixels=experiment.image_size**2)
        return index, f"{_numbers(index)}, of the store {store_dir}"
    elif dataset_dir == PHANTOMS:
        index = _phantoms(experiment.prepare.get("phantoms") or {})
        said = f"{_numbers(index)}, phantoms"
    else:
        index = _source(dataset_dir, task, experiment.prepare.get("num_cases"))
        said = f"{_numbers(index)}, by the headers of the files in {dataset_dir}"
    index["pixels"] = index.pixels.fillna(experiment.image_size**2)
    return _with_folds(index, experiment), said


def _with_folds(index: pd.DataFrame, experiment: Experiment) -> pd.DataFrame:
    """The index with the folds that prepare would deal."""
    training = index.case[index.section == "training"].unique()
    num_folds = min(experiment.num_folds, len(training))
    seed, order = (experiment.prepare.get(k, v) for k, v in (("seed", 0), ("fold_order", "drawn")))
    folds = assign_folds(training, num_folds, seed, order)
    return index.assign(fold=index.case.map(folds).fillna(-1).astype(int))


def _numbers(index: pd.DataFrame) -> str:
    return f"{len(index)} slices of {index.case.nunique()} cases"


def _index(cases: Mapping[str, tuple]) -> pd.DataFrame:
    """A row a slice from {case: (section, number of slices, pixels of a slice or None)}."""
    rows = [
        {"case": case, "section": section, "pixels": pixels}
        for case, (section, number, pixels) in cases.items()
        for _ in range(number)
    ]
    return pd.DataFrame(rows).astype({"pixels": "Float64"})


def _phantoms(sizes: Mapping) -> pd.DataFrame:
    """Cases of the phantom task, with its writer's own numbers where none are given."""
    parameters = inspect.signature(write_decathlon_task).parameters
    sizes = {name: sizes.get(name, entry.default) for name, entry in parameters.items()}
    return _index(
        {
            f"{section}{i}": (section, sizes["num_slices"], sizes["size_px"] ** 2)
            for section in ("training", "test")
            for i in range(sizes[f"num_{section}"])
        }
    )


def _source(dataset_dir: str, task: Mapping, num_cases: int | None) -> pd.DataFrame:
    """Cases of a folder, with their slices by the header of each file."""
    try:
        cases = read_source(dataset_dir, task).cases
    except FileNotFoundError as error:
        raise FileNotFoundError(
            f"{error}; --dataset_dir names the folder of the scans, --num_slices says how many "
            "slices to count with instead"
        ) from None
    if num_cases is not None:  # which ones does not matter much for a count
        drawn = [case for case in cases if case.section == "training"][:num_cases]
        cases = drawn + [case for case in cases if case.section == "test"]
    return _index({case.name: (case.section, *_shape(case, task["slice_axis"])) for case in cases})


def _shape(case: Case, slice_axis: str) -> tuple[int, int]:
    """Number of slices of a case, and pixels of one, from its header alone."""
    if case.image.suffix.lower() in IMAGE_SUFFIXES:
        width, height = picture_size(case.image, "dataset_dir")
        return 1, width * height
    if is_dicom(case.image):
        headers = read_headers(case.image, "dataset_dir")
        affine = series_affine(headers)
        sides = [headers[0].Columns, headers[0].Rows, len(headers)]
    else:
        file = open_volume(case.image, "dataset_dir")
        affine, sides = file.affine, list(file.shape[:3])
    directions = nib.io_orientation(affine)[:, 0]
    axis = list(directions).index(WORLD_AXES.index(AXCODES[slice_axis][-1]))
    number = sides.pop(axis)
    return number, sides[0] * sides[1]
