"""The synthetic store: which process makes which batch, variants as files, and the manifest."""

import functools
import json
import logging
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import pandas as pd
from ignite.engine import Engine, Events

from diffboost.data.addresses import ProcessBatches
from diffboost.data.slices import write_image
from diffboost.data.tables import write_table
from diffboost.handlers import write_aside
from diffboost.processes import is_main_process, wait_for_processes

logger = logging.getLogger(__name__)


def variant_file(case: str, slice_: int, variant: int) -> str:
    """Path of a variant inside its store."""
    return f"images/{case}_{slice_:04d}_{variant:03d}.png"


def _file_of(item: Mapping) -> str:
    return variant_file(item["case"], item["slice"], item["variant"])


def _placed(data: Sequence[dict], facts: Mapping) -> Iterator[tuple[dict, int]]:
    """Each item and its place in its batch."""
    return ((item, position % facts["batch_size"]) for position, item in enumerate(data))


class VariantBatches(ProcessBatches):
    """The batches whose files are not all there yet: an interrupted run is taken up.

    Args:
        data: the variants' items.
        batch_size: variants a pass.
        output_dir: where :class:`VariantWriter` writes.

    Source: engineering choice.
    """

    def __init__(self, data: Sequence[dict], batch_size: int, output_dir: str) -> None:
        super().__init__(data, batch_size)
        files = [Path(output_dir) / _file_of(item) for item in data]
        self.batches = [
            batch for batch in self.batches if not all(files[i].is_file() for i in batch)
        ]


class VariantWriter:
    """Writes each variant as 16-bit PNG that says how it was made.

    Args:
        output_dir: the synthetic store.
        data: the variants' items, in the order of :class:`VariantBatches`.
        facts: written into every PNG, beside what differs: case, slice, variant, prompt, phrase and
            the place in the batch.

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
        batch, images = engine.state.batch, engine.state.output["pred"].float().cpu().numpy()
        keys = zip(batch["case"], batch["slice"].tolist(), batch["variant"].tolist(), strict=True)
        done = set()
        for key, image in zip(keys, images, strict=True):
            if key in done:  # a copy that fills the last batch
                continue
            done.add(key)
            names = ("case", "slice", "variant", "prompt", "phrase", "batch_place")
            facts = {name: self.items[key][name] for name in names} | dict(self.facts)
            text = {f"diffboost:{name}": value for name, value in facts.items()}
            write_aside(
                self.output_dir / variant_file(*key),
                functools.partial(write_image, image=image[0], text=text),
            )


def write_manifest(output_dir: str, data: Sequence[dict], facts: Mapping[str, object]) -> None:
    """Write ``manifest.parquet``, a row a variant, once every file is there.

    Raises:
        FileNotFoundError: a variant has no file.

    Source: engineering choice (design, "Synthetic store").
    """
    wait_for_processes()
    if not is_main_process():
        return
    rows = []
    for item, place in _placed(data, facts):
        image = _file_of(item)
        if not (Path(output_dir) / image).is_file():
            raise FileNotFoundError(f"output_dir: {output_dir} lacks {image}; run synthesis again")
        rows.append(
            {
                "image": image,
                **{name: item[name] for name in ("case", "slice", "variant", "label")},
                "source_image": item["image"],
                "edge": item["edge"],
                **{name: item[name] for name in ("prompt", "phrase")},
                "phrase_weight": json.loads(facts["prompt_weights"]).get("phrase", 0.0),
                "batch_place": place,
                **facts,
                "kept": True,
                "reason": "",
            }
        )
    manifest = pd.DataFrame(rows)
    write_aside(
        Path(output_dir) / "manifest.parquet", functools.partial(write_table, table=manifest)
    )
    logger.info("%d variants in %s", len(rows), output_dir)
