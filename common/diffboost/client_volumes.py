"""Volumes or pictures that a client (MONAI Label) trains on, made into a slice store."""

import hashlib
import json
import logging
import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from diffboost.conditions.edges import load_edge_detector
from diffboost.data.manifest import read_manifest, refuse_other_slicing
from diffboost.data.slices import read_store
from diffboost.data.sources import IMAGE_SUFFIXES, Case, Source, unique_names
from diffboost.data.tasks import AXCODES, read_task
from diffboost.data.volumes import SUFFIXES
from diffboost.knobs import nearest
from diffboost.locks import hold_folder, release_folder
from diffboost.processes import is_main_process, wait_for_processes
from diffboost.records import state_of
from diffboost.store_folders import in_place, move_store, partial_store
from diffboost.store_writer import StoreWriter

logger = logging.getLogger(__name__)

INTENSITIES = {
    "percentile": ("percentile", "lower", "upper", "volume"),
    "slice_percentile": ("percentile", "lower", "upper", "slice"),
    "range": ("range", "low", "high", "volume"),
}
MAX_REJECTED_FRACTION = 0.1


@dataclass(frozen=True)
class ClientVolumes:
    """What is known of a client's volumes, in the words of the bundle's inference config.

    Args:
        folder: gets a slice store of each list of volumes, and a folder of each training.
        synthetic_dir: store with variants of some of them, see ``ClientVolumes.slices``; or None.
        model_path: model.pt that a training replaces.
        image_size: side of a slice in pixels.
        num_classes: with background; label values are 0 to ``num_classes`` - 1, and in pictures of
            one class any nonzero value.
        channel: of a volume with several.
        slice_axcodes: axial RAS, coronal RSA, sagittal ASR.
        intensity: percentile, slice_percentile or range.
        intensity_low, intensity_high: percentiles or values that become -1 and 1.
        num_variants: use the first so many variants of a slice; None: all.

    Source: engineering choice (issue 4, "MONAI Label").
    """

    folder: str
    synthetic_dir: str | None
    model_path: str
    image_size: int
    num_classes: int
    channel: int
    slice_axcodes: str
    intensity: str
    intensity_low: float
    intensity_high: float
    num_variants: int | None = None

    def task(self, layout: str) -> dict:
        """The task of such volumes (layout decathlon) or pictures (pairs).

        Raises:
            ValueError: unknown intensity or slice_axcodes.
        """
        axes = {codes: axis for axis, codes in AXCODES.items()}
        for key, allowed in (("intensity", INTENSITIES), ("slice_axcodes", axes)):
            value = getattr(self, key)
            if value not in allowed:
                raise ValueError(f"{key}: {value!r} is unknown; {nearest(value, allowed)}")
        policy, low, high, per = INTENSITIES[self.intensity]
        return read_task(
            {
                "name": "client_volumes",
                "layout": layout,
                "labels": {f"class {number}": [number] for number in range(1, self.num_classes)},
                "channel": self.channel,
                "slice_axis": axes[self.slice_axcodes],
                "intensity": {"policy": policy, low: self.intensity_low, high: self.intensity_high},
                "intensity_per": per,
            }
        )

    def prepare(self, cases: Sequence[Case], layout: str) -> Path:
        """Writes the slice store of cases as ``prepare`` does, or finds it in place.

        A store's name is the hash of its files' paths, sizes and times and of these settings, so
        that a new or corrected label makes a new one; those before it are removed, finished or
        not, except where another process holds them. This one holds its store until it ends, since
        it trains on it. Not covered: trainings that are threads of one process, and the last of
        several on the same volumes once the one that came first has ended.

        Raises:
            ValueError: more cases than one in ten cannot be used; each is named with the reason.
        """
        root = Path(os.path.commonpath([path.parent for case in cases for path in _files(case)]))
        wanted = {
            "task": self.task(layout),
            "source_dir": str(root),
            "preprocessing": {
                "image_size": self.image_size, "edges": "gradient", "hed_size_px": None,
            },
            "num_folds": 0,
            "group_duplicates": False,
        }  # fmt: skip
        states = [state_of(_files(case)) for case in cases]
        store_dir = Path(self.folder).resolve() / f"store_{short_hash([wanted, states])}"
        if is_main_process() and not in_place(store_dir, wanted):
            store_dir.parent.mkdir(parents=True, exist_ok=True)
            with partial_store(store_dir, wanted) as partial_dir:
                writer = StoreWriter(partial_dir, root, wanted, load_edge_detector("gradient"))
                writer.write_slices(Source(list(cases)), num_workers=0)
                writer.write_index(MAX_REJECTED_FRACTION)
                move_store(partial_dir, store_dir)
            _remove_others(store_dir)
        if is_main_process():
            _try_to_hold(store_dir)
        wait_for_processes()
        return store_dir

    def variants(self, store_dir: Path) -> dict[tuple[str, int], list[str]]:
        """Kept variants of a store's slices by (case, slice), found by the hash of image and label.

        Empty where ``synthetic_dir`` is not there or has none of them; the log says so.

        Raises:
            ValueError: they have another size than the slices, were cut from the volumes in another
                way, or do not say what they are of.
        """
        if self.synthetic_dir is None or not Path(self.synthetic_dir).is_dir():
            logger.info("client_synthetic_dir: %s is not there", self.synthetic_dir)
            return {}
        manifest = read_manifest(self.synthetic_dir)
        missing = {"image_size", "source_sha256"} - set(manifest)
        if missing:
            raise ValueError(
                f"client_synthetic_dir: the manifest of {self.synthetic_dir} lacks the columns "
                f"{', '.join(sorted(missing))}; synthesize it again"
            )
        sizes = set(manifest["image_size"])
        if sizes != {self.image_size}:
            raise ValueError(
                f"client_synthetic_dir: {self.synthetic_dir} has variants of {sizes} px, the model "
                f"sees slices of image_size {self.image_size}"
            )
        store, key = read_store(store_dir), f"client_synthetic_dir: {self.synthetic_dir}"
        cut = manifest.get("slicing", ())
        refuse_other_slicing(cut, store.header["task"], key, but="labels")  # here class numbers
        cases = {sha256: case for case, sha256 in store.source_sha256().items()}
        manifest = manifest[manifest["source_sha256"].isin(cases) & manifest["kept"]]
        if self.num_variants is not None:
            manifest = manifest[manifest["variant"] < self.num_variants]
        manifest = manifest.sort_values(["source_sha256", "slice", "variant"])
        root = Path(self.synthetic_dir).resolve()
        return {
            (cases[sha256], int(number)): [str(root / name) for name in rows["image"]]
            for (sha256, number), rows in manifest.groupby(["source_sha256", "slice"])
        }


def list_cases(items: Sequence[Mapping[str, str]]) -> tuple[dict[str, Case], str]:
    """A case for every volume's path, and the layout that they share.

    Args:
        items: with the paths ``image`` and ``label``.

    Raises:
        ValueError: a file of another kind, or volumes beside pictures.

    Source: engineering choice (names as ``prepare`` gives them).
    """
    pairs = sorted({(str(item["image"]), str(item["label"])) for item in items})
    layouts = {path: _layout_of(path) for pair in pairs for path in pair}
    if len(set(layouts.values())) > 1:
        first = next(path for path in layouts if layouts[path] != layouts[pairs[0][0]])
        raise ValueError(
            f"train::dataset::data: {pairs[0][0]} and {first} are a volume and a picture; a "
            "training takes one kind"
        )
    stems = (Path(path).name.split(".nii")[0].removesuffix(".png") for path, _ in pairs)
    names = unique_names(stems)
    cases = {
        image: Case(name, Path(image).resolve(), (Path(label).resolve(),), "training")
        for name, (image, label) in zip(names, pairs, strict=True)
    }
    return cases, layouts[pairs[0][0]]


def _remove_others(store_dir: Path) -> None:
    """Removes the stores and partial stores beside a new one that no other process holds."""
    for other in store_dir.parent.glob("store_*"):
        if other != store_dir and other.is_dir() and _try_to_hold(other):
            shutil.rmtree(other)
            release_folder(other)


def _try_to_hold(folder: Path) -> bool:
    """Whether this process holds a folder, from now on if no other one does."""
    try:
        hold_folder(folder)
    except BlockingIOError as error:
        logger.info("%s", error)
        return False
    return True


def _layout_of(path: str) -> str:
    if path.lower().endswith(SUFFIXES):
        return "decathlon"
    if path.lower().endswith(IMAGE_SUFFIXES):
        return "pairs"
    allowed = ", ".join((*SUFFIXES, *IMAGE_SUFFIXES))
    raise ValueError(f"train::dataset::data: {path}: files of these kinds are read: {allowed}")


def _files(case: Case) -> list[Path]:
    return [case.image, *case.labels]


def short_hash(content: object) -> str:
    """Twelve hexadecimal digits that name a content, as JSON writes it.

    Source: engineering choice.
    """
    text = json.dumps(content, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:12]
