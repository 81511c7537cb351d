"""Valid inputs for fuzz_inputs.py, and the stages that read them.

A ``make_`` writes into a folder; a ``read_`` gives what was understood, name -> value, and what was
rejected, (file, reason).
"""

import hashlib
import json
import os
import tarfile
from collections.abc import Callable
from pathlib import Path

import attacks
import numpy as np
import pandas as pd
import pyarrow as pa
import yaml
from monai.apps import DecathlonDataset
from PIL import Image

from diffboost.audit.checks import variant_leaks
from diffboost.data.downloads import decathlon_folder
from diffboost.data.images import read_image
from diffboost.data.loading import CaseDataset, TreeBatches
from diffboost.data.slices import case_items, read_store, slice_items, write_image
from diffboost.data.sources import read_source
from diffboost.data.tables import write_table
from diffboost.data.tasks import read_task
from diffboost.data.transforms import LoadSliced
from diffboost.data.tree import PngChecks, scan_tree
from diffboost.experiments import read_experiment
from diffboost.files import sha256_of_files
from diffboost.generation import lineage as lineages
from diffboost.generation.cache import CachedItems
from diffboost.generation.synthesis import with_source_hashes
from diffboost.prepare import prepare
from diffboost.results import load_metrics
from diffboost.segmentation.merging import variants_by_slice

SIZE = 16
SPLEEN = "Task09_Spleen"
VOLUMES = {"name": "fuzz", "layout": "decathlon", "labels": {"box": [1]}, "download": SPLEEN}
PICTURES = {"name": "fuzz", "layout": "pairs", "labels": {"box": [1]}}


# Raw data


def make_volumes(suffix: str) -> Callable[[Path], None]:
    def make(folder: Path) -> None:
        entries = []
        for number in range(3):
            names = [f"{kind}Tr/case_{number}{suffix}" for kind in ("images", "labels")]
            for name, label in zip(names, (False, True), strict=True):
                attacks.volume(folder / name, number, label)
            entries.append(dict(zip(("image", "label"), names, strict=True)))
        document = {"name": "Small", "training": entries, "numTraining": 3}
        (folder / "dataset.json").write_text(json.dumps(document))

    return make


def make_pictures(suffix: str, places: Callable[[int], tuple[str, str]]) -> Callable[[Path], None]:
    def make(folder: Path) -> None:
        for number in range(3):
            rng = np.random.RandomState(number)
            mask = np.zeros((20, 24), np.uint8)
            mask[5:12, 6:15] = 255
            image = (rng.randint(20, 90, mask.shape) + mask // 2).astype(np.uint8)
            for name, pixels in zip(places(number), (image, mask), strict=True):
                if name:
                    (folder / name).parent.mkdir(parents=True, exist_ok=True)
                    Image.fromarray(pixels).save(folder / f"{name}{suffix}")

    return make


def read_raw(task: dict) -> Callable[[Path, Path], tuple[dict, list]]:
    def read(folder: Path, output: Path) -> tuple[dict, list]:
        full = read_task(task)
        source = read_source(folder, full)
        loaded = CaseDataset(source.cases, full, SIZE)
        results = {case.name: loaded[number] for number, case in enumerate(source.cases)}
        bad = [(name, found) for name, found in results.items() if isinstance(found, str)]
        good = {name: vars(found) for name, found in results.items() if not isinstance(found, str)}
        good = {
            name: [v for k, v in facts.items() if k != "sha256"] for name, facts in good.items()
        }
        return good, [*source.rejected, *bad]

    return read


def read_whole(task: dict) -> Callable[[Path, Path], tuple[dict, list]]:
    """The whole stage: its store, and rejected.csv."""

    def read(folder: Path, output: Path) -> tuple[dict, list]:
        knobs = {"edges": "gradient", "num_folds": 1, "max_rejected_fraction": 0.7}
        store = read_store(prepare(folder, output / "store", task, SIZE, **knobs))
        rejected = pd.read_csv(store.store_dir / "rejected.csv").to_numpy().tolist()
        rows = {}
        for row in store.index.to_dict("records"):
            rows.setdefault(row["case"], []).append(
                [row["sha256"], row["prompt"], row["foreground_px"]]
            )
        return rows, rejected

    return read


def read_tree(folder: Path, output: Path) -> tuple[dict, list]:
    paths, rejected = scan_tree(folder)
    checked = dict(zip(paths, PngChecks(folder, paths, 99)[0], strict=True))
    rejected += [(path, found) for path, found in checked.items() if isinstance(found, str)]
    good = [path for path, found in checked.items() if not isinstance(found, str)]
    if not good:
        return {}, rejected
    batch = TreeBatches(folder, pa.chunked_array([pa.array(good)]), [0], 99, SIZE)[0]
    rejected += [(path, image) for path, image in batch if isinstance(image, str)]
    return {path: image for path, image in batch if not isinstance(image, str)}, rejected


# Documents that a person writes


def make_task(folder: Path) -> None:
    task = {
        **VOLUMES,
        "modality": "MR",
        "organ": "head",
        "intensity": {"policy": "range", "low": 0, "high": 9},
    }
    (folder / "task.yaml").write_text(yaml.safe_dump(task, sort_keys=False))


def make_experiment(folder: Path) -> None:
    experiment = {
        "name": "fuzz", "task": "phantom_organ", "dataset_dir": "phantoms", "image_size": 64,
        "folds": [0], "seeds": [0], "arms": ["baseline", "diffboost"], "finetune": {"epochs": 3},
        "synthesis": {"ratio": 2}, "segmentation": {"epochs": 2, "alpha": [0.4, 0.6]},
    }  # fmt: skip
    (folder / "experiment.yaml").write_text(yaml.safe_dump(experiment, sort_keys=False))


# Stores


def make_store(folder: Path) -> None:
    source = folder / "raw"
    make_volumes(".nii")(source)
    prepare(source, folder / "store", VOLUMES, SIZE, edges="gradient", num_folds=3)
    header = json.loads((folder / "store/dataset.json").read_text())
    header["source_dir"] = "../raw"  # may be changed when folders move
    (folder / "store/dataset.json").write_text(json.dumps(header, indent=1))


def read_slices(folder: Path, output: Path) -> tuple[dict, list]:
    store_dir = folder / "store"
    load = LoadSliced(["image", "label", "edge"], allow_missing_keys=True)
    store = read_store(store_dir)
    items = slice_items(store_dir, 0, "all")
    good = {f"{item['case']} {item['slice']}": of(folder, load(item)) for item in items}
    good["header"] = {key: value for key, value in store.header.items() if key != "digest"}
    good["index"] = store.index
    good["parts"] = [
        sorted(item["case"] for item in case_items(store_dir, fold, "test")) for fold in range(3)
    ]
    return good, []


def of(folder: Path, item: dict) -> dict:
    """An item without the case's own folder in it."""
    return {key: v for key, v in item.items() if not (isinstance(v, str) and str(folder) in v)}


def make_synthetic(folder: Path) -> None:
    make_store(folder)
    synthetic = folder / "synthetic"
    (synthetic / "images").mkdir(parents=True)
    lineages.write_lineage(
        synthetic / "lineage.json",
        {"store": "fuzz", "fold": 0, "cases": {"case_1": "ab" * 32}, "ancestors": []},
    )
    rows = []
    for item in with_source_hashes(folder / "store", slice_items(folder / "store", 0, "all")):
        for variant in range(2):
            name = f"images/{item['case']}_{item['slice']:04d}_{variant:03d}.png"
            pixels = np.random.RandomState(variant).rand(SIZE, SIZE) * 2 - 1
            write_image(synthetic / name, pixels, {"diffboost:case": item["case"]})
            rows.append({
                "image": name, "case": item["case"], "slice": item["slice"], "variant": variant,
                "source_image": Path(item["image"]).name, "kept": True, "reason": "",
                "lineage_sha256": sha256_of_files([synthetic / "lineage.json"]),
                "source_sha256": item["source_sha256"],
            })  # fmt: skip
    write_table(synthetic / "manifest.parquet", pd.DataFrame(rows))


def read_synthetic(folder: Path, output: Path) -> tuple[dict, list]:
    synthetic = folder / "synthetic"
    store = read_store(folder / "store")
    found = variants_by_slice(synthetic)
    load = LoadSliced("synthetic")
    good = {}
    for place, paths in found.items():
        loaded = [load({"synthetic": path})["synthetic"] for path in paths]
        texts = [getattr(read_image(path, "variant"), "text", {}) for path in paths]
        good[str(place)] = [[Path(path).name for path in paths], loaded, texts]
    held_out = store.index[store.index.fold == 0]
    good["leaks"] = [str(leak) for leak in variant_leaks(synthetic, held_out, store.index)]
    good["lineage"] = lineages.read_lineage(synthetic / "lineage.json")
    return good, []


def make_lineage(folder: Path) -> None:
    table = pa.table({"case": [f"case_{n}" for n in range(50)], "sha256": ["cd" * 32] * 50})
    first = {"store": "tree", "fold": None, "seed": 0, "cases": table, "ancestors": []}
    second = {"store": "fuzz", "fold": 0, "seed": 0, "cases": {"a": "ab" * 32, "b": "ef" * 32}}
    lineages.write_lineage(folder / "lineage.json", {**second, "ancestors": [first]})


# Archives, caches, results


def make_archive(folder: Path) -> None:
    raw = folder / "made" / SPLEEN
    make_volumes(".nii.gz")(raw)
    with tarfile.open(folder / f"{SPLEEN}.tar", "w") as tar:
        tar.add(raw, SPLEEN)
    (folder / "md5").write_text(hashlib.md5((folder / f"{SPLEEN}.tar").read_bytes()).hexdigest())


def read_archive(folder: Path, output: Path) -> tuple[dict, list]:
    """Unpacks an archive whose MD5 the attacker knows where the damage is hostile."""
    archive = output / f"{SPLEEN}.tar"
    if (folder / archive.name).is_file() or (folder / archive.name).is_fifo():
        os.link(folder / archive.name, archive)
    else:
        archive.mkdir()
    hostile = (folder / "hostile").exists()
    content = archive.read_bytes() if hostile else b""
    expected = hashlib.md5(content).hexdigest() if hostile else (folder / "md5").read_text()
    DecathlonDataset.md5[SPLEEN] = expected
    place = decathlon_folder(output / SPLEEN, read_task(VOLUMES), download=True)
    files = sorted(path for path in place.rglob("*") if path.is_file())
    return {str(path.relative_to(place)): path.read_bytes() for path in files}, []


def make_cache(folder: Path) -> None:
    rng = np.random.RandomState(0)
    np.save(folder / "moments.npy", rng.rand(3, 1, 8, 2, 2).astype(np.float16))
    np.save(folder / "edges.npy", rng.randint(0, 255, (3, 1, 1, 8, 8)).astype(np.uint8))
    np.save(folder / "contexts.npy", rng.rand(2, 4, 4).astype(np.float32))
    np.save(folder / "rows.npy", np.array([1, 1, 1], np.int32))


def read_cache(folder: Path, output: Path) -> tuple[dict, list]:
    items = CachedItems(folder)
    return {str(number): items[number] for number in range(len(items))}, []


def make_results(folder: Path) -> None:
    rows = [
        {"arm": "baseline", "fold": 0, "seed": 0, "case": f"c{n}", "label": "box", "metric": "dice",
         "value": 0.5, "knob": "", "knob_value": ""} for n in range(4)
    ]  # fmt: skip
    pd.DataFrame(rows).to_csv(folder / "metrics.csv", index=False)


def read_results(folder: Path, output: Path) -> tuple[dict, list]:
    return {"rows": load_metrics(folder / "metrics.csv")}, []


def read_task_file(folder: Path, output: Path) -> tuple[dict, list]:
    return read_task(folder / "task.yaml"), []


def read_experiment_file(folder: Path, output: Path) -> tuple[dict, list]:
    return vars(read_experiment(folder / "experiment.yaml")), []


def read_lineage_file(folder: Path, output: Path) -> tuple[dict, list]:
    return lineages.read_lineage(folder / "lineage.json"), []
