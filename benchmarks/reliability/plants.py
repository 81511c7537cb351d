"""What planted_leaks.py plants in raw files: copies, changed copies, halves of volumes."""

import gzip
import io
import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import nibabel as nib
import numpy as np
import pandas as pd
from PIL import Image
from scipy import ndimage

from diffboost.audit.checks import Leak
from diffboost.data.sources import Case, read_source


@dataclass
class Plant:
    """A planted leak: its kind, the two names that must be reported, and how it was made.

    ``origin`` is the real case behind ``first``.
    """

    kind: str
    first: str
    second: str
    origin: str
    how: str = ""

    def is_named(self, leak: Leak, kind: str | None = None) -> bool:
        """Whether a leak names both sides; or, of a held-out source, it and one of its variants."""
        if kind not in (None, leak.kind):
            return False
        by_variant = leak.first.startswith("images/") and leak.second == self.second
        both = {leak.first, leak.second} == {self.first, self.second}
        return both or (self.kind == "generator" and by_variant)

    @property
    def in_files(self) -> bool:
        """Whether it lies in the raw files."""
        return self.kind in ("image", "duplicate", "volume")


@dataclass
class Raw:
    """A raw folder of copies of some real cases, and these cases."""

    root: Path
    cases: dict[str, Case]
    flat: bool


def _copy_raw(source: Path, root: Path, cases: list[Case]) -> Raw:
    """A raw folder with the files of some cases of a real data set; they can be changed there."""
    flat = not (source / "dataset.json").is_file()
    copied = {}
    for case in cases:
        places = [root / path.relative_to(source) for path in (case.image, *case.labels)]
        for path, place in zip((case.image, *case.labels), places, strict=True):
            place.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, place)
        copied[case.name] = replace(case, image=places[0], labels=tuple(places[1:]))
    return Raw(root, copied, flat)


def plant_files(
    source: Path, root: Path, task: Mapping, kinds: list[str], groups: Mapping,
    rng: np.random.Generator,
) -> list[Plant]:  # fmt: skip
    """Plants what lies in files; every leak has a real case of its own, without duplicates.

    ``root`` becomes a raw folder of the cases whose files are touched, and of the planted ones.
    """
    cases = {case.name: case for case in read_source(source, task).cases}
    alone = pd.Series(groups).value_counts()
    single = [name for name in cases if alone[groups[name]] == 1]
    plants = []
    for number, (kind, name) in enumerate(
        zip(kinds, rng.permutation(single)[: len(kinds)].tolist(), strict=True)
    ):
        first = f"planted_{number}" if kind in _PLANTERS else name
        plants.append(Plant(kind, first, name, name))
    touched = [plant for plant in plants if plant.in_files]
    raw = _copy_raw(source, root, [cases[plant.origin] for plant in touched])
    for plant in touched:
        plant.how = _PLANTERS[plant.kind](raw, raw.cases[plant.origin], plant.first, rng)
    if not raw.flat:
        header = json.loads((source / "dataset.json").read_text())
        names = [name for plant in touched for name in (plant.origin, plant.first)]
        header["training"] = [
            {"image": f"./imagesTr/{name}.nii.gz", "label": f"./labelsTr/{name}.nii.gz"}
            for name in names
        ]
        header["test"] = []
        (root / "dataset.json").write_text(json.dumps(header))
    return plants


def _targets(raw: Raw, case: Case, new: str) -> tuple[Path, Path]:
    """Where image and label of a planted case lie."""
    if raw.flat:
        return case.image.with_name(f"{new}.png"), case.image.with_name(f"{new}_mask.png")
    return raw.root / f"imagesTr/{new}.nii.gz", raw.root / f"labelsTr/{new}.nii.gz"


def _read(path: Path, flat: bool) -> tuple[np.ndarray, np.ndarray]:
    """Pixels (H, W, 1) or (X, Y, Z), and the affine."""
    if flat:
        return np.asarray(Image.open(path).convert("L"), dtype=float)[..., None], np.eye(4)
    image = nib.load(path)
    return image.get_fdata(), image.affine


def _write(path: Path, pixels: np.ndarray, affine: np.ndarray, flat: bool) -> None:
    if flat:
        Image.fromarray(np.clip(np.round(pixels[..., 0]), 0, 255).astype(np.uint8)).save(path)
        return
    nib.save(nib.Nifti1Image(pixels.astype(np.float32), affine), path)


def _plant_image(raw: Raw, case: Case, new: str, rng: np.random.Generator) -> str:
    """The same image under another name: the same bytes, or written anew."""
    image, label = _targets(raw, case, new)
    again = bool(rng.integers(2))
    for source, target in ((case.image, image), (case.labels[0], label)):
        if not again:
            shutil.copy(source, target)
        elif raw.flat:
            with Image.open(source) as file:
                file.save(target, compress_level=1)
        else:
            target.write_bytes(gzip.compress(gzip.decompress(source.read_bytes()), 1))
    return "written anew" if again else "copied"


def _plant_duplicate(raw: Raw, case: Case, new: str, rng: np.random.Generator) -> str:
    """A copy: turned, mirrored, cropped, re-encoded, of another gamma, or several of these."""
    pixels, affine = _read(case.image, raw.flat)
    label, _ = _read(case.labels[0], raw.flat)
    kinds = ["turn", "quarter", "mirror", "crop", "jpeg", "gamma"]
    count = int(rng.choice([1, 1, 2, 3]))
    chosen = [str(kind) for kind in rng.permutation(kinds)[:count]]
    plane = (0, 1) if raw.flat else (1, 2)  # slices of hippocampi are sagittal
    for kind in chosen:
        draw = int(rng.integers(2**31))
        pixels = _change(pixels, kind, plane, np.random.default_rng(draw), False)
        label = _change(label, kind, plane, np.random.default_rng(draw), True)
    for values, target in zip((pixels, label), _targets(raw, case, new), strict=True):
        _write(target, values, affine, raw.flat)
    return " ".join(chosen)


def _change(
    pixels: np.ndarray, kind: str, plane: tuple, rng: np.random.Generator, label: bool
) -> np.ndarray:
    """One change of an image or, the same one, of its label."""
    if kind == "turn":
        degrees = float(rng.choice([-1, 1]) * rng.uniform(5, 15))
        mode = "constant" if rng.integers(2) else "reflect"
        order = 0 if label else 1
        return ndimage.rotate(pixels, degrees, plane, reshape=False, order=order, mode=mode)
    if kind == "quarter":
        return np.rot90(pixels, int(rng.integers(1, 4)), plane)
    if kind == "mirror":
        return np.flip(pixels, plane[int(rng.integers(2))])
    if kind == "crop":
        share, box = rng.uniform(0.8, 0.95), [slice(None)] * 3
        for axis in plane:
            side = round(share * pixels.shape[axis])
            start = int(rng.integers(pixels.shape[axis] - side + 1))
            box[axis] = slice(start, start + side)
        return pixels[tuple(box)]
    if label:
        return pixels
    low, high = pixels.min(), pixels.max()
    levels = (pixels - low) / (high - low)
    if kind == "gamma":
        return levels ** float(rng.choice([0.6, 0.75, 1.35, 1.6])) * (high - low) + low
    quality, axis = int(rng.choice([40, 60, 80])), ({0, 1, 2} - set(plane)).pop()
    planes = [_jpeg(levels.take(n, axis), quality) for n in range(levels.shape[axis])]
    return np.stack(planes, axis) * (high - low) + low


def _jpeg(levels: np.ndarray, quality: int) -> np.ndarray:
    """A slice in [0, 1] as JPEG keeps it."""
    file = io.BytesIO()
    Image.fromarray(np.round(255 * levels).astype(np.uint8)).save(file, "JPEG", quality=quality)
    return np.asarray(Image.open(file), dtype=float) / 255


def _plant_volume(raw: Raw, case: Case, new: str, rng: np.random.Generator) -> str:
    """The case keeps the slices up to somewhere in its middle, the planted one has the others."""
    cut = None
    for source, target in zip((case.image, case.labels[0]), _targets(raw, case, new), strict=True):
        pixels, affine = _read(source, raw.flat)
        cut = cut or int(rng.uniform(0.35, 0.65) * len(pixels))
        moved = affine.copy()
        moved[:3, 3] += cut * affine[:3, 0]
        _write(target, pixels[cut:], moved, raw.flat)
        _write(source, pixels[:cut], affine, raw.flat)
    return f"cut at {cut}"


_PLANTERS = {"image": _plant_image, "duplicate": _plant_duplicate, "volume": _plant_volume}
