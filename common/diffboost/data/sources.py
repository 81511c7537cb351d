"""Readers of raw data with labels: volumes, by a list or in folders; pairs of image and mask."""

import logging
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from diffboost.data.containment import inside, leads_out
from diffboost.data.dicom_labels import need_highdicom
from diffboost.data.dicom_series import is_dicom, need_dicom
from diffboost.data.documents import read_json
from diffboost.knobs import nearest

logger = logging.getLogger(__name__)

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".tif", ".tiff")
LABEL_SUFFIXES = (".nii.gz", ".nii", ".dcm")  # beside a folder with one DICOM SEG
_MASK = re.compile(r"^(?P<stem>.+)_mask(_\d+)?$")


@dataclass(frozen=True)
class Case:
    """One volume or 2D image: file-name safe name, absolute paths, section, finding.

    A path is a file, or the folder of a DICOM series.
    ``finding`` is the name of an image's own folder where that says what it shows, else "".
    """

    name: str
    image: Path
    labels: tuple[Path, ...]
    section: str
    finding: str = ""


@dataclass
class Source:
    """What a reader found: cases, and files that it could not use with the reason."""

    cases: list[Case] = field(default_factory=list)
    rejected: list[tuple[str, str]] = field(default_factory=list)


def read_source(dataset_dir: str | Path, task: Mapping) -> Source:
    """Lists the cases of a data folder by the layout of its task; reads no image.

    Args:
        dataset_dir: folder of raw data.
        task: a task as ``read_task`` gives it.

    Returns:
        Cases with unique names, in a fixed order, and rejected files (path, reason).

    Raises:
        FileNotFoundError: no such folder, or no dataset.json in a Decathlon folder.
        ModuleNotFoundError: there is DICOM, and its packages are not installed.
        ValueError: not a Decathlon json, a path that leaves the folder, or no case at all.

    Source: engineering choice (issue 2, "Data").
    """
    root = Path(os.path.abspath(dataset_dir))
    if not root.is_dir():
        raise FileNotFoundError(f"dataset_dir: no such folder: {root}")
    readers = {"decathlon": _decathlon, "series": _series, "pairs": _pairs}
    source = readers[task["layout"]](root, task)
    _need_packages(source.cases)
    if not source.cases:
        reasons = "; ".join(f"{file}: {reason}" for file, reason in source.rejected[:3])
        raise ValueError(
            f"dataset_dir: no case of layout '{task['layout']}' in {root}. {reasons or _EXPECTED}"
        )
    return source


_EXPECTED = (
    "Expected is, by layout: decathlon: dataset.json with a list 'training'; series: folders "
    "images/NAME of one DICOM series, and labels/NAME.nii.gz or labels/NAME.dcm (DICOM SEG); "
    "pairs: NAME.png with NAME_mask.png, or folders images and masks"
)


def unique_names(stems: Iterable[str]) -> Iterator[str]:
    """File-name safe names; a repeated one gets a number behind it.

    Args:
        stems: what the names are made of.

    Source: engineering choice.
    """
    seen: set[str] = set()
    for stem in stems:
        slug = re.sub(r"[^A-Za-z0-9]+", "_", stem).strip("_") or "case"
        name, number = slug, 1
        while name in seen:
            number += 1
            name = f"{slug}_{number}"
        seen.add(name)
        yield name


def _decathlon(root: Path, task: Mapping) -> Source:
    """Cases of a Decathlon dataset.json: ``training``, and ``test`` where it has labels."""
    json_path = root / "dataset.json"
    if not json_path.is_file():
        raise FileNotFoundError(f"dataset_dir: no dataset.json in {root} (layout decathlon)")
    header = read_json(json_path, "dataset_dir", (dict, list))
    if not isinstance(header, dict) or not isinstance(header.get("training"), list):
        raise ValueError(
            f"{json_path} is not a Decathlon json: a list 'training' of {{image, label}} is needed"
        )
    source, found = Source(), []
    for section in ("training", "test"):
        entries = header.get(section) or []
        if not isinstance(entries, list):
            raise ValueError(f"{json_path}: {section}: {entries!r:.80}; a list is needed")
        unlabelled = [entry for entry in entries if not isinstance(entry, dict)]
        if unlabelled and section == "test":
            logger.info("%s: %d test images without label are left out", root, len(unlabelled))
            entries = [entry for entry in entries if isinstance(entry, dict)]
        for entry in entries:
            if not isinstance(entry, dict) or not {"image", "label"} <= set(entry):
                raise ValueError(
                    f"{json_path}: {section}: {entry!r:.200} lacks an image or a label"
                )
            image, label = (
                inside(root, entry[key], f"{json_path}: {section}: {key}")
                for key in ("image", "label")
            )
            missing = [path for path in (image, label) if not path.exists()]
            if missing:
                source.rejected += [
                    (str(path.relative_to(root)), "no such file") for path in missing
                ]
            else:
                found.append((image, label, section))
    names = unique_names(image.name.split(".nii")[0] for image, _, _ in found)
    source.cases = [
        Case(name, image, (label,), section)
        for name, (image, label, section) in zip(names, found, strict=True)
    ]
    return source


def _need_packages(cases: Iterable[Case]) -> None:
    """Raises ModuleNotFoundError before any work where DICOM cannot be read here."""
    for case in cases:
        if is_dicom(case.image):
            need_dicom(f"dataset_dir: {case.image}")
        if any(map(is_dicom, case.labels)):
            need_highdicom(f"dataset_dir: {case.labels[0]}")


def _series(root: Path, task: Mapping) -> Source:
    """Cases of DICOM series: folders images/NAME, with labels of the same NAME in labels."""
    for name in ("images", "labels"):
        if not (root / name).is_dir():
            raise FileNotFoundError(f"dataset_dir: no folder {name} in {root}. {_EXPECTED}")
    source, found = Source(), []
    for image in sorted((root / "images").iterdir()):
        relative = str(image.relative_to(root))
        if image.name.startswith("."):
            continue
        choices = [image.name, *(image.name + suffix for suffix in LABEL_SUFFIXES)]
        labels = [root / "labels" / name for name in choices if (root / "labels" / name).exists()]
        if not image.is_dir():
            source.rejected.append((relative, "no folder; a case is a folder of one series"))
        elif any(leads_out(root, each) for each in (image, *labels)):
            source.rejected.append((relative, "a link out of the folder"))
        elif len(labels) != 1:
            said = ", ".join(each.name for each in labels) or f"none of {', '.join(choices)}"
            source.rejected.append((relative, f"one label is needed in labels; found: {said}"))
        else:
            found.append((image, labels[0]))
    names = unique_names(image.name for image, _ in found)
    source.cases = [
        Case(name, image, (label,), "training")
        for name, (image, label) in zip(names, found, strict=True)
    ]
    return source


def _image_files(root: Path) -> list[Path]:
    """Image files below a folder, hidden ones left out, in the order of their paths."""
    files = (path for path in root.rglob("*") if path.suffix.lower() in IMAGE_SUFFIXES)
    return sorted(path for path in files if not path.name.startswith("."))


def _pairs(root: Path, task: Mapping) -> Source:
    """Cases of 2D images with masks, in BUSI's layout or in folders images and masks.

    An image's subfolder, where it has one, names its finding.
    """
    image_root, mask_root = root, root
    if (root / "images").is_dir() and (root / "masks").is_dir():
        image_root, mask_root = root / "images", root / "masks"
    masks: dict[Path, list[Path]] = {}
    for path in _image_files(mask_root):
        match = _MASK.match(path.stem)
        if match or mask_root != image_root:
            stem = match["stem"] if match else path.stem
            masks.setdefault(path.relative_to(mask_root).parent / stem, []).append(path)
    images = [path for path in _image_files(image_root) if not (_MASK.match(path.stem) and masks)]
    images = _included(images, image_root, task["include"])
    source, found = Source(), []
    for path in images:
        relative = path.relative_to(image_root)
        labels = masks.get(relative.parent / path.stem)
        out = [each for each in (path, *(labels or ())) if leads_out(root, each)]
        if out:
            source.rejected.append((str(out[0].relative_to(root)), "a link out of the folder"))
        elif labels:
            found.append((path, tuple(labels), relative.parent.name))
        else:
            source.rejected.append((str(path.relative_to(root)), "no mask for this image"))
    names = unique_names(path.stem for path, _, _ in found)
    source.cases = [
        Case(name, path, labels, "training", finding)
        for name, (path, labels, finding) in zip(names, found, strict=True)
    ]
    return source


def _included(images: list[Path], root: Path, include: Iterable[str] | None) -> list[Path]:
    """The images in the subfolders named by the task's ``include``; None: all."""
    if include is None:
        return images
    folders = {path.relative_to(root).parts[0] for path in images if path.parent != root}
    for name in include:
        if name not in folders:
            raise ValueError(f"include: no images in '{root / name}'; {nearest(name, folders)}")
    return [path for path in images if path.relative_to(root).parts[0] in set(include)]
