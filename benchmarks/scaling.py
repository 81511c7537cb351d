"""How variants scale with processes, and a store with its rows.

    python benchmarks/scaling.py [--variants 192] [--rows 10000 100000 1350000] [--scratch DIR]

Processes: the same synthesis (phantoms of 64 px, the tiny backbone, default sampler) by one process
and by two under torchrun with the overlay multi_gpu_inference.yaml, each with one thread. The rate
is taken between the first batches and the last, from the times of the variants' files, so that
start-up is in neither; the files must be the same byte for byte, or this exits with 1. Beside it,
what the machine's processors give for plain matrix products in two processes against one: two
hyperthreads of one core are no two cores, and no program makes them so.

Rows: an index of as many rows, whose images share some hundred files, is opened and trained on for
some steps by the pretraining bundle without cached latents, in a process of its own: seconds to
list the training images, and the most memory that the process held. `tree_index.py` also builds
such a store from a tree of files. The last line is JSON; its ratio is seconds a variant of two
processes over those of one.
"""

import argparse
import json
import logging
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import monai.bundle
import pyarrow as pa
import pyarrow.parquet as pq
import tree_index

from diffboost.files import sha256_of_files
from diffboost.prepare import prepare

BUNDLES = Path(__file__).parents[1] / "bundles"
BATCH_SIZE = 8
NUM_SLICES = 32
LARGEST_MIB = 2048
SMALL_ROWS = 330  # two images of every class
MULTIPLY = """
import sys, time
import numpy
matrix = numpy.random.default_rng(0).standard_normal((512, 512), numpy.float32)
start, seconds, count = float(sys.argv[1]), float(sys.argv[2]), 0
matrix @ matrix
time.sleep(max(0, start - time.time()))
while time.time() < start + seconds:
    matrix @ matrix
    count += 1
print(count / (time.time() - start))
"""


def one_thread() -> dict[str, str]:
    """The environment of a process with one thread."""
    names = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")
    return os.environ | dict.fromkeys(names, "1") | {"HF_HUB_OFFLINE": "1"}


def matrix_products(processes: int, seconds: float = 3.0) -> float:
    """Matrix products a second of so many processes at once."""
    words = [sys.executable, "-c", MULTIPLY, str(time.time() + 2), str(seconds)]
    running = [
        subprocess.Popen(words, stdout=subprocess.PIPE, text=True, env=one_thread())
        for _ in range(processes)
    ]
    return sum(float(process.communicate()[0]) for process in running)


def write_generator(scratch: Path) -> None:
    """A store of phantoms, and a generator that was finetuned on it for an epoch."""
    sizes = {"num_training": 4, "num_test": 1, "num_slices": NUM_SLICES // 4}
    store_dir = str(scratch / "store")
    prepare("phantoms", store_dir, "phantom_organ", 64, edges="gradient", phantoms=sizes)
    bundle = BUNDLES / "task_finetune"
    monai.bundle.run(
        config_file=str(bundle / "configs" / "train.yaml"),
        bundle_root=str(bundle),
        store_dir=store_dir,
        output_dir=str(scratch / "generator"),
        inner_fraction=0.0,
        epochs=1,
        num_copies=2,
        device="cpu",
    )


def synthesize(scratch: Path, processes: int, ratio: int) -> float:
    """Makes the variants by so many processes; variants a second after the first batches."""
    bundle = BUNDLES / "diffboost_synthesis"
    configs = ("inference", "multi_gpu_inference")
    files = [str(bundle / "configs" / f"{name}.yaml") for name in configs]
    knobs = {
        "config_file": files[0] if processes == 1 else repr(files),
        "bundle_root": bundle,
        "store_dir": scratch / "store",
        "generator_dir": scratch / "generator",
        "output_dir": scratch / f"synthetic{processes}",
        "inner_fraction": 0.0,
        "ratio": ratio,
        "batch_size": BATCH_SIZE,
        "num_measured": 8,
    }
    words = [sys.executable]
    if processes > 1:
        words += ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    words += ["-m", "monai.bundle", "run"]
    words += [word for key, value in knobs.items() for word in (f"--{key}", str(value))]
    done = subprocess.run(words, capture_output=True, text=True, check=False, env=one_thread())
    if done.returncode:
        sys.stderr.write(done.stdout + done.stderr)
        raise SystemExit(done.returncode)
    written = sorted(path.stat().st_mtime for path in images(scratch, processes))
    first = processes * BATCH_SIZE
    return (len(written) - first) / (written[-1] - written[first - 1])


def images(scratch: Path, processes: int) -> list[Path]:
    """The variants' files, sorted."""
    return sorted((scratch / f"synthetic{processes}" / "images").iterdir())


def measure_processes(scratch: Path, num_variants: int) -> dict:
    """Seconds a variant of two processes and of one, and what the machine gives."""
    write_generator(scratch)
    products = {number: matrix_products(number) for number in (1, 2)}
    rates = {number: synthesize(scratch, number, num_variants // NUM_SLICES) for number in (1, 2)}
    names = [[path.name for path in images(scratch, number)] for number in (1, 2)]
    hashes = [sha256_of_files(images(scratch, number)) for number in (1, 2)]
    return {
        "name": "two_processes",
        "ours": 1 / rates[2],
        "peer": 1 / rates[1],
        "ratio": rates[1] / rates[2],
        "unit": "s/variant",
        "limit": 1 / 1.7,
        "times_as_fast": rates[2] / rates[1],
        "times_as_fast_matrix_products": products[2] / products[1],
        "equal_files": names[0] == names[1] and hashes[0] == hashes[1],
        "variants": len(names[0]),
    }


def grow(store_dir: Path, num_rows: int, small: pa.Table) -> None:
    """Writes an index of so many rows: the small one's over and over, as other cases."""
    with pq.ParquetWriter(store_dir / "index.parquet", small.schema) as writer:
        written = 0
        while written < num_rows:
            rows = small.slice(0, num_rows - written)
            for name in ("case", "group"):
                cases = [f"{case}_{written:07d}" for case in small[name].to_pylist()[: len(rows)]]
                column = pa.array(cases, small.schema.field(name).type)
                rows = rows.set_column(rows.column_names.index(name), name, column)
            writer.write_table(rows)
            written += len(rows)


def measure_rows(scratch: Path, sizes: list[int], steps: int = 4) -> list[dict]:
    """Seconds to list the images of a store of each size, and memory of a training over it."""
    tree_index.build(scratch, SMALL_ROWS, num_workers=0)
    small = pq.read_table(scratch / "store" / "index.parquet")
    small = pa.concat_tables([small] * (8192 // len(small))).combine_chunks()  # a row group
    figures = []
    for size in sizes:
        grow(scratch / "store", size, small)
        found = tree_index.open_store(scratch / "store")
        found |= tree_index.train(scratch / "store", steps)
        shutil.rmtree(scratch / "models")
        figures.append(
            {
                "name": f"rows_{size}",
                "ours": found["training_rss_mib"],
                "peer": LARGEST_MIB,
                "ratio": found["training_rss_mib"] / LARGEST_MIB,
                "unit": "MiB",
                "limit": 1.0,
                "open_seconds": found["open_seconds"],
            }
        )
        sys.stdout.write(f"{json.dumps(figures[-1])}\n")
        sys.stdout.flush()
    return figures


def main() -> None:
    """Reads the command line and prints the line of JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--variants", type=int, default=192, help=f"a multiple of {NUM_SLICES}")
    parser.add_argument("--rows", type=int, nargs="*", default=[10_000, 100_000, 1_350_000])
    parser.add_argument("--scratch", type=Path, default=None)
    choice = parser.parse_args()
    logging.disable(logging.INFO)
    with tempfile.TemporaryDirectory(dir=choice.scratch) as name:
        scratch = Path(name)
        two = measure_processes(scratch / "processes", choice.variants)
        sys.stdout.write(f"{json.dumps(two)}\n")
        rows = measure_rows(scratch / "rows", choice.rows)
    sys.stdout.write(json.dumps(two | {"name": "scaling", "figures": [two, *rows]}) + "\n")
    raise SystemExit(0 if two["equal_files"] else 1)


if __name__ == "__main__":
    main()
