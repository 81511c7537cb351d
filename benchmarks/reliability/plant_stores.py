"""What planted_leaks.py plants beside raw files: stores, their folds, lineages and manifests."""

import os
import shutil
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from PIL import Image
from plants import Plant

from diffboost.data.addresses import address_seed
from diffboost.data.slices import read_store
from diffboost.data.splits import assign_folds
from diffboost.files import sha256_of_files
from diffboost.generation.lineage import write_lineage


def join_stores(base: Path, part: Path, store_dir: Path) -> None:
    """A store of all cases of two, ``part``'s in place of those of the same name in ``base``.

    It holds what an audit reads: index, header, and images as hard links; no labels and edges.
    """
    (store_dir / "images").mkdir(parents=True)
    shutil.copyfile(base / "dataset.json", store_dir / "dataset.json")
    own, new = (pd.read_parquet(store / "index.parquet") for store in (base, part))
    own = own[~own.case.isin(new.case.unique())]
    for store, rows in ((base, own), (part, new)):
        for name in rows.image:
            os.link(store / name, store_dir / name)
    pd.concat([own, new], ignore_index=True).to_parquet(store_dir / "index.parquet")


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
    index["group"] = index.case.map(groups).fillna(index.case)
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
        write_lineage(place / "lineage.json", told)
        torch.save({"weight": torch.zeros(1)}, place / "model.pt")
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
            rows[-1] |= {"source_image": str(index.image[case])}
            rows[-1] |= {"source_sha256": index.source_sha256[case]}
            rows[-1]["lineage_sha256"] = sha256_of_files([folder / "lineage.json"])
    pd.DataFrame(rows).to_parquet(folder / "manifest.parquet")
