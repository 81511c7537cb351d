"""A slice store of a few seconds for tests: balls with two classes, and variants of its slices."""

import functools
import json
import tempfile
from pathlib import Path

import nibabel as nib
import numpy as np
import pandas as pd
from PIL import Image

from diffboost.data.slices import write_edge, write_image, write_label
from diffboost.data.tasks import read_task
from diffboost.data.transforms import case_preprocessing
from diffboost.files import sha256_of_files

LABELS = {"shell": [100], "core": [200]}
VOLUMES = {"name": "balls", "layout": "decathlon", "labels": LABELS, "slice_axis": "axial"}
IMAGES = {"name": "discs", "layout": "pairs", "labels": LABELS}
# Array axes run to inferior, left, posterior; voxels are 0.8 x 0.9 x 3 mm.
AFFINE = np.array([[0, -0.8, 0, 3], [0, 0, -0.9, 7], [-3, 0, 0, 1], [0, 0, 0, 1.0]])


def draw_ball(shape: tuple[int, ...], seed: int) -> tuple[np.ndarray, np.ndarray]:
    """A noisy image and its label (0, 100, 200) of a ball with a core."""
    generator = np.random.default_rng(seed)
    grid = np.stack(np.meshgrid(*(np.linspace(-1, 1, n) for n in shape), indexing="ij"))
    center = generator.uniform(-0.2, 0.2, (len(shape), *[1] * len(shape)))
    radius = np.sqrt(((grid - center) ** 2).sum(0))
    label = 100 * ((radius < 0.7).astype(np.uint8) + (radius < 0.35))
    image = np.clip(label + generator.normal(20, 10, shape), 0, 255)
    return image.astype(np.uint8), label.astype(np.uint8)


def write_case(source: Path, layout: str, case: str, seed: int) -> tuple[str, str]:
    """Writes image and label of a case; returns their names relative to `source`."""
    if layout == "pairs":
        names = f"{case}.png", f"{case}_mask.png"
        for name, pixels in zip(names, draw_ball((40, 52), seed), strict=True):
            source.mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels).save(source / name)
    else:
        names = f"imagesTr/{case}.nii.gz", f"labelsTr/{case}.nii.gz"
        for name, volume in zip(names, draw_ball((5, 40, 36), seed), strict=True):
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            nib.save(nib.Nifti1Image(volume, AFFINE), source / name)
    return names


@functools.cache
def source_sha256(number: int, layout: str = "decathlon") -> str:
    """The hash of the source files of a case of `write_store`."""
    with tempfile.TemporaryDirectory() as folder:
        names = write_case(Path(folder), layout, f"case_{number}", seed=number)
        return sha256_of_files([Path(folder) / name for name in names])


def write_store(
    store_dir: Path, num_cases: int = 6, layout: str = "decathlon", image_size: int = 32
) -> Path:
    """A slice store of 3 folds at `image_size` px with its source in `source/`."""
    task = read_task(VOLUMES if layout == "decathlon" else IMAGES)
    preprocessing = case_preprocessing(task, image_size, with_label=True)
    for folder in ("images", "labels", "edges"):
        (store_dir / folder).mkdir(parents=True)
    rows = []
    for number in range(num_cases):
        case = f"case_{number}"
        names = write_case(store_dir / "source", layout, case, seed=number)
        paths = (str(store_dir / "source" / name) for name in names)
        item = preprocessing(dict(zip(("image", "label"), paths, strict=True)))
        for index in range(item["image"].shape[-1]):
            name = f"{case}_{index:04d}.png"
            label = item["label"][0, ..., index].numpy()
            write_image(store_dir / "images" / name, item["image"][0, ..., index].numpy())
            write_label(store_dir / "labels" / name, label)
            write_edge(store_dir / "edges" / name, np.zeros((image_size, image_size)))
            row = {key: f"{key}s/{name}" for key in ("image", "label", "edge")}
            row |= {"case": case, "slice": index, "image_root": "store", "prompt": "MR, ball, ball"}
            row |= {"section": "training", "fold": number % 3, "foreground_px": (label > 0).sum()}
            row |= {"group": case, "affine": AFFINE.ravel().tolist()}
            row |= {"original_shape": [40, 52, 1] if layout == "pairs" else [5, 40, 36]}
            row |= {"source_image": names[0], "source_label": names[1]}
            row |= {"sha256": "", "source_sha256": source_sha256(number, layout)}
            row |= {"image_sha256": sha256_of_files([store_dir / "source" / names[0]])}
            rows.append(
                row | {"spacing_mm": [0.8, 0.9, 3.0] if layout == "decathlon" else [1.0] * 3}
            )
    pd.DataFrame(rows).to_parquet(store_dir / "index.parquet")
    header = {
        "name": task["name"],
        "labels": {"0": "background", "1": "shell", "2": "core"},
        "task": task,
        "preprocessing": {"image_size": image_size},
        "source_dir": "source",
        "store_version": 4,
    }
    (store_dir / "dataset.json").write_text(json.dumps(header))
    return store_dir


def write_variants(store_dir: Path, synthetic_dir: Path, ratio: int = 2) -> Path:
    """A synthetic store: flat gray images, darker by the number of the variant; all kept."""
    (synthetic_dir / "images").mkdir(parents=True)
    lineage = synthetic_dir / "lineage.json"
    lineage.write_text(json.dumps({"cases": {}, "ancestors": []}))
    size = json.loads((store_dir / "dataset.json").read_text())["preprocessing"]["image_size"]
    rows = []
    for row in pd.read_parquet(store_dir / "index.parquet").to_dict("records"):
        for variant in range(ratio):
            name = f"images/{row['case']}_{row['slice']:04d}_{variant:03d}.png"
            write_image(synthetic_dir / name, np.full((size, size), -variant / 10))
            place = {"image": name, "case": row["case"], "slice": row["slice"]}
            place |= {"source_image": row["image"], "lineage_sha256": sha256_of_files([lineage])}
            place |= {"source_sha256": row["source_sha256"]}
            rows.append(place | {"variant": variant, "kept": True, "reason": ""})
    pd.DataFrame(rows).to_parquet(synthetic_dir / "manifest.parquet")
    return synthetic_dir
