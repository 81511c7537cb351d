"""Misspelt knobs are refused: in mappings, on the command line of a bundle run, by `diffboost`."""

import inspect
import subprocess
import sys
from pathlib import Path

import pytest
from monai.bundle.scripts import run

from diffboost import cli
from diffboost.command_line import check_arguments
from diffboost.knobs import (
    RUNNER_ARGUMENTS,
    check_command_line,
    config_paths,
    message_of,
    nearest,
    read_flags,
    refuse_unknown,
)
from diffboost.stages import WORKFLOW, failures

RUNNER = "site-packages/monai/bundle/__main__.py"
TRAIN = """
bundle_root: .
learning_rate: 1.0e-3
train: {epochs: 1}
run:
  - {_target_: diffboost.knobs.check_command_line}
  - $print('first step at', @learning_rate)
"""


@pytest.fixture
def config(tmp_path):
    path = tmp_path / "train.yaml"
    path.write_text(TRAIN)
    return str(path)


def run_check(monkeypatch, *words):
    monkeypatch.setattr(sys, "argv", [RUNNER, "run", *words])
    monkeypatch.setattr(sys, "excepthook", sys.excepthook)  # which the check replaces
    check_command_line()


def test_nearest_names_the_likely_word_and_all():
    assert nearest("lerning_rate", ["epochs", "learning_rate"]) == (
        "did you mean 'learning_rate'? allowed: epochs, learning_rate"
    )
    assert nearest("zzz", ["epochs"]) == "allowed: epochs"


def test_refuse_unknown_names_place_key_and_value():
    refuse_unknown({"epochs": 1}, ["epochs"], "here")
    with pytest.raises(ValueError, match="here: unknown key 'epoch' .3.; did you mean 'epochs'"):
        refuse_unknown({"epoch": 3}, ["epochs"], "here")


def test_flags_are_read_in_both_forms():
    words = ["run", "--epochs", "3", "--dry-run", "--alpha=0.6", "--x", "-1"]
    assert read_flags(words) == {"epochs": "3", "dry-run": "", "alpha": "0.6", "x": "-1"}


def test_the_runners_own_arguments_are_monais():
    assert RUNNER_ARGUMENTS == set(inspect.signature(run).parameters) - {"override"}


def test_a_study_is_planned_without_torch():
    code = "import sys; import diffboost.cli, diffboost.plans; "
    code += "sys.exit(bool({'torch', 'monai', 'pandas', 'matplotlib'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_config_file_may_be_a_list():
    assert config_paths("a.yaml") == ["a.yaml"]
    assert config_paths("['a.yaml', 'b.yaml']") == ["a.yaml", "b.yaml"]


def test_known_overrides_pass(monkeypatch, config):
    words = ["--learning_rate=2", "--train::epochs", "3", "--+train", "{}", "--train#epochs", "4"]
    run_check(monkeypatch, "--config_file", config, "--bundle_root", ".", *words)


def test_a_key_of_an_overlay_is_known(monkeypatch, config, tmp_path):
    (tmp_path / "overlay.yaml").write_text("'+train': {a: 1}\nmerge: logits\n")
    files = repr([config, str(tmp_path / "overlay.yaml")])
    run_check(monkeypatch, "--config_file", files, "--merge", "images")
    with pytest.raises(SystemExit, match="unknown key 'merg'.*did you mean 'merge'"):
        run_check(monkeypatch, "--config_file", files, "--merg", "images")


def test_args_file_is_checked_too(monkeypatch, config, tmp_path):
    (tmp_path / "args.yaml").write_text(f"config_file: {config}\nlerning_rate: 3\n")
    with pytest.raises(SystemExit, match="lerning_rate"):
        run_check(monkeypatch, "--args_file", str(tmp_path / "args.yaml"))


def test_other_processes_are_left_alone(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["monailabel", "start_server", "--anything", "1"])
    check_command_line()


def test_a_real_run_stops_before_its_first_step(config):
    command = [sys.executable, "-m", "monai.bundle", "run", "--config_file", config]
    done = subprocess.run(
        [*command, "--lerning_rate", "4"], capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 1
    assert "did you mean 'learning_rate'?" in done.stderr
    assert "first step" not in done.stdout


def test_a_stage_ends_with_what_went_wrong(tmp_path):
    """It ended with MONAI's "Failed to instantiate component", two tracebacks after the message."""
    needed = "{_target_: diffboost.data.slices.read_store, store_dir: nowhere}"
    path = tmp_path / "train.yaml"
    path.write_text(TRAIN + f"  - $@store\nstore: {needed}\n")
    command = [sys.executable, "-m", "monai.bundle", "run", "--config_file", str(path)]
    with (tmp_path / "log").open("w") as log:
        done = subprocess.run(command, stdout=log, stderr=subprocess.STDOUT, timeout=600)
    lines = (tmp_path / "log").read_text().splitlines()
    assert done.returncode == 1 and "Traceback (most recent call last):" in lines
    assert lines[-1].startswith(f"ERROR: store_dir: no such folder: {Path.cwd()}/nowhere; write")


def test_the_message_of_an_error_is_the_one_below_monais():
    first = ValueError("label: none")
    first.__cause__ = OSError("what it came from")
    second = RuntimeError("Failed to evaluate x")
    second.__cause__ = first
    third = RuntimeError("Failed to instantiate component y")
    third.__cause__ = second
    assert message_of(third) == "label: none"
    assert message_of(KeyError("x")) == "KeyError: 'x'"
    assert message_of(AssertionError()) == "AssertionError: "


def test_a_failed_study_says_why_and_where(tmp_path):
    logs = tmp_path / "logs" / "ablation"
    logs.mkdir(parents=True)
    (logs / "a.log").write_text("Traceback\nERROR: arm: 'x'\nwarm process: 1 s")
    (logs / "b.log").write_text("2026 - INFO - ERROR: none\n")
    assert failures(tmp_path, 0.0) == [f"ERROR: arm: 'x'\n  log: {logs / 'a.log'}"]
    assert failures(tmp_path, (logs / "a.log").stat().st_mtime + 1) == []
    assert failures(tmp_path / "new", 0.0) == []


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["report", "nowhere"], "run_dir: nowhere holds no experiment.yaml"),
        (["package", "bundles/foo"], "metadata: there is no file bundles/foo/configs/metadata"),
        (["stdy", "demo.yaml"], "unknown key 'stdy'.*did you mean 'study'"),
        (["study", "demo.yaml", "--corse", "4"], "unknown key 'corse'.*did you mean 'cores'"),
        (["study", "missing.yaml"], "there is no file .*missing.yaml"),
    ],
)
def test_diffboost_refuses(monkeypatch, words, message):
    monkeypatch.setattr(sys, "argv", ["diffboost", *words])
    with pytest.raises(SystemExit, match=message):
        cli.main()


@pytest.mark.parametrize("flag", ["--help", "-h"])
def test_help_after_a_file_name_runs_nothing(flag, monkeypatch, tmp_path, capsys):
    """`diffboost study FILE --help` began the study and explained its result, None (0.6.0)."""
    example = WORKFLOW / "experiments/demo.yaml"
    arguments = ["study", str(example), "--runs_dir", str(tmp_path), flag]
    monkeypatch.setattr("sys.argv", ["diffboost", *arguments])
    monkeypatch.setattr(cli, "_run", lambda *_: pytest.fail("the study was begun"))
    with pytest.raises(SystemExit) as stopped:
        cli.main()
    assert stopped.value.code == 0
    assert "how many processor cores" in "".join(capsys.readouterr())
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("given", "read"),
    [
        (["--dry_run", "false"], ["--dry_run", "False"]),
        (["--dry-run=true", "--cores", "2"], ["--dry-run=True", "--cores", "2"]),
        (["--dry_run"], ["--dry_run"]),
        (["--dry_run", "--target", "true"], ["--dry_run", "--target", "true"]),
    ],
)
def test_yes_or_no_is_read_however_it_is_spelled(given, read):
    """fire took `false` for a text, which is true."""
    words = ["study", "x.yaml"]
    assert check_arguments([*words, *given], cli.COMMANDS) == [*words, *read]
    with pytest.raises(ValueError, match="warm: 'no'; allowed: True, False"):
        check_arguments([*words, "--warm", "no"], cli.COMMANDS)
