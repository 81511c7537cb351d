"""Kinds of input for fuzz_inputs.py: how a valid one is made, and the stage that reads it."""

import hashlib
import json
import os
import tarfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import damages
import numpy as np
import pandas as pd
import pyarrow as pa
import torch
import yaml
from damages import BYTES, LINK, PLACES, Damage
from monai.apps import DecathlonDataset
from PIL import Image
from safetensors.torch import save_file
from torch import nn

from diffboost.audit.checks import variant_leaks
from diffboost.data.downloads import decathlon_folder
from diffboost.data.images import read_image
from diffboost.data.loading import CaseDataset, TreeBatches
from diffboost.data.slices import case_items, read_store, sha256_of_files, slice_items, write_image
from diffboost.data.sources import read_source
from diffboost.data.tables import write_table
from diffboost.data.tasks import read_task
from diffboost.data.transforms import LoadSliced
from diffboost.data.tree import PngChecks, scan_tree
from diffboost.data.weights import load_weights
from diffboost.experiments import read_experiment
from diffboost.generation import lineage as lineages
from diffboost.generation.backbones import load_part
from diffboost.generation.cache import CachedItems
from diffboost.generation.creation import create_backbone
from diffboost.generation.pix2pix import EdgeTranslator, load_translator
from diffboost.generation.synthesis import read_generator
from diffboost.handlers import save_weights
from diffboost.prepare import prepare
from diffboost.results import load_metrics
from diffboost.segmentation.merging import variants_by_slice

SIZE = 16
SPLEEN = "Task09_Spleen"
VOLUMES = {"name": "fuzz", "layout": "decathlon", "labels": {"box": [1]}, "download": SPLEEN}
PICTURES = {"name": "fuzz", "layout": "pairs", "labels": {"box": [1]}}
EDITS = [*BYTES, *PLACES]


@dataclass(frozen=True)
class Kind:
    """A kind of input.

    ``files``: pattern of files -> damages. ``free``: patterns of files whose format has no
    checksum, or that a person writes: what is changed in them without being hostile says something
    else, and nobody can know. ``read`` gives what was understood, name -> value, and what was
    rejected, (file, reason).
    """

    name: str
    make: Callable[[Path], None]
    files: Mapping[str, list[Damage]]
    read: Callable[[Path, Path], tuple[dict, list]]
    weight: int = 1
    free: tuple[str, ...] = ()


def told(value: object) -> str:
    """Hash of what was understood, whatever it is made of."""
    digest = hashlib.sha256()

    def add(part: object) -> None:
        if isinstance(part, torch.Tensor):
            part = part.detach().cpu().numpy()
        if isinstance(part, np.ndarray):
            digest.update(
                f"{part.dtype}{part.shape}".encode() + np.ascontiguousarray(part).tobytes()
            )
        elif isinstance(part, Mapping):
            for name in sorted(part, key=str):
                digest.update(f"{name}:".encode())
                add(part[name])
        elif isinstance(part, list | tuple):
            digest.update(b"[")
            for inner in part:
                add(inner)
        elif isinstance(part, pa.Table | pd.DataFrame):
            add(part.to_pydict() if isinstance(part, pa.Table) else part.to_dict("list"))
        else:
            digest.update(f"{type(part).__name__}{part!r}|".encode())

    add(value)
    return digest.hexdigest()


# Raw data


def _make_volumes(suffix: str) -> Callable[[Path], None]:
    def make(folder: Path) -> None:
        entries = []
        for number in range(3):
            names = [f"{kind}Tr/case_{number}{suffix}" for kind in ("images", "labels")]
            for name, label in zip(names, (False, True), strict=True):
                damages.volume(folder / name, number, label)
            entries.append(dict(zip(("image", "label"), names, strict=True)))
        document = {"name": "Small", "training": entries, "numTraining": 3}
        (folder / "dataset.json").write_text(json.dumps(document))

    return make


def _make_pictures(suffix: str, places: Callable[[int], tuple[str, str]]) -> Callable[[Path], None]:
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


def _read_raw(task: dict) -> Callable[[Path, Path], tuple[dict, list]]:
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


def _read_whole(task: dict) -> Callable[[Path, Path], tuple[dict, list]]:
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


def _read_tree(folder: Path, output: Path) -> tuple[dict, list]:
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


def _make_task(folder: Path) -> None:
    task = {
        **VOLUMES,
        "modality": "MR",
        "organ": "head",
        "intensity": {"policy": "range", "low": 0, "high": 9},
    }
    (folder / "task.yaml").write_text(yaml.safe_dump(task, sort_keys=False))


def _make_experiment(folder: Path) -> None:
    experiment = {
        "name": "fuzz", "task": "phantom_organ", "dataset_dir": "phantoms", "image_size": 64,
        "folds": [0], "seeds": [0], "arms": ["baseline", "diffboost"], "finetune": {"epochs": 3},
        "synthesis": {"ratio": 2}, "segmentation": {"epochs": 2, "alpha": [0.4, 0.6]},
    }  # fmt: skip
    (folder / "experiment.yaml").write_text(yaml.safe_dump(experiment, sort_keys=False))


# Stores


def _make_store(folder: Path) -> None:
    source = folder / "raw"
    _make_volumes(".nii")(source)
    prepare(source, folder / "store", VOLUMES, SIZE, edges="gradient", num_folds=3)
    header = json.loads((folder / "store/dataset.json").read_text())
    header["source_dir"] = "../raw"  # may be changed when folders move
    (folder / "store/dataset.json").write_text(json.dumps(header, indent=1))


def _read_slices(folder: Path, output: Path) -> tuple[dict, list]:
    store_dir = folder / "store"
    load = LoadSliced(["image", "label", "edge"], allow_missing_keys=True)
    store = read_store(store_dir)
    items = slice_items(store_dir, 0, "all")
    good = {f"{item['case']} {item['slice']}": _of(folder, load(item)) for item in items}
    good["header"] = {key: value for key, value in store.header.items() if key != "digest"}
    good["index"] = store.index
    good["parts"] = [
        sorted(item["case"] for item in case_items(store_dir, fold, "test")) for fold in range(3)
    ]
    return good, []


def _of(folder: Path, item: dict) -> dict:
    """An item without the case's own folder in it."""
    return {key: v for key, v in item.items() if not (isinstance(v, str) and str(folder) in v)}


def _make_synthetic(folder: Path) -> None:
    _make_store(folder)
    synthetic = folder / "synthetic"
    (synthetic / "images").mkdir(parents=True)
    lineages.write_lineage(
        synthetic / "lineage.json",
        {"store": "fuzz", "fold": 0, "cases": {"case_1": "ab" * 32}, "ancestors": []},
    )
    rows = []
    for item in slice_items(folder / "store", 0, "all"):
        for variant in range(2):
            name = f"images/{item['case']}_{item['slice']:04d}_{variant:03d}.png"
            pixels = np.random.RandomState(variant).rand(SIZE, SIZE) * 2 - 1
            write_image(synthetic / name, pixels, {"diffboost:case": item["case"]})
            rows.append({
                "image": name, "case": item["case"], "slice": item["slice"], "variant": variant,
                "source_image": Path(item["image"]).name, "kept": True, "reason": "",
                "lineage_sha256": sha256_of_files([synthetic / "lineage.json"]),
            })  # fmt: skip
    write_table(synthetic / "manifest.parquet", pd.DataFrame(rows))


def _read_synthetic(folder: Path, output: Path) -> tuple[dict, list]:
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


def _make_lineage(folder: Path) -> None:
    table = pa.table({"case": [f"case_{n}" for n in range(50)], "sha256": ["cd" * 32] * 50})
    first = {"store": "tree", "fold": None, "seed": 0, "cases": table, "ancestors": []}
    second = {"store": "fuzz", "fold": 0, "seed": 0, "cases": {"a": "ab" * 32, "b": "ef" * 32}}
    lineages.write_lineage(folder / "lineage.json", {**second, "ancestors": [first]})


# Weights


def _network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.Conv2d(4, 2, 1))


def _make_weights(folder: Path) -> None:
    network = _network()
    save_weights(network, folder / "model.pt")
    torch.save(network.state_dict(), folder / "legacy.pth", _use_new_zipfile_serialization=False)
    save_file(network.state_dict(), folder / "model.safetensors")


def _read_weights(folder: Path, output: Path) -> tuple[dict, list]:
    good = {}
    for name in ("model.pt", "legacy.pth", "model.safetensors"):
        network = _network()
        load_weights(network, folder / name)
        good[name] = network.state_dict()
    return good, []


def _make_translator(folder: Path) -> None:
    torch.manual_seed(0)
    save_weights(EdgeTranslator([4, 8, 8]), folder / "model.pt")
    (folder / "run.json").write_text(
        json.dumps({"channels": [4, 8, 8], "discriminator_channels": 4})
    )


def _make_generator(folder: Path) -> None:
    torch.manual_seed(0)
    save_weights(_network(), folder / "model.pt")
    document = {"store": "fuzz", "fold": 0, "train_base": False, "cases": {"a": "ab" * 32}}
    lineages.write_lineage(folder / "lineage.json", {**document, "ancestors": []})


def _read_generator(folder: Path, output: Path) -> tuple[dict, list]:
    facts = read_generator(str(folder))
    network = _network()
    load_weights(network, folder / "model.pt")
    hashes = ("model_sha256", "lineage_sha256")
    return {k: v for k, v in facts.items() if k not in hashes} | network.state_dict(), []


def _make_backbone(folder: Path) -> None:
    create_backbone(
        str(folder / "backbone"), image_size=32, autoencoder_channels=[8, 8], autoencoder_layers=1,
        latent_channels=4, unet_channels=[16, 16], unet_layers=1, attention_heads=2,
        hint_channels=[8, 8], zero_convolution_std=0.0, text_width=16, text_layers=1,
        max_tokens=12, vocab_size=600, seed=0,
    )  # fmt: skip


def _read_backbone(folder: Path, output: Path) -> tuple[dict, list]:
    good = {}
    for part in ("vae", "text_encoder", "tokenizer", "scheduler"):
        loaded = load_part(str(folder / "backbone"), part)
        if isinstance(loaded, nn.Module):
            good[part] = loaded.state_dict()
        elif part == "scheduler":
            good[part] = dict(loaded.config)
        else:
            good[part] = loaded("MR, head, lesion").input_ids
    return good, []


# Archives, caches, results


def _make_archive(folder: Path) -> None:
    raw = folder / "made" / SPLEEN
    _make_volumes(".nii.gz")(raw)
    with tarfile.open(folder / f"{SPLEEN}.tar", "w") as tar:
        tar.add(raw, SPLEEN)
    (folder / "md5").write_text(hashlib.md5((folder / f"{SPLEEN}.tar").read_bytes()).hexdigest())


def _read_archive(folder: Path, output: Path) -> tuple[dict, list]:
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


def _make_cache(folder: Path) -> None:
    rng = np.random.RandomState(0)
    np.save(folder / "moments.npy", rng.rand(3, 1, 8, 2, 2).astype(np.float16))
    np.save(folder / "edges.npy", rng.randint(0, 255, (3, 1, 1, 8, 8)).astype(np.uint8))
    np.save(folder / "contexts.npy", rng.rand(2, 4, 4).astype(np.float32))
    np.save(folder / "rows.npy", np.array([1, 1, 1], np.int32))


def _read_cache(folder: Path, output: Path) -> tuple[dict, list]:
    items = CachedItems(folder)
    return {str(number): items[number] for number in range(len(items))}, []


def _make_results(folder: Path) -> None:
    rows = [
        {"arm": "baseline", "fold": 0, "seed": 0, "case": f"c{n}", "label": "box", "metric": "dice",
         "value": 0.5, "knob": "", "knob_value": ""} for n in range(4)
    ]  # fmt: skip
    pd.DataFrame(rows).to_csv(folder / "metrics.csv", index=False)


JSONS = [*EDITS, LINK, *damages.JSON_DAMAGES]
NIFTI = [*EDITS, LINK, *damages.VOLUME_DAMAGES]
LISTED = [*BYTES, *PLACES[:-1], LINK, *damages.PICTURE_DAMAGES]  # by the folder itself
PNG = [*LISTED, PLACES[-1]]
TABLES = [*EDITS, *damages.TABLE_DAMAGES]
BUSI = _make_pictures(".png", lambda n: (f"benign/a ({n})", f"benign/a ({n})_mask"))
KINDS = [
    Kind("volumes, .nii.gz", _make_volumes(".nii.gz"),
         {"*Tr/*": [*NIFTI, damages.GZIP_BOMB]}, _read_raw(VOLUMES), 4),
    Kind("volumes, .nii", _make_volumes(".nii"), {"*Tr/*": NIFTI}, _read_raw(VOLUMES), 2,
         free=("*Tr/*",)),
    Kind("datalist", _make_volumes(".nii"), {"dataset.json": [*JSONS, damages.JSON_ESCAPE]},
         _read_raw(VOLUMES), 2, free=("dataset.json",)),
    Kind("pairs of PNG", BUSI, {"benign/*": LISTED}, _read_raw(PICTURES), 3),
    Kind("pairs of JPEG", _make_pictures(".jpg", lambda n: (f"a{n}", f"a{n}_mask")),
         {"*.jpg": LISTED}, _read_raw(PICTURES), 1, free=("*.jpg",)),
    Kind("pairs of TIFF", _make_pictures(".tif", lambda n: (f"a{n}", f"a{n}_mask")),
         {"*.tif": LISTED}, _read_raw(PICTURES), 1, free=("*.tif",)),
    Kind("whole prepare", _make_volumes(".nii.gz"), {"*Tr/*": NIFTI}, _read_whole(VOLUMES), 1),
    Kind("tree", _make_pictures(".png", lambda n: (f"MR/head/finding/a{n}", "")),
         {"MR/*/*/*": LISTED}, _read_tree, 3),
    Kind("task file", _make_task, {"task.yaml": [*EDITS, *damages.YAML_DAMAGES]},
         lambda folder, output: (read_task(folder / "task.yaml"), []), 2, free=("task.yaml",)),
    Kind("experiment file", _make_experiment, {"experiment.yaml": [*EDITS, *damages.YAML_DAMAGES]},
         lambda folder, output: (vars(read_experiment(folder / "experiment.yaml")), []), 1,
         free=("experiment.yaml",)),
    Kind("slice store, pictures", _make_store,
         {"store/images/*": PNG, "store/labels/*": PNG, "store/edges/*": PNG}, _read_slices, 3),
    Kind("slice store, header", _make_store, {"store/dataset.json": JSONS}, _read_slices, 2),
    Kind("slice store, index", _make_store, {"store/index.parquet": TABLES}, _read_slices, 4),
    Kind("slice store, its sources", _make_store, {"raw/*Tr/*": NIFTI}, _read_slices, 2),
    Kind("synthetic store, manifest", _make_synthetic, {"synthetic/manifest.parquet": TABLES},
         _read_synthetic, 4),
    Kind("synthetic store, pictures", _make_synthetic,
         {"synthetic/images/*": [*PNG, damages.TEXT_BOMB]}, _read_synthetic, 3),
    Kind("synthetic store, lineage", _make_synthetic, {"synthetic/lineage.json": JSONS},
         _read_synthetic, 2),
    Kind("lineage with a table", _make_lineage,
         {"lineage.json": [*JSONS, damages.JSON_ESCAPE], "lineage_cases*": EDITS},
         lambda folder, output: (lineages.read_lineage(folder / "lineage.json"), []), 2),
    Kind("weights", _make_weights,
         {"model.pt": [*EDITS, *damages.TORCH_DAMAGES], "legacy.pth": [*EDITS, *damages.PICKLES],
          "*.safetensors": [*EDITS, *damages.TENSOR_DAMAGES]}, _read_weights, 4,
         free=("*.safetensors", "legacy.pth")),
    Kind("Pix2Pix", _make_translator,
         {"model.pt": [*EDITS, *damages.TORCH_DAMAGES], "run.json": JSONS},
         lambda folder, output: (load_translator(str(folder)).state_dict(), []), 2),
    Kind("generator", _make_generator,
         {"model.pt": [*EDITS, *damages.TORCH_DAMAGES], "lineage.json": JSONS}, _read_generator, 2),
    Kind("backbone", _make_backbone,
         {"backbone/vae/*": [*EDITS, *damages.PICKLES], "backbone/*/*.json": JSONS,
          "backbone/text_encoder/*": EDITS}, _read_backbone, 2, free=("backbone/*/*",)),
    Kind("archive", _make_archive, {"*.tar": [*EDITS, *damages.ARCHIVE_DAMAGES]}, _read_archive, 2),
    Kind("cache", _make_cache, {"*.npy": [*EDITS, *damages.PICKLES]}, _read_cache, 1,
         free=("*.npy",)),
    Kind("results", _make_results, {"metrics.csv": [*EDITS, *damages.CSV_DAMAGES]},
         lambda folder, output: ({"rows": load_metrics(folder / "metrics.csv")}, []), 1,
         free=("metrics.csv",)),
]  # fmt: skip
