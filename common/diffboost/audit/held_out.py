"""Variants of slices that a generator has not seen, by which those of its training are judged.

They are made by the parts that synthesis uses, with the sampler that a synthetic store names, and
marked: nothing may be trained on them.
"""

import functools
import json
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from monai.data import DataLoader, Dataset
from monai.engines import SupervisedEvaluator

from diffboost.audit.checks import lineage_leaks
from diffboost.conditions.prompts import augmentation_phrase
from diffboost.data.manifest import read_manifest
from diffboost.data.slices import SliceStore, slice_items
from diffboost.data.tables import write_table
from diffboost.files import write_aside
from diffboost.generation.lineage import copy_lineage
from diffboost.generation.provenance import facts_before
from diffboost.generation.sampling import VariantInferer
from diffboost.generation.synthesis import (
    VariantConditions,
    VariantPrepareBatch,
    load_generator,
    with_source_hashes,
)
from diffboost.generation.variant_facts import variant_facts, variant_settings
from diffboost.generation.variant_store import VariantBatches, VariantWriter, write_manifest
from diffboost.runs import move_into_place, refuse_other_run, resume_run

logger = logging.getLogger(__name__)

REASON = "made by the audit of memorization from a held-out slice; never to be trained on"
LICENSE = "none: to be looked at by the audit that made it"
SHARED = ("backbone", "seed", "noise_address", "batch_size")  # beside the sampler


def held_out_items(
    store: SliceStore, lineage: Mapping, fold: int, num_slices: int, ratio: int, min_area_px: int
) -> dict[str, list[dict]]:
    """Slices of cases that a generator has not seen, a variant each, by the part of the split.

    Args:
        store: the slice store.
        lineage: the generator's, as ``read_lineage`` gives it.
        fold: whose test and inner validation parts are taken.
        num_slices: at most, of each part, evenly spread over it.
        ratio: the variants' numbers, and with them the phrases, go round below it.
        min_area_px: slices with less foreground are left out.

    Returns:
        Part to items, as ``variant_items`` gives them but without ``seed``; parts that are empty or
        wholly seen are left out.

    Source: engineering choice (issue 5, "Memorization audit").
    """
    chosen = {}
    for part in ("test", "inner_validation"):
        rows = _part_rows(store, fold, part)
        seen = {leak.second for leak in lineage_leaks(lineage, rows, store.index)}
        rows = rows[~rows.case.isin(seen) & (rows.foreground_px >= min_area_px)]
        if rows.empty:
            continue
        items = slice_items(str(store.store_dir), fold, part, min_area_px)
        items = [item for item in items if item["case"] not in seen]
        items = with_source_hashes(str(store.store_dir), items)
        places = np.linspace(0, len(items) - 1, min(num_slices, len(items))).round().astype(int)
        chosen[part] = [
            {**items[place], "variant": n % ratio, "phrase": augmentation_phrase(n % ratio)}
            for n, place in enumerate(places)
        ]
    return chosen


def _part_rows(store: SliceStore, fold: int, part: str) -> pd.DataFrame:
    """The rows of a part that ``slice_items`` takes; none where the split has no such part."""
    try:
        cases = slice_items(str(store.store_dir), fold, part).cases()
    except ValueError as error:
        logger.warning("no held-out slices of part %s: %s", part, error)
        cases = []
    return store.index[store.index.case.isin(cases)]


def synthesize_held_out(
    manifest: pd.DataFrame,
    items: Sequence[dict],
    generator_dir: str | Path,
    output_dir: str | Path,
    image_size: int,
    device: str,
) -> pd.DataFrame:
    """Makes variants of held-out slices as a synthetic store's own were made.

    Args:
        manifest: of that store; its first row tells sampler, seed and prompt weights.
        items: what :func:`held_out_items` chose.
        generator_dir: the generator that made the store.
        output_dir: gets a synthetic store of its own; a finished one of the same settings is read.
        image_size: side in pixels.
        device: where the networks run.

    Returns:
        Its manifest: ``kept`` is False and ``reason`` says why.

    Raises:
        ValueError: the generator is not the one that made the store, or ``output_dir`` holds
            variants of another one.

    Source: engineering choice (issue 5, "Memorization audit").
    """
    row = manifest.iloc[0]
    told = {**facts_before(1, row.backbone_sha256), **manifest.head(1).to_dict("records")[0]}
    sampling = variant_settings({**told, "image_size": image_size})[1]
    facts = variant_facts(
        str(generator_dir),
        prompt_weights=json.loads(row.prompt_weights),
        image_size=image_size,
        license=LICENSE,
        purpose=REASON,
        negative_prompt=told["negative_prompt"],
        **sampling,
        **{name: told[name] for name in SHARED},
    )
    if facts["model_sha256"] != row.model_sha256:
        raise ValueError(
            f"generator_dir: {generator_dir} has a model.pt of hash {facts['model_sha256'][:12]}, "
            f"the synthetic store was made by {row.model_sha256[:12]}"
        )
    items = [{**item, "seed": facts["seed"]} for item in items]
    settings = {"facts": facts, "slices": [[i["case"], i["slice"], i["variant"]] for i in items]}
    output_dir, partial = Path(output_dir), Path(f"{output_dir}.partial")
    refuse_other_run(output_dir, settings)
    if not (output_dir / "manifest.parquet").is_file():
        resume_run(partial, settings)
        _run(items, facts, generator_dir, partial, device)
        copy_lineage(generator_dir, partial)
        write_manifest(str(partial), items, facts)
        marked = read_manifest(partial).assign(kept=False, reason=REASON)
        write_aside(partial / "manifest.parquet", functools.partial(write_table, table=marked))
        move_into_place(partial, output_dir, settings)
    return read_manifest(output_dir)


def _run(
    items: list[dict], facts: Mapping, generator_dir: str | Path, output_dir: Path, device: str
) -> None:
    """Denoises what is not there yet; the same engine and parts as the synthesis bundle's."""
    backbone = facts["backbone"]
    conditions, sampling = variant_settings(facts)
    conditions = VariantConditions(items, backbone, device=device, **conditions)
    batches = VariantBatches(items, facts["batch_size"], str(output_dir))
    evaluator = SupervisedEvaluator(
        device=torch.device(device),
        val_data_loader=DataLoader(Dataset(items, conditions), batch_sampler=batches),
        network=load_generator(str(generator_dir), backbone).to(device),
        inferer=VariantInferer(backbone, **sampling),
        prepare_batch=VariantPrepareBatch(),
        decollate=False,
        val_handlers=[VariantWriter(str(output_dir), items, facts)],
    )
    if len(batches):
        evaluator.run()
