"""The pages are held to the code: commands, flags, files, links, YAML and docstrings exist and fit.

Knobs of `monai.bundle run` are held to the configs in test_bundles.py, for these pages too.
"""

import ast
import re
import sys
from dataclasses import fields
from pathlib import Path

import pytest
import raw_data
import yaml
from documents import (
    BUNDLES,
    DOCUMENTS,
    REPOSITORY,
    commands_of,
    fences,
    headings,
    inline_commands,
    links,
    shell_commands,
    tree_paths,
    without_placeholders,
)
from monai.bundle import run

from diffboost import cli
from diffboost.command_line import check_arguments
from diffboost.data.tasks import DEFAULTS, LAYOUTS, REQUIRED, read_task
from diffboost.experiments import read_experiment
from diffboost.plans import Experiment
from diffboost.prepare import prepare

MAKEFILE = (REPOSITORY / "Makefile").read_text(encoding="utf-8")
# What a reader may be told to call; a new program is added here, a misspelt one is found.
PROGRAMS = {"python", "python3", "torchrun", "diffboost", "make", "cd", ".", "source", "export"}
PROGRAMS |= {"pip", "hf", "git", "curl", "zip", "unzip", "ls", "cat", "cp", "mkdir", "monailabel"}
PROGRAMS |= {"nvflare", "mlflow", "tensorboard", "bash", "mkdocs", "snakemake"}
MADE = re.compile(r"bundles/\w+/(models|eval)\b")  # by runs; ignored by git
PACKAGE = REPOSITORY / "common" / "diffboost"
MODULES = sorted(PACKAGE.rglob("*.py"))
ARGUMENT = re.compile(r"^ {4}(\*{0,2}\w+(?:, \*{0,2}\w+)*)(?: \([^)]*\))?: ", re.MULTILINE)


def name_of(path: Path) -> str:
    return str(path.relative_to(REPOSITORY))


every_document = pytest.mark.parametrize("path", DOCUMENTS, ids=name_of)


def check_command(words: list[str]) -> None:
    """Asserts that program, commands, flags and targets of a documented command exist."""
    words = without_placeholders(words)
    program, arguments = words[0], words[1:]
    known = program in PROGRAMS or (REPOSITORY / program).is_file()
    assert known or Path(program).name in PROGRAMS, f"{program}: no program that we know: {words}"
    if program == "diffboost" and arguments:
        check_arguments(arguments, cli.COMMANDS)
    elif program == "make":
        check_make(arguments)
    elif program in ("python", "python3") and arguments[0].endswith(".py"):
        script = (REPOSITORY / arguments[0]).read_text(encoding="utf-8")
        for word in arguments[1:]:
            flag = word.partition("=")[0]
            assert not word.startswith("--") or f'"{flag}"' in script, f"{flag}: {words}"


def check_make(arguments: list[str]) -> None:
    """Asserts that the Makefile has the targets and reads the variables."""
    for word in arguments:
        name, setting, _ = word.partition("=")
        rule = rf"^{name} \?=|\$\({name}\)" if setting else rf"^{re.escape(word)}:"
        assert re.search(rule, MAKEFILE, re.MULTILINE), f"make {' '.join(arguments)}: {word}"


@every_document
def test_every_command_exists(path):
    text = path.read_text(encoding="utf-8")
    for words in shell_commands(text):
        check_command(words)
    for program in ("diffboost", "make", "python"):
        for words in inline_commands(text, program):
            check_command(words)


@every_document
def test_a_documented_training_says_where_it_writes(path):
    """By default it would write to models/, which holds the shipped weights."""
    text = path.read_text(encoding="utf-8")
    commands = [*shell_commands(text), *inline_commands(text, "python")]
    for words in commands:
        if any(re.search(r"\btrain\.yaml", word) for word in words):
            assert "--output_dir" in words, " ".join(words)


@every_document
def test_no_command_names_a_version_of_ours(path):
    """It would go stale with the next one; the pages say `<version>`."""
    for _, block in fences(path.read_text(encoding="utf-8")):
        named = re.findall(r"""(?:diffboost|pretrain|finetune|synthesis|segmentation)-\d[\w.]*"""
                           r"""|\bversion=["']?\d[\w.]*""", block)  # fmt: skip
        assert not named, named


@every_document
def test_every_named_path_exists(path):
    for name in sorted(tree_paths(path.read_text(encoding="utf-8"))):
        if MADE.match(name):
            continue
        roots = [REPOSITORY, path.parents[1], *BUNDLES]
        assert any(list(root.glob(name.rstrip("/"))) for root in roots), f"{name} is not there"


@every_document
def test_every_link_leads_to_a_file_and_a_heading(path):
    for link in links(path.read_text(encoding="utf-8")):
        name, _, anchor = link.partition("#")
        target = (path.parent / name).resolve() if name else path
        assert REPOSITORY in target.parents and target.is_file(), link
        if anchor and target.suffix == ".md":
            assert anchor in headings(target.read_text(encoding="utf-8")), link


@every_document
def test_every_task_and_experiment_is_read(path, tmp_path):
    for language, block in fences(path.read_text(encoding="utf-8")):
        content = yaml.safe_load(block) if language == "yaml" else None
        if isinstance(content, dict) and "layout" in content:
            assert read_task(content)["name"] == content["name"]
        if isinstance(content, dict) and "arms" in content:
            (tmp_path / "experiment.yaml").write_text(block)
            assert read_experiment(tmp_path / "experiment.yaml").name == content["name"]


@pytest.mark.parametrize("path", sorted((REPOSITORY / "docs").glob("*.md")), ids=name_of)
def test_a_page_is_short_and_has_one_title(path):
    text = path.read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 120
    assert len(re.findall(r"^# ", re.sub(r"^```.*?^```", "", text, flags=re.M | re.S), re.M)) == 1


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("diffbost study x.yaml", "no program"),
        ("make dmo", "dmo"),
        ("make study EXPERMENT=x.yaml", "EXPERMENT"),
        ("python benchmarks/counts.py --sizzes 3", "--sizzes"),
    ],
)
def test_a_wrong_command_is_found(line, message):
    with pytest.raises(AssertionError, match=message):
        check_command(*commands_of(line))


def test_a_wrong_flag_of_diffboost_is_found():
    with pytest.raises(ValueError, match="did you mean 'store_dir'"):
        check_command(*commands_of("diffboost audit memorization x --stor_dir y"))


def signature(node: ast.AST) -> set[str] | None:
    """Parameters of a function or a class; None where a base class may have more."""
    if isinstance(node, ast.ClassDef):
        inner = [item for item in node.body if getattr(item, "name", "") == "__init__"]
        fields = {item.target.id for item in node.body if isinstance(item, ast.AnnAssign)}
        return signature(inner[0]) if inner else fields if fields and not node.bases else None
    found = node.args.posonlyargs + node.args.args + node.args.kwonlyargs
    found += [star for star in (node.args.vararg, node.args.kwarg) if star]
    return {argument.arg for argument in found}


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_docstrings_name_parameters_that_exist(path):
    tree = ast.parse(path.read_text(encoding="utf-8"))
    assert ast.get_docstring(tree), "a module says what it is for"
    for node in ast.walk(tree):
        if not isinstance(node, ast.FunctionDef | ast.ClassDef) or node.name.startswith("_"):
            continue
        section = re.search(
            r"^Args:\n((?: .*\n|\n)*)", (ast.get_docstring(node) or "") + "\n", re.M
        )
        known = signature(node)
        if section and known is not None:
            named = ", ".join(ARGUMENT.findall(section[1])).replace("*", "").split(", ")
            assert set(named) <= known, f"{node.name}: {sorted(set(named) - known)}"


def documented_task(page: str, name: str) -> dict:
    """The task of that name in a page's YAML blocks."""
    text = (REPOSITORY / "docs" / page).read_text(encoding="utf-8")
    found = [yaml.safe_load(block) for language, block in fences(text) if language == "yaml"]
    return next(content for content in found if content["name"] == name)


def test_the_page_of_tasks_lists_every_key_with_its_default_and_every_layout():
    text = (REPOSITORY / "docs/new_task.md").read_text(encoding="utf-8")
    layouts, keys = (part.split("\n\n")[0] for part in re.split(r"(?:\|---)+\|\n", text)[1:])
    assert re.findall(r"^\| `(\w+)`", layouts, re.M) == list(LAYOUTS)
    told = {}
    for row in keys.splitlines():
        names, default = (cell.strip() for cell in row.split(" | ")[:2])
        value = None if default == "needed" else yaml.safe_load(default.strip("`"))
        told |= dict.fromkeys(re.findall(r"`(\w+)`", names), (default == "needed", value))
    known = dict.fromkeys(REQUIRED, (True, None))
    assert told == known | {key: (False, value) for key, value in DEFAULTS.items()}


def test_the_readme_lists_every_key_of_an_experiment():
    text = (REPOSITORY / "README.md").read_text(encoding="utf-8")
    table = text.partition("| key of an experiment |")[2].partition("\n\n")[0]
    rows = [row.split(" | ")[0] for row in table.splitlines()[2:]]
    told = {name for row in rows for name in re.findall(r"`(\w+)`", row)}
    assert told == {entry.name for entry in fields(Experiment)} - {"ablations"}


def test_the_task_of_the_page_and_the_audits_command_run(tmp_path, monkeypatch, caplog):
    root = raw_data.write_busi(tmp_path / "scans", 4)
    task = documented_task("new_task.md", "thyroid")
    store = prepare(root, tmp_path / "store", task, 32, edges="gradient", num_folds=2)
    words = next(iter(shell_commands((REPOSITORY / "docs/audit.md").read_text(encoding="utf-8"))))
    words = [word.replace("runs/demo/store", str(store)) for word in words[:4]]
    monkeypatch.setattr(sys, "argv", words)
    caplog.set_level("INFO")
    cli.main()
    assert f"no leak in {store}" in caplog.text


def test_the_first_command_of_the_start_page_runs(tmp_path):
    text = (REPOSITORY / "docs/start.md").read_text(encoding="utf-8")
    words = next(
        words for words in shell_commands(text) if words[1:4] == ["-m", "monai.bundle", "run"]
    )
    settings = {key[2:]: value for key, value in zip(words[4::2], words[5::2], strict=True)}
    settings |= {key: str(REPOSITORY / settings[key]) for key in ("config_file", "bundle_root")}
    settings |= {"store_dir": str(tmp_path / "store"), "image_size": 32}
    run(**settings, phantoms={"num_training": 3, "num_test": 1}, group_duplicates=False)
    assert (tmp_path / "store" / "contact_sheet.png").is_file()
