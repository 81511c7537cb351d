"""Readers of raw data with labels: Decathlon folders, and pairs of image and mask."""

import logging
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from diffboost.data.containment import inside, leads_out
from diffboost.data.documents import read_json
from diffboost.knobs import nearest

logger = logging.getLogger(__name__)

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".tif", ".tiff")
_MASK = re.compile(r"^(?P<stem>.+)_mask(_\d+)?$")


@dataclass(frozen=True)
class Case:
    """One volume or 2D image: file-name safe name, absolute paths, section, finding.

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
        ValueError: not a Decathlon json, a path that leaves the folder, or no case at all.

    Source: engineering choice (issue 2, "Data").
    """
    root = Path(os.path.abspath(dataset_dir))
    if not root.is_dir():
        raise FileNotFoundError(f"dataset_dir: no such folder: {root}")
    readers = {"decathlon": _decathlon, "pairs": _pairs}
    source = readers[task["layout"]](root, task)
    if not source.cases:
        reasons = "; ".join(f"{file}: {reason}" for file, reason in source.rejected[:3])
        raise ValueError(
            f"dataset_dir: no case of layout '{task['layout']}' in {root}. {reasons or _EXPECTED}"
        )
    return source


_EXPECTED = (
    "Expected is, by layout: decathlon: dataset.json with a list 'training'; pairs: NAME.png with "
    "NAME_mask.png, or folders images and masks"
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
            missing = [path for path in (image, label) if not path.is_file()]
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
