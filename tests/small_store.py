"""A slice store of a few seconds for tests: ellipsoids with two classes, and variants of its slices."""

import json
from pathlib import Path

import nibabel as nib
import numpy as np
import pandas as pd

from diffboost.data.slices import write_edge, write_image, write_label
from diffboost.data.tasks import read_task
from diffboost.data.transforms import case_preprocessing

TASK = {
    "name": "balls",
    "layout": "decathlon",
    "labels": {"shell": [1], "core": [2]},
    "slice_axis": "axial",
}


def write_case(image_path: Path, label_path: Path, seed: int) -> None:
    """A noisy ball with a core in an anisotropic volume of oblique order (LPS, k first)."""
    generator = np.random.default_rng(seed)
    grid = np.stack(np.meshgrid(*(np.linspace(-1, 1, n) for n in (5, 40, 36)), indexing="ij"))
    center = generator.uniform(-0.2, 0.2, 3)[:, None, None, None]
    radius = np.sqrt((((grid - center) * [[[[1.3]]], [[[1]]], [[[1.1]]]]) ** 2).sum(0))
    label = (radius < 0.7).astype(np.uint8) + (radius < 0.35)
    image = 100 * label + generator.normal(0, 10, label.shape)
    affine = np.array([[0, -0.8, 0, 3], [0, 0, 0.9, -7], [-3, 0, 0, 1], [0, 0, 0, 1.0]])
    for path, volume in ((image_path, image.astype(np.float32)), (label_path, label)):
        path.parent.mkdir(parents=True, exist_ok=True)
        nib.save(nib.Nifti1Image(volume, affine), path)


def write_store(store_dir: Path, num_cases: int = 6, image_size: int = 32) -> Path:
    """A slice store of 3 folds with its source volumes in `source/`."""
    task = read_task(TASK)
    rows = []
    for number in range(num_cases):
        case = f"case_{number}"
        image_path = store_dir / "source" / "imagesTr" / f"{case}.nii.gz"
        label_path = store_dir / "source" / "labelsTr" / f"{case}.nii.gz"
        write_case(image_path, label_path, seed=number)
        preprocessing = case_preprocessing(task, image_size, with_label=True)
        item = preprocessing({"image": str(image_path), "label": str(label_path)})
        for index in range(item["image"].shape[-1]):
            name = f"{case}_{index:04d}.png"
            for folder, writer, key in (
                ("images", write_image, "image"),
                ("labels", write_label, "label"),
            ):
                (store_dir / folder).mkdir(exist_ok=True)
                writer(store_dir / folder / name, item[key][0, ..., index].numpy())
            (store_dir / "edges").mkdir(exist_ok=True)
            write_edge(store_dir / "edges" / name, np.zeros((image_size, image_size)))
            rows.append(
                {
                    "case": case,
                    "slice": index,
                    "image": f"images/{name}",
                    "label": f"labels/{name}",
                    "edge": f"edges/{name}",
                    "image_root": "store",
                    "prompt": "MR, ball, ball",
                    "section": "training",
                    "fold": number % 3,
                    "spacing_mm": [0.8, 0.9, 3.0],
                    "original_shape": [5, 40, 36],
                    "affine": np.eye(4).ravel().tolist(),
                    "foreground_px": int((item["label"][..., index] > 0).sum()),
                    "sha256": "",
                    "source_image": f"imagesTr/{case}.nii.gz",
                    "source_label": f"labelsTr/{case}.nii.gz",
                }
            )
    pd.DataFrame(rows).to_parquet(store_dir / "index.parquet")
    header = {
        "name": "balls",
        "labels": {"0": "background", "1": "shell", "2": "core"},
        "task": task,
        "preprocessing": {"image_size": image_size, "edges": "gradient"},
        "source_dir": "source",
        "store_version": 1,
        "num_folds": 3,
        "seed": 0,
    }
    (store_dir / "dataset.json").write_text(json.dumps(header))
    return store_dir


def write_variants(store_dir: Path, synthetic_dir: Path, ratio: int = 2) -> Path:
    """A synthetic store: each slice of the store inverted and shifted a little, `ratio` times."""
    index = pd.read_parquet(store_dir / "index.parquet")
    image_size = json.loads((store_dir / "dataset.json").read_text())["preprocessing"]["image_size"]
    (synthetic_dir / "images").mkdir(parents=True)
    rows = []
    for row in index.to_dict("records"):
        for variant in range(ratio):
            name = f"images/{row['case']}_{row['slice']:04d}_{variant:03d}.png"
            gray = np.full((image_size, image_size), variant / 10)
            write_image(synthetic_dir / name, gray)
            rows.append(
                {
                    "image": name,
                    "case": row["case"],
                    "slice": row["slice"],
                    "variant": variant,
                    "kept": True,
                    "reason": "",
                }
            )
    pd.DataFrame(rows).to_parquet(synthetic_dir / "manifest.parquet")
    return synthetic_dir
