"""A client's training (MONAI Label): its volumes as slices, its run's folder, its weights."""

import logging
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from monai.data import Dataset
from monai.handlers import CheckpointLoader
from monai.transforms import Compose

from diffboost.client_volumes import ClientVolumes, list_cases, short_hash
from diffboost.data.addresses import AddressedDataset
from diffboost.data.slices import slice_items
from diffboost.files import write_aside
from diffboost.processes import is_main_process, wait_for_processes
from diffboost.segmentation.training import are_volumes, with_labels

logger = logging.getLogger(__name__)

PUBLISHED = ("lineage.json", "training_log.csv", "timing.csv", "run.json", "model.pt")


@dataclass(frozen=True)
class Slices:
    """What a training and its selection see, and where it lies.

    Args:
        training, validation: slices, see ``slice_items``; those of training may have ``variants``.
        store_dir: their slice store.
        arm: see ``split_arm``.
        synthetic_dir: store of the variants; None in an arm without.
        of_client: they are made of a client's volumes.
        before: model.pt that a client's training replaces, if there is one.
    """

    training: Sequence[dict]
    validation: Sequence[dict]
    store_dir: str
    arm: str
    synthetic_dir: str | None
    of_client: bool = False
    before: str | None = None


def read_slices(
    training: Sequence[dict],
    validation: Sequence[dict],
    client: ClientVolumes,
    store_dir: str,
    arm: str,
    synthetic_dir: str | None,
    training_items: Callable[..., Sequence[dict]],
    selection_items: Callable[..., Sequence[dict]],
) -> Slices:
    """The slices that training and selection see: a store's as they are, a client's once prepared.

    A client's volumes are trained in arm ``diffboost`` (``diffboost+<arm>``) where
    ``client.synthetic_dir`` has variants of any of their slices (the others stand in for their own
    variant), and in ``arm`` where not; the log says which. Without volumes for validation some of
    the training's are kept for it.

    Args:
        training, validation: what the config or a client lists: slices, or dictionaries with the
            paths ``image`` and ``label`` of a NIfTI volume or a picture and its label.
        client: what is known of a client's volumes.
        store_dir: the store that slices are of.
        arm: see ``split_arm``; one without variants for a client.
        synthetic_dir: store of the variants of ``store_dir``.
        training_items, selection_items: the functions of these names, with the knobs given.

    Raises:
        ValueError: volumes of two kinds, a bad volume, too few, one in both lists, or an arm with
            variants for them.

    Source: engineering choice (issue 4, "MONAI Label").
    """
    if not are_volumes(training):
        return Slices(training, validation, store_dir, arm, synthetic_dir)
    cases, layout = list_cases([*training, *validation])
    both = {str(item["image"]) for item in training} & {str(item["image"]) for item in validation}
    if both:
        raise ValueError(
            f"leak: {min(both)} is in train::dataset::data and validate::dataset::data"
        )
    made = client.prepare(list(cases.values()), layout)
    logger.info("%d volumes of a client are slices in %s", len(cases), made)
    if validation:
        chosen = {cases[str(item["image"])].name for item in validation}
        items = training_items(str(made), arm=arm, inner_fraction=0.0)
        items = [item for item in items if item["case"] not in chosen]
        selection = [item for item in slice_items(made, 0, "all") if item["case"] in chosen]
        _refuse_none(items, "train::dataset::data")
        _refuse_none(selection, "validate::dataset::data")
    else:
        items, selection = training_items(str(made), arm=arm), selection_items(str(made))
        names = ", ".join(sorted({item["case"] for item in selection}))
        logger.info("no volumes for validation were given; kept for it: %s", names)
    before = client.model_path if Path(client.model_path).is_file() else None
    items, arm, synthetic_dir = _with_variants(items, client, made, arm)
    return Slices(items, selection, str(made), arm, synthetic_dir, True, before)


def _with_variants(
    items: list[dict], client: ClientVolumes, store_dir: Path, arm: str
) -> tuple[list[dict], str, str | None]:
    """The items with their variants, the arm and the variants' store; unchanged without any."""
    variants = client.variants(store_dir)
    places = [(item["case"], int(item["slice"])) for item in items]
    covered = sum(place in variants for place in places)
    if not covered:
        logger.info("arm %s: there are no variants of these %d slices", arm, len(items))
        return items, arm, None
    arm = "diffboost" if arm == "baseline" else f"diffboost+{arm}"
    logger.info("arm %s: %d of %d slices have variants", arm, covered, len(items))
    items = [
        {**item, **with_labels(variants.get(place, [item["image"]]))}
        for item, place in zip(items, places, strict=True)
    ]
    return items, arm, client.synthetic_dir


def _refuse_none(items: Sequence[dict], key: str) -> None:
    if not items:
        raise ValueError(f"{key}: none of the volumes that the client gave can be used")


def slice_dataset(
    data: Sequence[dict],
    transform: Compose,
    slices: Sequence[dict] | None = None,
    seed: int | None = None,
) -> Dataset:
    """A data set of slices; with a seed one of addressed draws.

    Args:
        data: what the config or a client lists; taken as it is without ``slices``.
        transform: of an item.
        slices: those that ``data`` stands for, see ``read_slices``.
        seed: the run's seed, where the transform draws.

    Source: engineering choice (MONAI Label puts its volumes at ``train::dataset::data``).
    """
    items = data if slices is None else slices
    if seed is None:
        return Dataset(items, transform)
    return AddressedDataset(items, transform, seed, cache=False)


def run_folder(slices: Slices, client_dir: str, output_dir: str, settings: Mapping) -> str:
    """The folder of a run: ``output_dir``, or for a client's one named by all that the run is.

    What a client's training starts from is a part of that, so that the next one is another run,
    and one that was stopped goes on.

    Args:
        slices: what is trained on.
        client_dir: holds the folders of clients' runs.
        output_dir: the config's own.
        settings: what the run is.

    Source: engineering choice (issue 4, "MONAI Label").
    """
    if not slices.of_client:
        return output_dir
    return str(Path(client_dir) / f"run_{short_hash(dict(settings))}")


def starting_weights(weights: str | None, handlers: Sequence[object]) -> str | None:
    """The model.pt that a training starts from: the config's, or that of a client's loader.

    Args:
        weights: knob of the config.
        handlers: the trainer's, among which a client may have put MONAI's CheckpointLoader.

    Source: engineering choice (lineage: a model names what it was trained from).
    """
    loaders = [handler for handler in handlers if isinstance(handler, CheckpointLoader)]
    return str(loaders[0].load_path) if loaders else weights


def publish(run_dir: str, output_dir: str) -> None:
    """Copies a client's finished run to where the client reads weights, model.pt last.

    Args:
        run_dir: see ``run_folder``; the run stays there.
        output_dir: the bundle's models/; nothing is done if they are the same.

    Source: engineering choice (MONAI Label reads models/model.pt).
    """
    if run_dir != output_dir and is_main_process():
        for name in PUBLISHED:
            copy = partial(shutil.copyfile, Path(run_dir) / name)
            write_aside(Path(output_dir) / name, copy)
        logger.info("%s is in %s", run_dir, output_dir)
    wait_for_processes()
