"""The synthetic store: which process makes which batch, variants as files, and the manifest."""

import functools
import json
import logging
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
import pandas as pd
from ignite.engine import Engine, Events

from diffboost.data.addresses import ProcessBatches
from diffboost.data.documents import read_json
from diffboost.data.manifest import read_manifest
from diffboost.data.tables import write_table
from diffboost.files import sha256_of_files, write_aside
from diffboost.generation.provenance import (
    RUN_FACTS,
    VARIANT_FACTS,
    backbone_name,
    is_intact,
    is_whole,
    machine_facts,
    read_facts,
    variant_png,
)
from diffboost.processes import is_main_process, wait_for_processes
from diffboost.runs import RECORD, refuse_other_run, resume_run

logger = logging.getLogger(__name__)


def variant_file(case: str, slice_: int, variant: int) -> str:
    """Path of a variant inside its store."""
    return f"images/{case}_{slice_:04d}_{variant:03d}.png"


def _file_of(item: Mapping) -> str:
    return variant_file(item["case"], item["slice"], item["variant"])


def _told_names(facts: Mapping) -> dict[str, str]:
    """What files call backbone and decoder; a manifest has their paths."""
    return {name: backbone_name(facts[name]) for name in ("backbone", "decoder")}


def _placed(data: Sequence[dict], facts: Mapping) -> Iterator[tuple[dict, int]]:
    """Each item and its place in its batch."""
    return ((item, position % facts["batch_size"]) for position, item in enumerate(data))


def begin_store(output_dir: str, partial_dir: str, settings: Mapping[str, object]) -> None:
    """Start a synthetic store, take up an interrupted one, or extend a finished one.

    A finished store of the same settings, its ratio equal or smaller, gives its variants to the
    partial folder by hard links; it stays whole until the new store replaces it. A variant whose
    file is not the one of the manifest's hash is left out and made again.

    Args:
        output_dir: where the store belongs.
        partial_dir: where it is made.
        settings: what the run is.

    Raises:
        ValueError: one of the folders holds another run, such as one of a slice store that has
            changed since or whose contents an older version did not record, or more variants a
            slice.

    Source: engineering choice (issue 5, "Synthesis exactly once").
    """
    output, partial = Path(output_dir), Path(partial_dir)
    _refuse_other_store(output, settings)
    resume_run(partial, settings)
    _refuse_other_store(output, settings)  # one that was stopped while it was moved is there now
    if is_main_process():
        for path in partial.glob("images/*.partial"):
            path.unlink()
        if (output / RECORD).is_file():
            _take_up(output, partial)
    wait_for_processes()


def _refuse_other_store(output: Path, settings: Mapping) -> None:
    """Raises where a finished store cannot be extended to what is wanted."""
    record = output / RECORD
    ratio = settings["ratio"]
    if record.is_file():
        ratio = read_json(record, "output_dir").get("ratio", ratio)
    refuse_other_run(output, {**settings, "ratio": ratio})
    if ratio > settings["ratio"]:
        raise ValueError(
            f"ratio: {settings['ratio']}, but {output} has {ratio} variants a slice and a store "
            "loses none; keep it and give segmentation num_variants, or name another output_dir"
        )


def _take_up(finished: Path, partial: Path) -> None:
    """Links a finished store's variants into a partial folder."""
    manifest = read_manifest(finished, ["image", "sha256"])
    (partial / "images").mkdir(exist_ok=True)
    damaged, copied = [], 0
    for image, sha256 in zip(manifest.image, manifest.sha256, strict=True):
        source, target = finished / image, partial / image
        if target.exists():
            continue
        if not source.is_file() or sha256_of_files([source]) != sha256:
            damaged.append(image)
            continue
        try:
            os.link(source, target)
        except OSError:  # a file system without hard links
            write_aside(target, functools.partial(shutil.copyfile, source))
            copied += 1
    logger.info("%s: %d variants are there already, %d of them copied", finished,
                len(manifest) - len(damaged), copied)  # fmt: skip
    if damaged:
        logger.warning("%s: damaged or missing, made again: %s", finished, ", ".join(damaged))


class VariantBatches(ProcessBatches):
    """The batches whose files are not all there and intact: an interrupted run is taken up.

    Args:
        data: the variants' items.
        batch_size: variants a pass.
        output_dir: where :class:`VariantWriter` writes.

    Source: engineering choice.
    """

    def __init__(self, data: Sequence[dict], batch_size: int, output_dir: str) -> None:
        super().__init__(data, batch_size)
        folder = Path(output_dir)
        self.batches = [
            batch
            for batch in self.batches
            if not all(is_whole(folder / _file_of(data[i])) for i in batch)
        ]


class VariantWriter:
    """Writes each variant as 16-bit PNG that says how it was made; files in place stay as they are.

    A variant with NaN or infinite values stops the run (FloatingPointError) and is not written.

    Args:
        output_dir: the synthetic store.
        data: the variants' items, in the order of :class:`VariantBatches`.
        facts: what all variants share, see ``variant_facts``; written into every PNG beside what
            differs (case, slice, variant, prompt, phrase, place in the batch, edge, source) and
            what this machine is.

    Source: engineering choice (design, "Synthetic store").
    """

    def __init__(self, output_dir: str, data: Sequence[dict], facts: Mapping[str, object]) -> None:
        self.output_dir = Path(output_dir)
        self.facts = facts
        self.items = {
            (item["case"], item["slice"], item["variant"]): {**item, "batch_place": place}
            for item, place in _placed(data, facts)
        }
        (self.output_dir / "images").mkdir(parents=True, exist_ok=True)

    def attach(self, engine: Engine) -> None:
        """Listen to the evaluator."""
        engine.add_event_handler(Events.ITERATION_COMPLETED, self._write)

    def _write(self, engine: Engine) -> None:
        batch, predictions = engine.state.batch, engine.state.output["pred"]
        machine = machine_facts(predictions.device)
        images = predictions.float().cpu().numpy()
        keys = zip(batch["case"], batch["slice"].tolist(), batch["variant"].tolist(), strict=True)
        done = set()
        for key, image in zip(keys, images, strict=True):
            path = self.output_dir / variant_file(*key)
            if key in done or is_whole(path):  # a copy that fills the last batch, or made before
                continue
            done.add(key)
            _refuse_not_finite(image, key, self.facts["precision"])
            own = self.items[key] | {"edge_sha256": sha256_of_files([self.items[key]["edge"]])}
            facts = {name: own[name] for name in VARIANT_FACTS} | dict(self.facts) | machine
            data = variant_png(image[0], facts | _told_names(facts))
            write_aside(path, functools.partial(Path.write_bytes, data=data))


def _refuse_not_finite(image: np.ndarray, key: tuple[str, int, int], precision: str) -> None:
    """Raises FloatingPointError for an image that a file would show as black."""
    if not np.isfinite(image).all():
        case, slice_, variant = key
        raise FloatingPointError(
            f"variant {variant} of slice {slice_} of case {case} has NaN or infinite values, with "
            f"precision {precision}; it was not written. If the generator is sound, precision "
            "float32 is the safest of float32, bfloat16 and float16"
        )


def write_manifest(output_dir: str, data: Sequence[dict], facts: Mapping[str, object]) -> None:
    """Write ``manifest.parquet`` from what the files say, once all are there.

    Raises:
        FileNotFoundError: a variant has no file.
        ValueError: a file is damaged, or another variant than its name says.

    Source: engineering choice (design, "Synthetic store").
    """
    wait_for_processes()
    if not is_main_process():
        return
    rows, sha256_of_edge = [], functools.cache(sha256_of_files)
    for item, place in _placed(data, facts):
        path = Path(output_dir) / _file_of(item)
        if not path.is_file():
            raise FileNotFoundError(
                f"output_dir: {output_dir} lacks {_file_of(item)}; run synthesis again"
            )
        own = {"batch_place": place, "edge_sha256": sha256_of_edge((item["edge"],))}
        told = _told_by(path, {**facts, **item, **own, **_told_names(facts)})
        rows.append(
            {
                "image": _file_of(item),
                **{name: item[name] for name in ("case", "slice", "variant", "slicing")},
                "source_image": item["image"],
                **{name: _told_path(output_dir, item[name]) for name in ("edge", "label")},
                **{name: told[name] for name in ("prompt", "phrase")},
                "phrase_weight": json.loads(facts["prompt_weights"]).get("phrase", 0.0),
                **told,
                **{name: facts[name] for name in ("backbone", "decoder")},
                "sha256": sha256_of_files([path]),
                "kept": True,
                "reason": "",
            }
        )
    manifest = pd.DataFrame(rows)
    write_aside(
        Path(output_dir) / "manifest.parquet", functools.partial(write_table, table=manifest)
    )
    logger.info("%d variants in %s", len(rows), output_dir)


def _told_path(output_dir: str, path: str) -> str:
    """A path as the manifest tells it: relative to the store where it lies there."""
    inside = Path(path).is_relative_to(output_dir)
    return Path(path).relative_to(output_dir).as_posix() if inside else path


def _told_by(path: Path, expected: Mapping) -> dict:
    """The facts of a variant's file, which must be those of the variant."""
    data = path.read_bytes()
    told = read_facts(data) if is_intact(data) else None
    if told is None:
        raise ValueError(f"output_dir: {path} is damaged; run synthesis again")
    different = [n for n in (*VARIANT_FACTS, *RUN_FACTS) if told[n] != expected[n]]
    if different:
        raise ValueError(
            f"output_dir: {path} is another variant ({', '.join(different)} differ); remove it and "
            "run synthesis again"
        )
    return told
