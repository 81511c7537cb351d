"""Variants made again from what their files say, through the code that made them."""

import contextlib
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence

import torch
from monai.data import list_data_collate

from diffboost.generation.provenance import MACHINE_FACTS, RUN_FACTS, variant_png
from diffboost.generation.sampling import VariantInferer
from diffboost.generation.synthesis import (
    VariantConditions,
    VariantPrepareBatch,
    load_generator,
)
from diffboost.generation.variant_facts import variant_settings


def regenerate(
    files: Sequence[Mapping], generator_dir: str, backbone: str, decoder: str | None = None
) -> Iterator[tuple[int, bytes]]:
    """The bytes of variants' files, from their facts alone.

    Variants of equal settings share passes. Each stands at its place in a batch of its size, with
    its number of threads, for rounding depends on these; what else is in a batch changes nothing.

    Args:
        files: facts of files, and under ``edge`` the path of their edges.
        generator_dir: folder with the ``model.pt`` that made them.
        backbone: the one that they were made on.
        decoder: the tiny one of those that have one; None takes it by the name that they say.

    Yields:
        Number of the file in ``files`` and its bytes, in the order in which they are made.

    Source: engineering choice (issue 5, "regenerates the same bytes from it").
    """
    groups = defaultdict(list)
    for number, facts in enumerate(files):
        groups[tuple(facts[name] for name in (*RUN_FACTS, *MACHINE_FACTS))].append(number)
    for numbers in groups.values():
        with _same_machine(files[numbers[0]]), torch.no_grad():
            yield from _make_again(files, numbers, generator_dir, backbone, decoder)


@contextlib.contextmanager
def _same_machine(facts: Mapping) -> Iterator[None]:
    """As many threads and the same precision of products as the files were made with."""
    before = torch.get_num_threads(), torch.get_float32_matmul_precision()
    torch.set_num_threads(facts["threads"])
    torch.set_float32_matmul_precision(facts["matmul_precision"])
    try:
        with torch.backends.cudnn.flags(enabled=True, deterministic=True, benchmark=False):
            yield
    finally:
        torch.set_num_threads(before[0])
        torch.set_float32_matmul_precision(before[1])


def _make_again(
    files: Sequence[Mapping],
    numbers: Sequence[int],
    generator_dir: str,
    backbone: str,
    decoder: str | None,
) -> Iterator[tuple[int, bytes]]:
    """The bytes of files of equal settings."""
    items, shared = [files[number] for number in numbers], files[numbers[0]]
    device = "cuda" if shared["machine"].startswith("cuda") else "cpu"
    conditions, sampling = variant_settings(shared)
    if sampling["decoder"] is not None:
        sampling["decoder"] = decoder or sampling["decoder"]
    prepare = VariantConditions(items, backbone, device=device, **conditions)
    inferer = VariantInferer(backbone, **sampling)
    network = load_generator(generator_dir, backbone).to(device)
    waiting = defaultdict(list)
    for number in numbers:
        waiting[files[number]["batch_place"]].append(number)
    while waiting:
        chosen = {place: queue.pop() for place, queue in waiting.items()}
        waiting = {place: queue for place, queue in waiting.items() if queue}
        filling = next(iter(chosen.values()))
        places = [chosen.get(place, filling) for place in range(shared["batch_size"])]
        samples = {number: prepare(files[number]) for number in chosen.values()}
        batch = list_data_collate([samples[number] for number in places])
        noise, _, _, texts_and_edges = VariantPrepareBatch()(batch, device)
        images = inferer(noise, network, **texts_and_edges).float().cpu().numpy()
        for place, number in chosen.items():
            yield number, variant_png(images[place][0], files[number])
