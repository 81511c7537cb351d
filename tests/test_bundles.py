"""Contracts of the bundles, read from their files: what any client of a MONAI bundle relies on."""

import hashlib
import importlib
import json
import re
import shlex
import subprocess
import sys
from configparser import ConfigParser as IniParser
from pathlib import Path

import pytest
import yaml
from documents import DOCUMENTS
from monai.bundle import ConfigParser as BundleParser
from monai.bundle.config_item import ComponentLocator
from packaging.requirements import Requirement

from diffboost.knobs import RUNNER_ARGUMENTS

REPOSITORY = Path(__file__).parents[1]
BUNDLES = sorted((REPOSITORY / "bundles").iterdir())
CONFIGS = sorted((REPOSITORY / "bundles").glob("*/configs/*.yaml"))
SEGMENTATION_INFERENCE = REPOSITORY / "bundles/diffboost_segmentation/configs/inference.yaml"
TAIL = ["initialize", "run", "finalize"]
POSITION = re.compile(r"(#|::)\d+(#|::|$)|\[-?\d*:-?\d*\]|handlers\[")
# Files that must be the same in every bundle that has them.
COPIES = ["LICENSE", "configs/logging.conf"]
# Keys that two configs of one kind must agree on: (file, file, keys).
PRETRAIN, FINETUNE = "radimagenet_controlnet_pretrain", "task_finetune"
AGREEMENTS = [
    (
        f"{PRETRAIN}/configs/train.yaml",
        f"{FINETUNE}/configs/train.yaml",
        ["network_def", "network", "loss", "optimizer", "lr_scheduler", "train::preprocessing"],
    ),
    (f"{PRETRAIN}/configs/multi_gpu_train.yaml", f"{FINETUNE}/configs/multi_gpu_train.yaml", None),
    (
        "diffboost_segmentation/configs/train.yaml",
        "diffboost_segmentation/configs/inference.yaml",
        ["network_def", "image_size", "num_classes"],
    ),
]


def read(path: Path) -> dict:
    return yaml.safe_load(path.read_text(encoding="utf-8"))


def named(path: Path) -> str:
    return "/".join(path.parts[-3:])


def walk(value, where=""):
    """Every (id, key, leaf or dictionary) of a config."""
    yield where, value
    if isinstance(value, dict):
        for key, item in value.items():
            yield from walk(item, f"{where}::{key}" if where else str(key))
    elif isinstance(value, list):
        for number, item in enumerate(value):
            yield from walk(item, f"{where}::{number}")


def strings(path: Path) -> list[tuple[str, str]]:
    return [(where, value) for where, value in walk(read(path)) if isinstance(value, str)]


def locate(target: str) -> object:
    """The object that a `_target_` names."""
    if "." not in target:
        module = ComponentLocator().get_component_module_name(target)
        module = module[0] if isinstance(module, list) else module
        assert module, f"{target} is no component of MONAI"
        return getattr(importlib.import_module(module), target)
    parts = target.split(".")
    for length in range(len(parts) - 1, 0, -1):
        try:
            found = importlib.import_module(".".join(parts[:length]))
        except ModuleNotFoundError:
            continue
        for name in parts[length:]:
            found = getattr(found, name)
        return found
    raise ModuleNotFoundError(target)


every_config = pytest.mark.parametrize("path", CONFIGS, ids=named)
every_bundle = pytest.mark.parametrize("bundle", BUNDLES, ids=lambda bundle: bundle.name)


@every_config
def test_every_target_exists(path):
    for where, value in walk(read(path)):
        target = value.get("_target_") if isinstance(value, dict) else None
        if target and not target.startswith("$"):
            assert callable(locate(target)), f"{where}: {target}"


@every_config
def test_expressions_are_short_and_plain(path):
    lines = path.read_text(encoding="utf-8").splitlines()
    code = [line.partition(" #")[0] for line in lines]
    assert not [line for line in code if "$" in line and len(line) > 100]
    for where, value in strings(path):
        assert "lambda" not in value, where
        assert not (value.startswith("$") and POSITION.search(value)), f"{where}: a list position"
        assert not (value.startswith("$") and "diffboost" in value), f"{where}: use _target_"
        assert not value.startswith("%"), f"{where}: a macro"
        assert "#" not in value, f"{where}: MONAI turns # into ::"
        assert value not in ("$import torch", "$import numpy", "$import monai"), (
            f"{where}: is there"
        )
        path_like = value if not value.startswith("$") else ""
        assert not re.match(r"/|~|[A-Za-z]:\\", path_like), f"{where}: an absolute path"
    for where, _ in walk(read(path)):
        key = where.rpartition("::")[2]
        assert not re.search(r"#\d|::\d", key), f"{where}: a list position"


@every_config
def test_sections_stand_in_order(path):
    assert path.read_text(encoding="utf-8").startswith("# "), "the first line says what it is"
    keys = list(read(path))
    tail = [key for key in keys if key in TAIL]
    assert tail == [key for key in TAIL if key in tail]
    assert keys[len(keys) - len(tail) :] == tail, "initialize, run, finalize come last"
    if "bundle_root" in keys:
        assert keys.index("bundle_root") == int("imports" in keys), "bundle_root comes first"
    if "train" in keys and "validate" in keys:
        assert keys.index("train") < keys.index("validate")


@every_config
def test_knobs_are_checked_first_and_our_code_is_not_in_initialize(path):
    config = read(path)
    assert "diffboost." not in json.dumps(config.get("initialize", []))
    if "run" in config and path != SEGMENTATION_INFERENCE:
        assert config["run"][0] == {"_target_": "diffboost.knobs.check_command_line"}


@pytest.mark.parametrize("path", CONFIGS, ids=named)
def test_a_run_knows_its_slice_store_by_its_contents(path):
    """Its settings have the hash beside the path, as docs/resume.md says."""
    config = read(path)
    runs = [value for where, value in walk(config) if where in ("settings", "train::settings")]
    for settings in runs:
        if "store_dir" in settings:
            hashed = settings["inputs_sha256"]
            hashed = config["train"]["inputs_sha256"] if isinstance(hashed, str) else hashed
            assert hashed["_target_"] == "diffboost.runs.hash_inputs"
            assert hashed["store_dir"] == settings["store_dir"]


@pytest.mark.parametrize("there", [False, True])
def test_synthesis_knows_the_filters_segmenter_by_its_contents(tmp_path, there):
    """Variants judged by another segmenter of the same folder were gone on with."""
    (tmp_path / "model.pt").write_bytes(b"weights")
    parser = BundleParser()
    parser.read_config(REPOSITORY / "bundles/diffboost_synthesis/configs/inference.yaml")
    parser["store_dir"] = parser["segmenter_dir"] = str(tmp_path)
    parser["quality_filter"] = there
    found = parser.get_parsed_content("settings::inputs_sha256")
    assert list(found) == ["store_dir", "segmenter_dir"][: 1 + there]


def test_segmentation_inference_needs_monai_alone():
    assert not [value for _, value in strings(SEGMENTATION_INFERENCE) if "diffboost." in value]


@pytest.mark.parametrize("name", COPIES)
def test_copies_are_identical(name):
    found = {hashlib.sha256((bundle / name).read_bytes()).hexdigest() for bundle in BUNDLES}
    if name == "LICENSE":
        found.add(hashlib.sha256((REPOSITORY / name).read_bytes()).hexdigest())
    assert len(found) == 1


@pytest.mark.parametrize(("left", "right", "keys"), AGREEMENTS, ids=lambda value: str(value)[:40])
def test_configs_agree(left, right, keys):
    values = []
    for name in (left, right):
        config = read(REPOSITORY / "bundles" / name)
        flat = dict(walk(config))
        values.append({key: flat.get(key) for key in keys} if keys else config)
    assert values[0] == values[1]


@every_bundle
def test_bundle_has_its_files(bundle):
    for name in ("LICENSE", "large_files.yml", "docs/README.md", "docs/data_license.txt"):
        assert (bundle / name).is_file(), name
    assert read(bundle / "large_files.yml")["large_files"] is not None
    assert "_v" not in bundle.name


@every_bundle
def test_metadata_follows_the_schema(bundle):
    """The rules of MONAI's meta_schema_20240725 and what MONAI Label and the zoo add to them."""
    metadata = json.loads((bundle / "configs" / "metadata.json").read_text(encoding="utf-8"))
    assert metadata["schema"].endswith("meta_schema_20240725.json")
    for key in ("task", "description", "authors", "copyright", "intended_use", "data_source"):
        assert isinstance(metadata[key], str) and metadata[key]
    assert metadata["name"] == bundle.name
    assert metadata["version"] in metadata["changelog"]
    for key in ("monai_version", "pytorch_version", "numpy_version"):
        assert re.fullmatch(r"\d+\.\d+\.\d+", metadata[key])
    assert isinstance(metadata["eval_metrics"], dict)
    assert all(isinstance(text, str) for text in metadata["references"])
    formats = metadata["network_data_format"]
    assert next(iter(formats["inputs"])) == "image"
    assert next(iter(formats["outputs"])) == "pred"
    for group in ("inputs", "outputs", "post_processed_outputs"):
        for name, tensor in formats.get(group, {}).items():
            check_tensor(tensor, f"{group}: {name}")


def check_tensor(tensor: dict, where: str) -> None:
    """Asserts the schema's rules for a tensor; sizes are fixed numbers, which clients can build."""
    for key, kind in {"type": str, "format": str, "dtype": str, "num_channels": int}.items():
        assert isinstance(tensor[key], kind), f"{where}: {key}"
    assert all(isinstance(side, int) for side in tensor["spatial_shape"]), where
    assert all(isinstance(end, int | float) for end in tensor["value_range"]), where
    assert isinstance(tensor.get("is_patch_data", False), bool), where
    names = tensor.get("channel_def", {})
    assert all(isinstance(name, str) for name in names.values()), where


@every_bundle
def test_named_packages_lie_in_the_ranges_of_setup_cfg(bundle):
    setup = IniParser()
    setup.read(REPOSITORY / "setup.cfg")
    lines = setup["options"]["install_requires"].split()
    ranges = {r.name: r.specifier for r in map(Requirement, lines)}
    metadata = json.loads((bundle / "configs" / "metadata.json").read_text(encoding="utf-8"))
    named_versions = metadata["required_packages_version"] | {
        "monai": metadata["monai_version"],
        "torch": metadata["pytorch_version"],
        "numpy": metadata["numpy_version"],
    }
    for name, version in named_versions.items():
        assert name in ranges, f"{name} is not in install_requires"
        assert version in ranges[name], f"{name} {version} is outside {ranges[name]}"


def bundle_commands(text: str) -> list[list[str]]:
    """The words of every `monai.bundle run` in a text, continued lines joined."""
    joined = re.sub(r"\\\n\s*", " ", text)
    found = re.findall(r"monai\.bundle run [^\n`&|;>)]*", joined)
    return [shlex.split(command) for command in found]


def unknown_flags(words: list[str], root: Path) -> set[str] | None:
    """The `--key` words that no config file of the command holds; None if a file is not there."""
    value = words[words.index("--config_file") + 1]
    paths = [root / name for name in (yaml.safe_load(value) if value[0] == "[" else [value])]
    if not all(path.is_file() for path in paths):
        return None
    known = RUNNER_ARGUMENTS | {"bundle_root"}
    known |= {key.lstrip("+").split("::")[0] for path in paths for key in read(path)}
    flags = [re.split("=|::", word[2:])[0] for word in words if word.startswith("--")]
    return set(flags) - known


def check_flags(words: list[str], roots: list[Path], where: str) -> None:
    """Asserts that the command fits at least one of the folders from which it may be run."""
    found = [unknown_flags(words, root) for root in roots]
    assert set() in found, f"{where}: {' '.join(words)}: unknown: {found}"


@pytest.mark.parametrize("path", DOCUMENTS, ids=named)
def test_every_documented_knob_exists(path):
    text = path.read_text(encoding="utf-8")
    in_bundle = path.parents[2] == REPOSITORY / "bundles"
    roots = [path.parents[1]] if in_bundle else [REPOSITORY, REPOSITORY / "bundles", *BUNDLES]
    for words in bundle_commands(text):
        check_flags(words, roots, named(path))


def test_the_makefile_sets_knobs_that_exist():
    targets = ["setup", "demo", "test", "lint", "tiny_weights", "segmentation_weights"]
    targets += ["paper_small", "study"]
    targets += ["EXPERIMENT=x.yaml", f"DATA={REPOSITORY}"]
    done = subprocess.run(
        ["make", "--dry-run", *targets], cwd=REPOSITORY, capture_output=True, text=True, check=True
    )
    commands = bundle_commands(done.stdout)
    assert len(commands) == 9
    for words in commands:
        check_flags(words, [REPOSITORY], "Makefile")
    assert "diffboost study workflow/experiments/demo.yaml" in done.stdout
    assert "diffboost study workflow/experiments/paper_small.yaml" in done.stdout


def test_the_workflow_sets_knobs_that_exist(tmp_path):
    command = [sys.executable, "-m", "diffboost.cli", "study", "workflow/experiments/demo.yaml"]
    command += ["--dry_run", "--runs_dir", str(tmp_path), "--snakemake=--printshellcmds --forceall"]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=600)
    output = done.stdout + done.stderr
    assert done.returncode == 0, output
    commands = bundle_commands(output)
    assert len(commands) == 3 + 2 * 9, output  # prepare, finetune, synthesize; 9 segmenters
    for words in commands:
        check_flags(words, [REPOSITORY], "Snakefile")
        assert words[words.index("--image_size") + 1] == "64", words  # every stage hears of it


@pytest.mark.parametrize(
    "name",
    [
        f"{PRETRAIN}/configs/train.yaml",
        f"{PRETRAIN}/configs/evaluate.yaml",
        f"{FINETUNE}/configs/train.yaml",
        "diffboost_synthesis/configs/inference.yaml",
        "diffboost_segmentation/configs/train.yaml",
    ],
)
def test_a_slice_store_can_be_given_by_monais_name_for_it(name):
    """A run that was given `dataset_dir` read another store in silence."""
    config = read(REPOSITORY / "bundles" / name)
    parser = BundleParser(config | {"dataset_dir": "elsewhere"})
    assert parser.get_parsed_content("store_dir") == "elsewhere"
    assert "@store_dir" in str(config)  # which the rest of the file reads


def test_a_wrong_flag_is_found():
    words = "run --config_file configs/train.yaml --lerning_rate 3".split()
    with pytest.raises(AssertionError, match="lerning_rate"):
        check_flags(words, [REPOSITORY / "bundles" / FINETUNE], "here")
