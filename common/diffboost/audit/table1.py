"""Table 1: the generator against Pix2Pix on held-out images; figures, and a picture of both."""

import logging
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd
from ignite.engine import Engine, Events
from matplotlib.figure import Figure

from diffboost.audit.checks import lineage_leaks
from diffboost.audit.image_quality import (
    METRICS,
    aggregate_quality,
    measure_image_quality,
    scale_weights,
)
from diffboost.data.addresses import ProcessBatches, address_seed
from diffboost.data.slices import read_store, slice_items, write_image
from diffboost.data.tables import read_csv
from diffboost.data.transforms import LoadSliced
from diffboost.files import sha256_of_files, write_aside
from diffboost.generation.backbones import backbone_sha256, has_part, resolve_backbone
from diffboost.generation.lineage import read_lineage
from diffboost.generation.pix2pix import load_translator
from diffboost.generation.schedulers import refuse_other_scheduler
from diffboost.generation.synthesis import read_generator, refuse_other_backbone
from diffboost.processes import is_main_process, wait_for_processes
from diffboost.records import same_command_goes_on

logger = logging.getLogger(__name__)

METHODS = ("Pix2Pix", "Ours")
# Table 1 of the paper: mean and standard deviation of MAE, MSE, RMSE, SSIM, MS-SSIM.
PAPER = {
    "Pix2Pix": (
        (0.1469, 0.0556), (0.0538, 0.0366), (0.2219, 0.0676), (0.4583, 0.1105), (0.5325, 0.1557)
    ),
    "Ours": (
        (0.0873, 0.0363), (0.0229, 0.0163), (0.1441, 0.0463), (0.6356, 0.1252), (0.6666, 0.1491)
    ),
}  # fmt: skip


def held_out_items(store_dir: str, part: str, num_images: int | None, seed: int) -> list[dict]:
    """The images to compare on, drawn by seed, each as a variant 0 with its plain prompt.

    Args:
        store_dir: the slice store.
        part: of fold 0; ``test`` is what no training saw.
        num_images: images at most; None takes all.
        seed: draws the images, and is the address of their noise with case and slice.

    Raises:
        ValueError: ``num_images`` is below 1, or the store holds no image out.

    Source: paper Sec. 4.1; one image each with a plain prompt as in facts 37.
    """
    if num_images is not None and num_images < 1:
        raise ValueError(f"num_images: {num_images} is not 1 or more; null takes all")
    store = read_store(store_dir)
    index = store.columns(["section", "fold"])
    if part == "test" and index.fold.nunique() < 2 and not (index.section == "test").any():
        raise ValueError(
            f"part: 'test', but {store.store_dir} holds no image out; prepare a new store with "
            "validation_fraction above 0 (a tree) or num_folds above 1 (a task)"
        )
    data = slice_items(store_dir, fold=0, part=part, inner_fraction=0)
    hashes = {
        row["case"]: {"source_sha256": row["sha256"], "image_sha256": row["image_sha256"]}
        for row in data.case_hashes().to_pylist()
    }
    order = np.random.RandomState(address_seed(seed, "held-out images")).permutation(len(data))
    chosen = [data[int(number)] for number in np.sort(order[:num_images])]
    extra = {"variant": 0, "phrase": "", "seed": seed}
    return [item | extra | hashes[item["case"]] for item in chosen]


def compared_models(
    generator_dir: str | None, pix2pix_dir: str, backbone: str, scheduler: str
) -> dict:
    """Hashes of the two models, once it is sure that both are there and fit.

    Args:
        generator_dir: folder of the generator; None is the backbone's own branch.
        pix2pix_dir: folder of the Pix2Pix model.
        backbone: what the generator was trained on.
        scheduler: that is to sample the generator.

    Raises:
        FileNotFoundError: a folder lacks a file.
        ValueError: the generator was trained on another backbone, the backbone has no branch, or
            the scheduler does not fit.

    Source: engineering choice.
    """
    load_translator(pix2pix_dir)
    found_sha256 = backbone_sha256(backbone)
    facts = {"backbone_sha256": found_sha256}
    facts["pix2pix_sha256"] = sha256_of_files([Path(pix2pix_dir) / "model.pt"])
    if generator_dir is None:
        if not has_part(backbone, "controlnet"):
            raise ValueError(
                f"generator_dir: null means the branch of the backbone, but {backbone!r} brings "
                "none; name the output_dir of train.yaml"
            )
        refuse_other_scheduler(scheduler, {}, None)
        return facts
    generator = read_generator(generator_dir)
    refuse_other_scheduler(scheduler, generator, generator_dir)
    refuse_other_backbone(generator, generator_dir, backbone)
    return facts | {"generator_sha256": generator["model_sha256"]}


def refuse_seen_images(
    data: Sequence[dict], part: str, generator_dir: str | None, pix2pix_dir: str, backbone: str
) -> None:
    """Refuses held-out images that one of the two models was trained on, by their hashes.

    Args:
        data: see :func:`held_out_items`.
        part: images of another part than ``test`` are not said to be held out, and pass.
        generator_dir: see :func:`compared_models`.
        pix2pix_dir: folder of the Pix2Pix model.
        backbone: brings a lineage where ``generator_dir`` is None.

    Raises:
        ValueError: names the model, how many images it has seen, and one of them.

    Source: engineering choice (design, "lineage").
    """
    if part != "test":
        return
    rows = pd.DataFrame(data, columns=["case", "source_sha256", "image_sha256"])
    rows["group"] = rows["case"]
    for key, folder in {
        "generator_dir": generator_dir or resolve_backbone(backbone),
        "pix2pix_dir": pix2pix_dir,
    }.items():
        path = Path(folder) / "lineage.json"
        if not path.is_file():  # a backbone from the hub has none
            logger.warning("%s: %s has no lineage; what it has seen is unknown", key, folder)
            continue
        known = {leak.second for leak in lineage_leaks(read_lineage(path), rows, rows)}
        seen = [item["case"] for item in data if item["case"] in known]
        if seen:
            raise ValueError(
                f"part: 'test', but {len(seen)} of {len(data)} images, such as {seen[0]}, were in "
                f"the training of {key}: {folder}; compare on a store whose test part no training "
                "saw (phantoms: another seed)"
            )


def image_paths(output_dir: str, method: str, num_images: int) -> list[Path]:
    """Where a method's images lie, in the order of the items."""
    return [Path(output_dir) / "images" / method / f"{i:06d}.png" for i in range(num_images)]


class MethodBatches(ProcessBatches):
    """The batches whose images a method lacks: an interrupted run is taken up.

    Args:
        data: see :func:`held_out_items`.
        batch_size: images a pass.
        output_dir, method: see :class:`MethodWriter`.

    Source: engineering choice.
    """

    def __init__(self, data: Sequence[dict], batch_size: int, output_dir: str, method: str) -> None:
        super().__init__(data, batch_size)
        paths = image_paths(output_dir, method, len(data))
        self.batches = [
            batch for batch in self.batches if not all(paths[i].is_file() for i in batch)
        ]


class MethodWriter:
    """Writes a method's images as 16-bit PNG, numbered as their items.

    Args:
        output_dir: gets ``images/<method>/<number>.png``.
        method: one of ``METHODS``.
        data: see :func:`held_out_items`.

    Source: engineering choice.
    """

    def __init__(self, output_dir: str, method: str, data: Sequence[dict]) -> None:
        paths = image_paths(output_dir, method, len(data))
        self.folder = Path(output_dir)
        self.paths = {
            (item["case"], item["slice"]): path for item, path in zip(data, paths, strict=True)
        }

    def attach(self, engine: Engine) -> None:
        """Listen to the evaluator."""
        engine.add_event_handler(Events.ITERATION_COMPLETED, self._write)

    def _write(self, engine: Engine) -> None:
        batch, images = engine.state.batch, engine.state.output["pred"].float().cpu().numpy()
        keys = list(zip(batch["case"], batch["slice"].tolist(), strict=True))
        for key in dict.fromkeys(keys):  # not the copies that fill the last batch
            image = images[keys.index(key)][0]
            with same_command_goes_on(self.folder):
                write_aside(self.paths[key], partial(write_image, image=image))


def write_table1(
    output_dir: str, data: Sequence[dict], store_dir: str, part: str, image_size: int
) -> None:
    """Measure the images of both methods: ``image_quality.csv``, ``table1.csv``, ``table1.md``.

    Args:
        output_dir: holds the images, see :class:`MethodWriter`; gets the three files.
        data: see :func:`held_out_items`.
        store_dir: the slice store, for its name.
        part: of the store.
        image_size: side of the images, px.

    Source: paper Table 1.
    """
    wait_for_processes()
    if not is_main_process():
        return
    folder = Path(output_dir)
    images = {method: image_paths(output_dir, method, len(data)) for method in METHODS}
    measure_image_quality(data, images, folder / "image_quality.csv", image_size)
    table = aggregate_quality(read_csv(folder / "image_quality.csv", "image quality"))
    write_aside(folder / "table1.csv", lambda path: table.to_csv(path, index=False))
    caption = (
        f"Mean ± standard deviation over {len(data)} images: part {part} of "
        f"{read_store(store_dir).header['name']}, {image_size} px, intensities in [0, 1] (the "
        f"paper does not say its range). MS-SSIM over {len(scale_weights(image_size))} scales; the "
        "standard is 5, which need 176 px. The paper's figures are of RadImageNet at 256 px: of "
        "another data set, so they are no target here."
    )
    text = f"{_markdown(table)}\n\n{caption}\n"
    write_aside(folder / "table1.md", lambda path: path.write_text(text, encoding="utf-8"))
    logger.info("Table 1:\n%s", text)


def _markdown(table: pd.DataFrame) -> str:
    """The rows of our methods and, below them, of the paper's."""
    lines = ["| | " + " | ".join(METRICS) + " |", "|---" * (1 + len(METRICS)) + "|"]
    for method in METHODS:
        rows = table[table.method == method].set_index("metric").loc[list(METRICS)]
        cells = [f"{row['mean']:.4f} ± {row['sd']:.4f}" for _, row in rows.iterrows()]
        lines.append(f"| {method} | " + " | ".join(cells) + " |")
    for method, figures in PAPER.items():
        cells = [f"{mean:.4f} ± {sd:.4f}" for mean, sd in figures]
        lines.append(f"| *paper: {method}* | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def draw_table1(output_dir: str, data: Sequence[dict], num_rows: int, seed: int) -> None:
    """Write ``table1.png``: real image, edge, Pix2Pix, ours side by side.

    Args:
        output_dir: holds the images.
        data: see :func:`held_out_items`.
        num_rows: images shown at most.
        seed: draws them.

    Source: paper Sec. 4.1; which images to show is our choice.
    """
    if not is_main_process():
        return
    order = np.random.RandomState(address_seed(seed, "shown images")).permutation(len(data))
    chosen = np.sort(order[:num_rows])
    columns = ("real", "edge", *METHODS)
    figure = Figure(figsize=(1.7 * len(columns), 1.7 * len(chosen) + 0.4), layout="constrained")
    axes = figure.subplots(len(chosen), len(columns), squeeze=False)
    load = LoadSliced(["image", "edge"], allow_missing_keys=True)
    for row, number in zip(axes, chosen, strict=True):
        item = load({key: data[number][key] for key in ("image", "edge")})
        shown = [(item["image"], -1), (item["edge"], 0)]
        for method in METHODS:
            path = image_paths(output_dir, method, len(data))[number]
            shown.append((load({"image": str(path)})["image"], -1))
        for axis, (image, low) in zip(row, shown, strict=True):
            axis.imshow(image[0].numpy(), cmap="gray", vmin=low, vmax=1)
            axis.set_xticks([])
            axis.set_yticks([])
        row[0].set_ylabel(data[number]["prompt"].replace(", ", "\n"), fontsize=7)
    for axis, name in zip(axes[0], columns, strict=True):
        axis.set_title(name, fontsize=9)
    write_aside(
        Path(output_dir) / "table1.png",
        lambda path: figure.savefig(path, format="png", dpi=110),
    )
