"""What planted_leaks.py plants: raw files, splits, lineages and manifests."""

import gzip
import io
import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import nibabel as nib
import numpy as np
import pandas as pd
from PIL import Image
from scipy import ndimage

from diffboost.audit.checks import Leak
from diffboost.data.addresses import address_seed
from diffboost.data.slices import read_store, sha256_of_files
from diffboost.data.sources import Case, read_source
from diffboost.data.splits import assign_folds
from diffboost.data.tasks import change_task, read_task


@dataclass(frozen=True)
class Plant:
    """A planted leak: its kind, the two names that must be reported, and how it was made.

    ``origin`` is the real case behind ``first``.
    """

    kind: str
    first: str
    second: str
    origin: str
    how: str

    def is_named(self, leak: Leak, kind: str | None = None) -> bool:
        """Whether a leak names both sides; or, of a held-out source, it and one of its variants."""
        if kind not in (None, leak.kind):
            return False
        by_variant = leak.first.startswith("images/") and leak.second == self.second
        return {leak.first, leak.second} == {self.first, self.second} or by_variant

    @property
    def in_files(self) -> bool:
        """Whether it lies in the raw files."""
        return self.kind in ("image", "duplicate", "volume")


@dataclass
class Raw:
    """A raw folder of links to real files, and its cases."""

    root: Path
    cases: dict[str, Case]
    flat: bool


def write_raw(source: Path, root: Path) -> Raw:
    """A folder of links to a real data set's files; a Decathlon json is copied."""
    flat = not (source / "dataset.json").is_file()
    for path in source.rglob("*.png" if flat else "*.nii.gz"):
        target = root / path.relative_to(source)
        target.parent.mkdir(parents=True, exist_ok=True)
        target.symlink_to(path)
    if flat:
        task = change_task(
            read_task("breast_ultrasound"), include=["benign", "malignant", "normal"]
        )
    else:
        task = read_task("hippocampus_mri")
        shutil.copy(source / "dataset.json", root)
    return Raw(root, {case.name: case for case in read_source(root, task).cases}, flat)


def plant_files(raw: Raw, kinds: list[str], groups: Mapping, rng: np.random.Generator) -> list:
    """Plants what lies in files; every leak has a real case of its own, without duplicates."""
    alone = pd.Series(groups).value_counts()
    single = [name for name in raw.cases if alone.get(groups.get(name, name), 1) == 1]
    names = rng.permutation(single)[: len(kinds)].tolist()
    plants, added = [], []
    for number, (kind, name) in enumerate(zip(kinds, names, strict=True)):
        case, new, how = raw.cases[name], f"planted_{number}", ""
        if kind in ("image", "duplicate", "volume"):
            how = _PLANTERS[kind](raw, case, new, rng)
            added.append(new)
        plants.append(Plant(kind, new if how else name, name, name, how))
    if not raw.flat:
        path = raw.root / "dataset.json"
        header = json.loads(path.read_text())
        header["training"] += [
            {"image": f"./imagesTr/{new}.nii.gz", "label": f"./labelsTr/{new}.nii.gz"}
            for new in added
        ]
        path.write_text(json.dumps(header))
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
        source.unlink()  # a link
        _write(source, pixels[:cut], affine, raw.flat)
    return f"cut at {cut}"


_PLANTERS = {"image": _plant_image, "duplicate": _plant_duplicate, "volume": _plant_volume}


def plant_splits(
    store_dir: Path, plants: list[Plant], groups: Mapping, num_folds: int, rng: np.random.Generator
) -> None:
    """Draws folds anew, as if planted pairs were unknown, with each pair on both sides.

    What must be held out of fold 0 is; a leak of kind "case" has its rows in two folds.
    """
    path = store_dir / "index.parquet"
    index = pd.read_parquet(path)
    folds = assign_folds(index.case.unique(), num_folds, int(rng.integers(2**31)), groups=groups)
    for plant in plants:
        folds[plant.second] = 0
        if plant.in_files:
            folds[plant.first] = 1
    index["fold"] = index.case.map(folds)
    index["group"] = index.case.map(lambda case: groups.get(case, case))
    twice = index[index.case.isin({plant.first for plant in plants if plant.kind == "case"})]
    pd.concat([index, twice.assign(fold=1)], ignore_index=True).to_parquet(path)


def plant_models(store_dir: Path, folder: Path, plants: list[Plant]) -> dict[str, Path]:
    """A generator, its variants and a segmenter of fold 0, whose files tell of held-out cases."""
    index = read_store(store_dir).index.drop_duplicates("case", keep="first")
    hashes = dict(zip(index.case, index.source_sha256, strict=True))
    planted = {name for plant in plants for name in (plant.first, plant.second)}
    clean = index[(index.fold != 0) & ~index.case.isin(planted)].case.tolist()
    seen = [plant.first for plant in plants if plant.kind == "generator"]
    chosen = [plant.first for plant in plants if plant.kind == "selection"]
    lineage = {name: {"cases": {}, "ancestors": [], "fold": 0} for name in ("own", "ancestor")}
    sources = clean[:5]
    for number, name in enumerate(seen):
        if number % 3 == 2:
            sources.append(name)
        else:
            lineage[("own", "ancestor")[number % 3]]["cases"][name] = hashes[name]
    lineage["own"]["cases"] |= {name: hashes[name] for name in clean[:20]}
    lineage["own"]["ancestors"].append(lineage["ancestor"])
    model = {"cases": {name: hashes[name] for name in clean[:20]}, "ancestors": [], "fold": 0}
    model["selection"] = {name: hashes[name] for name in [*clean[20:25], *chosen]}
    places = {f"{name}_dir": folder / name for name in ("synthetic", "generator", "model")}
    for name, place in places.items():
        place.mkdir()
        told = model if name == "model_dir" else lineage["own"]
        (place / "lineage.json").write_text(json.dumps(told))
    _write_variants(places["synthetic_dir"], index.set_index("case"), sources)
    return places


def _write_variants(folder: Path, index: pd.DataFrame, sources: list[str]) -> None:
    """Two variants of a slice of every source."""
    (folder / "images").mkdir()
    rows = []
    for case in sources:
        for variant in range(2):
            image = f"images/{case}_{variant:03d}.png"
            pixels = np.random.default_rng(address_seed(case, variant)).integers(0, 255, (16, 16))
            Image.fromarray(pixels.astype(np.uint8)).save(folder / image)
            rows.append(
                {"image": image, "case": case, "slice": 0, "variant": variant, "kept": True}
            )
            rows[-1]["source_image"] = str(index.image[case])
            rows[-1]["lineage_sha256"] = sha256_of_files([folder / "lineage.json"])
    pd.DataFrame(rows).to_parquet(folder / "manifest.parquet")
