"""The Model Zoo's acceptance of all four releases, in a virtual environment without our package.

    python tests/acceptance/zoo.py [FOLDER] [--venv VENV] [--schema SCHEMA] [--only BUNDLE]

Writes releases, zips and environment into FOLDER (default: a new temporary one; its path gets a
blank). Each line of its table says the number of a demand in the project's list of what the Model
Zoo's CI and users ask for, the bundle and what was found. Then PASS or FAIL. Needs pip's index for
the environment and, where ~/.cache/diffboost lacks them, for the HED weights.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import venv
import zipfile
from pathlib import Path

import yaml

from diffboost.package import json_twin, package, verify
from diffboost.prepare import prepare
from diffboost.release.contents import config_files, strings

REPOSITORY = Path(__file__).parents[2]
BUNDLES = sorted(path.name for path in (REPOSITORY / "bundles").iterdir())
PROBE = Path(__file__).with_name("probe.py")
SCHEMA = REPOSITORY.parent / "shared" / "schema" / "meta_schema_20240725.json"
PHANTOMS = {"num_training": 3, "num_test": 1, "num_slices": 3}
TIMEOUT_SECONDS = 1800


class Table:
    """The lines of the acceptance list with what was found."""

    def __init__(self) -> None:
        self.failed = 0

    def add(self, line: str, bundle: str, passed: bool, text: str = "") -> None:
        """Prints a line and counts it if it failed."""
        self.failed += not passed
        print(f"{'pass' if passed else 'FAIL'}  {line:>4}  {bundle:32}  {text}", flush=True)


def requirements(metadata: dict) -> list[str]:
    """What model-zoo's ci/get_bundle_requirements.py writes: exact versions of all packages."""
    named = {"monai": "monai_version", "torch": "pytorch_version", "numpy": "numpy_version"}
    lines = [f"{name}=={metadata[key]}" for name, key in named.items()]
    return lines + [f"{k}=={v}" for k, v in metadata["required_packages_version"].items()]


def make_environment(folder: Path, lines: list[str]) -> None:
    """A virtual environment with exactly what the releases' metadata name."""
    venv.create(folder, with_pip=True)
    pip = [str(folder / "bin" / "pip"), "--disable-pip-version-check", "--quiet"]
    wanted = folder / "requirements.txt"
    wanted.write_text("\n".join(sorted(set(lines))) + "\n")
    subprocess.run([*pip, "install", "--requirement", str(wanted)], check=True)
    subprocess.run([*pip, "check"], check=True)


def run(command: list, cwd: Path | str, **environment: str) -> subprocess.CompletedProcess:
    """Runs a command offline, without this repository in sight."""
    kept = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "VIRTUAL_ENV")}
    kept |= {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "2")}
    return subprocess.run(
        list(map(str, command)), cwd=cwd, env=kept | environment, capture_output=True, text=True,
        timeout=TIMEOUT_SECONDS, check=False,
    )  # fmt: skip


def last_line(done: subprocess.CompletedProcess) -> str:
    lines = (done.stderr.strip() or done.stdout.strip()).splitlines()
    return "" if done.returncode == 0 or not lines else lines[-1][:200]


def check_files(table: Table, release: Path, schema: Path) -> None:
    """Lines 1 to 5, 7, 15, 17, 18 and 21: what can be read off the files."""
    name, configs = release.name, release / "configs"
    needed = ["LICENSE", "configs/metadata.json", "configs/inference.json", "docs/README.md"]
    missing = [file for file in [*needed, "models/model.pt"] if not (release / file).is_file()]
    table.add("1", name, not missing, ", ".join(missing))
    twins = [p for p in configs.glob("*.json") if p.name != "metadata.json"]
    same = [twin.read_text() == json_twin(twin.with_suffix(".yaml")) for twin in twins]
    table.add("2", name, len(same) > 0 and all(same), ", ".join(sorted(p.name for p in twins)))
    metadata = json.loads((configs / "metadata.json").read_text())
    formats = metadata["network_data_format"]
    first = next(iter(formats["inputs"])), next(iter(formats["outputs"]))
    names = formats["outputs"]["pred"].get("channel_def", {}).values()
    good = first == ("image", "pred") and all(isinstance(text, str) for text in names)
    table.add("4", name, good, " -> ".join(first))
    told = metadata["version"] in metadata["changelog"] and "_v" not in metadata["name"]
    table.add("5", name, told, f"version {metadata['version']} in the changelog")
    try:
        verify(release)
        table.add("7", name, True, "zoo's min checks, and 15, 17, 21, by diffboost verify")
    except (OSError, ValueError) as error:
        table.add("7", name, False, str(error)[:200])
    unclean = [
        f"{path.name}: {where}"
        for path in config_files(release)
        for where, text in strings(yaml.safe_load(path.read_text(encoding="utf-8")))
        if "://" in text or "/home/" in text or ("#" in text and not text.startswith("#"))
    ]
    loaders = [where for where in _targets(configs / "train.yaml") if "CheckpointLoader" in where]
    table.add("18", name, not unclean, "; ".join(unclean) or f"loaders in train: {loaders or 0}")
    if not schema.is_file():
        table.add("3", name, True, f"{schema} is not there: our structural test alone, in line 7")


def _targets(path: Path) -> list[str]:
    """Targets of `train::handlers` that are not disabled by default."""
    if not path.is_file():
        return []
    handlers = yaml.safe_load(path.read_text()).get("train", {}).get("handlers", [])
    return [h["_target_"] for h in handlers if isinstance(h, dict) and "_disabled_" not in h]


def check_schema(table: Table, python: Path, release: Path, schema: Path) -> None:
    """Line 3, MONAI's own command, with the schema in place so that nothing is downloaded."""
    command = [python, "-m", "monai.bundle", "verify_metadata", "--meta_file"]
    command += [release / "configs" / "metadata.json", "--filepath", schema]
    done = run([sys.executable, *command[1:]], "/")  # the environment has no jsonschema
    table.add("3", release.name, done.returncode == 0, last_line(done))


def check_runs(table: Table, python: Path, release: Path, zip_path: Path, work: Path) -> None:
    """Lines 20, 9 and 10: the zip by MONAI's download, run in place and from elsewhere."""
    name, parent = release.name, work / "from the zip"
    command = [python, "-m", "monai.bundle", "download", "--name", name, "--url"]
    done = run([*command, zip_path.as_uri(), "--bundle_dir", parent], "/")
    unpacked = parent / name
    table.add("20", name, (unpacked / "manifest.json").is_file(), last_line(done) or str(parent))
    start = [python, "-m", "monai.bundle", "run", "--config_file"]
    done = run([*start, "configs/inference.json"], unpacked)
    table.add("9", name, done.returncode == 0, last_line(done) or _outputs(unpacked))
    elsewhere = [unpacked / "configs" / "inference.json", "--bundle_root", unpacked]
    target = work / "outputs" / name
    done = run([*start, *elsewhere, "--output_dir", target], "/")
    table.add("10", name, done.returncode == 0, last_line(done) or _outputs(target))


def _outputs(folder: Path) -> str:
    made = [p for p in folder.rglob("*") if p.is_file() and p.parent.name in ("images", "eval")]
    made += list(folder.glob("*_seg.*"))
    return f"{len(made)} images made"


def make_store(store: Path) -> None:
    """A slice store with its sources, for the configs that train and evaluate."""
    if not store.is_dir():
        settings = {"task": "phantom_organ", "image_size": 64, "edges": "gradient", "seed": 3}
        prepare("phantoms", str(store), phantoms=PHANTOMS, **settings)


def check_probe(table: Table, python: Path, release: Path, work: Path) -> None:
    """Lines 6, 8, 12, 14, 16 and 19, in one process that has only the release on its path."""
    command = [python, PROBE, release, work / "store", work / "probe" / release.name]
    done = run(command, "/", PYTHONPATH=str(release))
    found = [line.split("\t") for line in done.stdout.splitlines() if line.startswith("LINE\t")]
    for _, line, passed, text in found:
        table.add(line, release.name, passed == "1", text)
    if done.returncode or not found:
        table.add("6", release.name, False, last_line(done))


def main() -> int:
    """Runs the list; 0 if all of it passed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", nargs="?", type=Path)
    parser.add_argument("--venv", type=Path, help="an environment with the named packages")
    parser.add_argument("--schema", type=Path, default=SCHEMA)
    parser.add_argument("--only", choices=BUNDLES)
    arguments = parser.parse_args()
    folder = arguments.folder or Path(tempfile.mkdtemp(prefix="diffboost_zoo_"))
    work, table = (folder / "a team").absolute(), Table()
    releases, lines = [], []
    for name in [arguments.only] if arguments.only else BUNDLES:
        made = package(str(REPOSITORY / "bundles" / name), str(work / "dist"))
        with zipfile.ZipFile(f"{made}.zip") as archive:  # made by us a moment ago
            archive.extractall(work / "models")
        releases.append((work / "models" / name, Path(f"{made}.zip")))
        lines += requirements(json.loads((made / "configs" / "metadata.json").read_text()))
    environment = arguments.venv or work / "venv"
    if arguments.venv is None:
        make_environment(environment, lines)
    python = environment / "bin" / "python"
    ours = run([python, "-c", "import diffboost"], "/")
    table.add("30", "environment", ours.returncode != 0, "pip check clean, no package diffboost")
    make_store(work / "store")
    for release, zip_path in releases:
        check_files(table, release, arguments.schema)
        if arguments.schema.is_file():
            check_schema(table, python, release, arguments.schema.absolute())
        check_probe(table, python, release, work)
        check_runs(table, python, release, zip_path, work)
    print(f"{'FAIL' if table.failed else 'PASS'}: {table.failed} lines failed; all in {work}")
    return int(table.failed > 0)


if __name__ == "__main__":
    sys.exit(main())
