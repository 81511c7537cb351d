"""Drawing: what a generator makes of the edges of each image in a folder, without a slice store."""

import functools
import hashlib
from collections.abc import Iterator
from pathlib import Path

import torch

from diffboost.conditions.edges import load_edge_detector
from diffboost.conditions.prompts import prompt_from_path, task_prompt
from diffboost.data.slices import write_edge
from diffboost.data.sources import unique_names
from diffboost.data.tasks import read_task
from diffboost.data.transforms import LoadSliced
from diffboost.files import sha256_of_files, write_aside


def hash_images(dataset_dir: str, task: str) -> str:
    """One hash of all images that ``drawing_items`` would draw the edges of, names included.

    Args:
        dataset_dir, task: see :func:`drawing_items`.

    Source: engineering choice (design, "Failure": a run of other inputs is another run).
    """
    root = Path(dataset_dir)
    paths = _image_paths(root, read_task(task))
    names = "".join(f"{path.relative_to(root).as_posix()}\n" for path in paths)
    return hashlib.sha256(names.encode() + sha256_of_files(paths).encode()).hexdigest()


def drawing_items(
    dataset_dir: str,
    output_dir: str,
    task: str,
    image_size: int,
    seed: int,
    edges: str = "hed-bsds500",
    edge_weights: str | None = None,
    hed_size_px: int | None = None,
    device: str | torch.device = "cpu",
) -> list[dict]:
    """One item an image of a folder, in the form of synthesis' items; writes the images' edges.

    Args:
        dataset_dir: folder of ``.png`` images; for a task of layout radimagenet a tree
            ``modality/organ/finding/*.png``.
        output_dir: gets ``edges/<name>.png``.
        task: a task's name or file; it says the prompt, of a tree the path does.
        image_size: side to which the images are resized, in pixels.
        seed: with the image's name the address of its noise.
        edges: see :func:`diffboost.conditions.edges.load_edge_detector`.
        edge_weights, hed_size_px: the same (there ``weights`` and ``size_px``).
        device: where edges are found.

    Raises:
        FileNotFoundError: the folder holds no such image.
        ValueError: unknown task or edges, a damaged image, or one that lies elsewhere in the tree.

    Source: engineering choice.
    """
    root, task = Path(dataset_dir), read_task(task)
    paths = _image_paths(root, task)
    detect = load_edge_detector(edges, edge_weights, hed_size_px, device)
    load = LoadSliced(["image"], image_size=image_size)
    items = []
    for path, prompt, name in zip(paths, _prompts(paths, root, task), _names(paths), strict=True):
        found = detect(load({"image": str(path)})["image"][None].to(device))[0, 0].cpu().numpy()
        edge = Path(output_dir) / "edges" / f"{name}.png"
        write_aside(edge, functools.partial(write_edge, edge=found))
        place = {"case": name, "slice": 0, "variant": 0, "seed": seed, "label": ""}
        files = {"image": str(path), "edge": str(edge), "source_sha256": sha256_of_files([path])}
        items.append({**place, **files, "prompt": prompt, "phrase": ""})
    return items


def _image_paths(root: Path, task: dict) -> list[Path]:
    paths = sorted(root.glob("**/*.png" if task["layout"] == "radimagenet" else "*.png"))
    if not paths:
        raise FileNotFoundError(f"dataset_dir: {root} holds no .png images to draw the edges of")
    return paths


def _names(paths: list[Path]) -> Iterator[str]:
    """A name of each image's own."""
    return unique_names(path.stem for path in paths)


def _prompts(paths: list[Path], root: Path, task: dict) -> list[str]:
    """The prompt of each image."""
    if task["layout"] == "radimagenet":
        return [prompt_from_path(path.relative_to(root)) for path in paths]
    return [task_prompt(task)] * len(paths)
