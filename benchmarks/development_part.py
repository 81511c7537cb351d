"""The training part of one fold as a data set of its own, for choices that no test case may see.

    python benchmarks/development_part.py STORE_DIR SOURCE_DIR OUTPUT_DIR [--fold 0]

Copies every source file of the cases of the fold's training part (inner validation included) from
SOURCE_DIR, where the store was prepared from, into OUTPUT_DIR, under the same names. Prepare makes
it a store with folds of its own (docs/results/protocol.md, "Development"). Layout `pairs` only: an
image's masks are the files whose names continue its name. Copies, for links out of a data set are
refused. The last line is JSON.
"""

import argparse
import json
import shutil
import sys
from pathlib import Path

from diffboost.data.slices import read_store


def copy_cases(store_dir: str, source_dir: Path, output_dir: Path, fold: int) -> int:
    """Copies the files of the training part; the number of its cases."""
    index = read_store(store_dir).columns(["case", "fold", "source_image"])
    chosen = index[index.fold != fold].drop_duplicates("case")
    for name in chosen.source_image:
        image = source_dir / name
        for file in (image, *sorted(image.parent.glob("*"))):
            if file == image or file.name.startswith(f"{image.stem}_"):
                target = output_dir / file.relative_to(source_dir)
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(file, target)
    return len(chosen)


def main() -> None:
    """Copies, prints JSON."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("store_dir")
    parser.add_argument("source_dir", type=Path)
    parser.add_argument("output_dir", type=Path)
    parser.add_argument("--fold", type=int, default=0)
    options = parser.parse_args()
    cases = copy_cases(options.store_dir, options.source_dir, options.output_dir, options.fold)
    sys.stdout.write(json.dumps({"name": "development_part", "cases": cases}) + "\n")


if __name__ == "__main__":
    main()
