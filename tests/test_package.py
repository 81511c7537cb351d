"""Releases: what they hold, what is refused, and the release of a run's model."""

import ast
import configparser
import json
import shutil
import sys
import zipfile
from pathlib import Path

import pytest
import torch
import yaml
from monai.bundle import ConfigParser, download, download_large_files, load
from small_store import write_store

from diffboost import __version__, cli
from diffboost.files import sha256_of_files
from diffboost.package import json_twin, package, verify
from diffboost.release.blocks import set_blocks, set_section
from diffboost.release.checks import write_manifest
from diffboost.release.contents import strings
from diffboost.release.model import write_base_model
from diffboost.release.targets import check_names
from diffboost.release.trained import _num_parameters, _overlay

REPOSITORY = Path(__file__).parents[1]
BUNDLES = sorted((REPOSITORY / "bundles").iterdir())
SEGMENTATION = REPOSITORY / "bundles" / "diffboost_segmentation"
NAME = SEGMENTATION.name


@pytest.fixture(scope="module")
def released(tmp_path_factory) -> Path:
    """The segmentation bundle's release."""
    return package(str(SEGMENTATION), str(tmp_path_factory.mktemp("dist")))


@pytest.fixture
def release(released, tmp_path) -> Path:
    """A copy of it to spoil."""
    return Path(shutil.copytree(released, tmp_path / NAME))


def seal(release: Path) -> None:
    """A manifest of what is there now."""
    metadata = json.loads((release / "configs" / "metadata.json").read_text())
    write_manifest(release, {"name": metadata["name"], "version": metadata["version"]})


def spoil_metadata(release: Path, **changes) -> None:
    path = release / "configs" / "metadata.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.mark.parametrize("path", sorted(REPOSITORY.glob("bundles/*/configs/*.yaml")), ids=str)
def test_a_twin_says_what_its_config_says(path):
    assert json.loads(json_twin(path)) == yaml.safe_load(path.read_text())
    assert json_twin(path).startswith('{\n    "')


def test_bundles_have_the_version_of_the_package():
    files = (path / "configs" / "metadata.json" for path in BUNDLES)
    assert {json.loads(file.read_text())["version"] for file in files} == {__version__}
    setup = configparser.ConfigParser()
    setup.read(REPOSITORY / "setup.cfg")
    assert setup["metadata"]["version"] == "attr: diffboost.__version__"


def test_a_config_that_json_cannot_say_has_no_twin(tmp_path):
    (tmp_path / "train.yaml").write_text("weights: {1: 0.5}\n")
    with pytest.raises(ValueError, match=r"train.yaml has no JSON twin: keys must be text"):
        json_twin(tmp_path / "train.yaml")


def test_authored_files_are_the_same_bytes(released):
    for name in ("LICENSE", "large_files.yml", "configs/train.yaml", "docs/README.md"):
        assert (released / name).read_bytes() == (SEGMENTATION / name).read_bytes(), name
    for source in (SEGMENTATION / "configs").iterdir():
        assert (released / "configs" / source.name).read_bytes() == source.read_bytes()
    state = torch.load(released / "models" / "model.pt", weights_only=True)
    assert sum(value.numel() for value in state.values()) > 2_700_000
    assert (released / "diffboost" / "segmentation" / "training.py").is_file()
    assert not (released / "diffboost" / "weights").exists()  # no config names a backbone


def test_the_manifest_names_every_file(released):
    manifest = json.loads((released / "manifest.json").read_text())
    files = {p.relative_to(released).as_posix() for p in released.rglob("*") if p.is_file()}
    assert set(manifest["files"]) == files - {"manifest.json"}
    assert manifest["files"]["LICENSE"] == sha256_of_files([SEGMENTATION / "LICENSE"])
    assert manifest["changed"] == {}


def test_download_and_load_take_a_zip_of_a_file_address(released, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "a blank"
    download(name=NAME, url=Path(f"{released}.zip").as_uri(), bundle_dir=str(folder))
    verify(folder / NAME)
    network = load(NAME, bundle_dir=str(folder), workflow_type="inference", source="github")
    assert network(torch.zeros(1, 1, 64, 64)).shape == (1, 2, 64, 64)


@pytest.mark.parametrize("bundle", BUNDLES, ids=lambda path: path.name)
def test_every_bundle_has_weights_for_its_network(bundle, tmp_path):
    """A model.pt that is made or shipped fits network_def, which takes one image tensor."""
    shutil.copytree(bundle / "configs", tmp_path / "configs")
    if (bundle / "models" / "model.pt").is_file():
        shutil.copytree(bundle / "models", tmp_path / "models")
    else:
        write_base_model(tmp_path)
    config = ConfigParser.load_config_file(tmp_path / "configs" / "inference.yaml")
    parser = ConfigParser(config | {"bundle_root": str(tmp_path)})
    network = parser.get_parsed_content("network_def").eval()
    state = torch.load(tmp_path / "models" / "model.pt", weights_only=True)
    network.load_state_dict(state, strict=True)
    formats = json.loads((tmp_path / "configs" / "metadata.json").read_text())
    formats = formats["network_data_format"]
    size = formats["inputs"]["image"]
    with torch.inference_mode():
        found = network(torch.rand(1, size["num_channels"], *size["spatial_shape"]))
    wanted = formats["outputs"]["pred"]
    assert found.shape == (1, wanted["num_channels"], *wanted["spatial_shape"])
    assert (tmp_path / "models" / "lineage.json").is_file()


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda r: (r / "models" / "model.pt").unlink(), "lacks models/model.pt"),
        (lambda r: (r / "docs" / "README.md").write_text("x"), "stale hash of docs/README.md"),
        (lambda r: (r / "models" / "a.pt").write_bytes(b"x"), "does not name: models/a.pt"),
        (lambda r: (r / "manifest.json").unlink(), "manifest.json"),
    ],
)
def test_a_changed_release_is_refused(release, spoil, message):
    spoil(release)
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        verify(release)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"version": "9.9.9"}, "changelog lacks version 9.9.9; it tells of 0"),
        ({"task": 3}, "task: a text is needed"),
        ({"supported_apps": []}, "supported_apps: dict is needed"),
        ({"numpy_version": ">=2"}, "numpy_version: '>=2' is no exact version"),
        ({"network_data_format": {"inputs": {"prompt": "x"}}}, "a tensor 'image' is needed"),
    ],
)
def test_metadata_that_clients_refuse_are_refused(release, changes, message):
    spoil_metadata(release, **changes)
    seal(release)
    with pytest.raises(ValueError, match=message):
        verify(release)


def edit(release: Path, old: str, new: str, name: str = "inference") -> None:
    path = release / "configs" / f"{name}.yaml"
    assert old in path.read_text()
    path.write_text(path.read_text().replace(old, new, 1))
    path.with_suffix(".json").write_text(json_twin(path))


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("_target_: AttentionUnet", "_target_: AtentionUnet", "'AtentionUnet' is no component"),
        ("_target_: Dataset\n", "_target_: os.system\n", "comes from 'os'; allowed are diffboost"),
        ("'/models/model.pt'", "'/models/other.pt'", "models/other.pt'\" is not in the release"),
        ("num_classes: 2", "num_classes: /data/x", "is a path of another machine"),
    ],
)
def test_names_of_what_the_release_lacks_are_refused(release, old, new, message):
    edit(release, old, new)
    with pytest.raises(ValueError, match=message):
        check_names(release)


def test_a_target_that_the_package_beside_it_lacks_is_refused(release):
    (release / "diffboost" / "knobs.py").unlink()
    with pytest.raises(ValueError, match=r"'diffboost.knobs.check_command_line' is not in the"):
        check_names(release)


def test_a_twin_that_differs_is_refused(release):
    path = release / "configs" / "train.json"
    path.write_text(path.read_text().replace('"epochs": 60', '"epochs": 61'))
    seal(release)
    with pytest.raises(ValueError, match=r"train.json is not the JSON twin of train.yaml"):
        verify(release)


@pytest.mark.parametrize("overlay", ["network_unet.yaml", "network_residual_unet.yaml"])
def test_the_overlay_of_a_runs_u_net_is_known_by_its_number_of_weights(overlay):
    """Both say UNet: neither could be released."""
    knobs = {"channels": [8, 16, 32], "num_classes": 3}
    number = _num_parameters(SEGMENTATION, overlay, knobs)
    assert _overlay(SEGMENTATION, "UNet", number, knobs) == overlay
    with pytest.raises(ValueError, match=f"UNet with {number + 1} parameters; .* one: none"):
        _overlay(SEGMENTATION, "UNet", number + 1, knobs)


def test_weights_of_another_network_and_shadow_weights_are_refused(release):
    edit(release, "channels: [16, 32, 64, 128, 128, 256]", "channels: [8, 16]")
    seal(release)
    verify(release)  # the network is not built
    with pytest.raises(ValueError, match=r"does not fit network_def of inference.yaml"):
        verify(release, trust=True)
    shutil.copyfile(release / "models" / "model.pt", release / "models" / "ae.pt")
    seal(release)
    with pytest.raises(ValueError, match=r"ae.pt beside model.pt"):
        verify(release)


def test_large_files_are_checked_and_need_no_network(release):
    file = release / "models" / "model.pt"
    entry = {"path": "models/model.pt", "url": file.as_uri(), "hash_type": "sha256"}
    entry["hash_val"] = sha256_of_files([file])
    path = release / "large_files.yml"
    path.write_text(yaml.safe_dump({"large_files": [entry]}))
    seal(release)
    verify(release)
    download_large_files(bundle_path=str(release))
    path.write_text(yaml.safe_dump({"large_files": [entry | {"hash_val": "0" * 64}]}))
    with pytest.raises(ValueError, match=r"large_files.yml: stale hash of models/model.pt: 0000"):
        verify(release)
    path.write_text(yaml.safe_dump({"large_files": [entry | {"path": "../x"}]}))
    with pytest.raises(ValueError, match=r"'../x' leads out of the folder"):
        verify(release)
    path.write_text(yaml.safe_dump({"large_files": [entry | {"path": "models/vae.bin"}]}))
    with pytest.raises(FileNotFoundError, match=r"models/vae.bin is missing"):
        verify(release)


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["b/../../evil.py"], "entry 'b/../../evil.py' leads out"),
        (["/tmp/evil.py"], "entry '/tmp/evil.py' is absolute"),
        (["b/x", "b/X"], "stands twice"),
        (["b/x", "c/y"], "must lie in one folder"),
    ],
)
def test_an_unsafe_zip_entry_is_refused(tmp_path, names, message):
    with zipfile.ZipFile(tmp_path / "x.zip", "w") as archive:
        for name in names:
            archive.writestr(name, "x")
    with pytest.raises(ValueError, match=message):
        verify(tmp_path / "x.zip")


def test_a_link_in_a_zip_is_refused(tmp_path):
    entry = zipfile.ZipInfo("b/link")
    entry.external_attr = 0o120777 << 16
    with zipfile.ZipFile(tmp_path / "x.zip", "w") as archive:
        archive.writestr(entry, "/etc/passwd")
    with pytest.raises(ValueError, match="entry 'b/link' is no plain file"):
        verify(tmp_path / "x.zip")
    (tmp_path / "y.zip").write_bytes(b"PK\x03\x04 not whole")
    with pytest.raises(ValueError, match=r"y.zip is no whole zip file"):
        verify(tmp_path / "y.zip")


def test_a_model_of_ones_own_is_not_released_as_the_shipped_one(tmp_path):
    bundle = Path(shutil.copytree(SEGMENTATION, tmp_path / NAME))
    (bundle / "models" / "run.json").write_text("{}")
    with pytest.raises(ValueError, match=r"models holds a run of your own.*--run"):
        package(str(bundle), str(tmp_path / "dist"))


@pytest.fixture
def run(tmp_path) -> Path:
    """A finished run on a store of two classes at 32 px, as training leaves it."""
    store, folder = write_store(tmp_path / "store"), tmp_path / "runs" / "balls" / "baseline"
    channels = [4, 8, 8]
    config = ConfigParser.load_config_file(SEGMENTATION / "configs" / "inference.yaml")
    parser = ConfigParser(config | {"channels": channels, "num_classes": 3})
    network = parser.get_parsed_content("network_def")
    folder.mkdir(parents=True)
    torch.save(network.state_dict(), folder / "model.pt")
    (folder / "lineage.json").write_text(json.dumps({"cases": {"case_1": "ab"}, "ancestors": []}))
    record = {"store_dir": str(store), "arm": "baseline", "channels": channels}
    record |= {"network": "AttentionUnet", "num_parameters": 1}
    (folder / "run.json").write_text(json.dumps(record))
    rows = ["case,label,metric,value", "a,shell,dice,0.5", "b,shell,dice,0.75", "a,core,dice,nan"]
    (folder / "metrics.csv").write_text("\n".join(rows) + "\n")
    return folder


def test_the_release_of_a_run_says_what_it_is(run, tmp_path):
    terms = tmp_path / "terms.txt"
    terms.write_text("ours alone\n")
    made = package(str(SEGMENTATION), str(tmp_path / "dist"), str(run.parent), str(terms))
    config = yaml.safe_load((made / "configs" / "inference.yaml").read_text())
    base = yaml.safe_load((SEGMENTATION / "configs" / "inference.yaml").read_text())
    wanted = {"image_size": 32, "num_classes": 3, "channels": [4, 8, 8]}
    assert config == base | wanted
    lines = (made / "configs" / "inference.yaml").read_text().splitlines()
    assert lines[0].startswith("# ") and any("# px, side of a slice" in line for line in lines)
    assert verify(made, trust=True)["changed"]["configs/inference.yaml"] == list(wanted)
    metadata = json.loads((made / "configs" / "metadata.json").read_text())
    assert metadata["eval_metrics"] == {"shell_dice": 0.625, "num_cases": 2}
    outputs = metadata["network_data_format"]["outputs"]["pred"]
    assert outputs["channel_def"] == {"0": "background", "1": "shell", "2": "core"}
    assert (outputs["num_channels"], outputs["spatial_shape"]) == (3, [32, 32])
    terms = (made / "docs" / "data_license.txt").read_text()
    assert terms.startswith("ours alone\n") and "example/" in terms and "Apache-2.0" in terms
    page = (made / "docs" / "README.md").read_text()
    assert "| shell_dice | 0.625 |" in page and "| channels | [4, 8, 8] |" in page
    assert "2,742,830 parameters" not in page and str(run.parent) not in page
    assert (made / "models" / "model.pt").read_bytes() == (run / "model.pt").read_bytes()
    assert "case_1" in (made / "models" / "lineage.json").read_text()
    assert not list(made.parent.glob("*.partial"))


def test_a_run_without_terms_or_with_weights_that_do_not_fit_is_refused(run, tmp_path):
    arguments = str(SEGMENTATION), str(tmp_path / "dist"), str(run)
    with pytest.raises(ValueError, match=r"license: None: name a text file"):
        package(*arguments)
    terms = tmp_path / "terms.txt"
    terms.write_text("ours alone\n")
    torch.save({"a": torch.zeros(1)}, run / "model.pt")
    with pytest.raises(ValueError, match=r"does not fit network_def"):
        package(*arguments, str(terms))
    assert not list((tmp_path / "dist").glob("*.zip"))


def test_blocks_keep_comments_and_other_bytes(tmp_path):
    path = tmp_path / "train.yaml"
    path.write_text("# what\nsize: 64    # px\nlist: [1,\n  2]\n# model\nnet:\n  a: 1\nrun: [x]\n")
    (tmp_path / "overlay.yaml").write_text("# o\nnet:\n  b: 2  # why\n")
    text, changed = set_blocks(path, {"size": 32, "list": [3], "x": 1}, tmp_path / "overlay.yaml")
    assert text == "# what\nsize: 32    # px\nlist: [3]\n# model\nnet:\n  b: 2  # why\nrun: [x]\n"
    assert changed == ["size", "list", "net"]
    assert set_section("# a\n\n## B\nold\n\n## C\nc\n", "B", "new") == (
        "# a\n\n## B\nnew\n\n## C\nc\n"
    )


def test_the_command_makes_the_same_zip_and_verifies_it(released, tmp_path, monkeypatch, caplog):
    caplog.set_level("INFO")
    words = ["diffboost", "package", str(SEGMENTATION), "--output_dir", str(tmp_path)]
    monkeypatch.setattr("sys.argv", words)
    cli.main()
    made = next(tmp_path.glob("*.zip"))
    assert made.read_bytes() == Path(f"{released}.zip").read_bytes()
    with zipfile.ZipFile(made) as archive:
        assert {name.partition("/")[0] for name in archive.namelist()} == {NAME}
    monkeypatch.setattr("sys.argv", ["diffboost", "verify", str(made)])
    cli.main()
    assert "whole and unchanged" in caplog.text
    monkeypatch.setattr("sys.argv", ["diffboost", "package"])
    with pytest.raises(SystemExit, match="name one bundle's folder, or say --all"):
        cli.main()


PYPI = {"PIL": "pillow", "ignite": "pytorch-ignite", "yaml": "pyyaml"}
APART = {"diffboost", "monai", "torch", "numpy", "bitsandbytes"}  # the last only where it is chosen


def _loaded(node: ast.AST):
    """A module's statements that run when it is loaded: what a function imports is optional."""
    yield node
    for child in ast.iter_child_nodes(node):
        if not isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            yield from _loaded(child)


def imported(module: str, seen: set[str]) -> None:
    """Adds what a module of the package imports, and what those modules import, to `seen`."""
    path = REPOSITORY / "common" / Path(*module.split("."))
    for file in (path.with_suffix(".py"), path / "__init__.py"):
        if file.is_file() and module not in seen:
            seen.add(module)
            for node in _loaded(ast.parse(file.read_text(encoding="utf-8"))):
                names = [node.module] if isinstance(node, ast.ImportFrom) else []
                names += [a.name for a in node.names] if isinstance(node, ast.Import) else []
                names += [f"{node.module}.{a.name}" for a in node.names] if names[:1] and (
                    isinstance(node, ast.ImportFrom)
                ) else []  # fmt: skip
                for name in names:
                    imported(name, seen) if name.startswith("diffboost") else seen.add(name)


@pytest.mark.parametrize("bundle", BUNDLES, ids=lambda path: path.name)
def test_metadata_names_all_that_the_configs_import(bundle):
    """A virtual environment made from metadata.json alone runs every config."""
    seen: set[str] = set()
    for path in (bundle / "configs").glob("*.yaml"):
        for where, text in strings(yaml.safe_load(path.read_text(encoding="utf-8"))):
            if where.endswith("_target_") and text.startswith("diffboost."):
                imported(text.rpartition(".")[0], seen)
                imported(text.rpartition(".")[0].rpartition(".")[0], seen)
    metadata = json.loads((bundle / "configs" / "metadata.json").read_text(encoding="utf-8"))
    tops = {name.partition(".")[0] for name in seen} - set(sys.stdlib_module_names) - APART
    needed = {PYPI.get(name, name.replace("_", "-")) for name in tops}
    assert needed <= set(metadata["required_packages_version"])


@pytest.mark.parametrize("bundle", BUNDLES, ids=lambda path: path.name)
def test_every_bundle_names_only_what_its_release_has(bundle, tmp_path):
    for folder in bundle.iterdir():
        if folder.name != "models":
            (tmp_path / folder.name).symlink_to(folder)
    (tmp_path / "diffboost").symlink_to(REPOSITORY / "common" / "diffboost")
    (tmp_path / "models").mkdir()
    (tmp_path / "models" / "model.pt").touch()
    check_names(tmp_path)
