"""The stages of a study: the config of each, and the command that runs one."""

import fcntl
import os
import shlex
import sys
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from fire.parser import DefaultParseValue

from diffboost.data.documents import read_yaml
from diffboost.knobs import ERROR

CLIENT = Path(__file__).with_name("warm_client.py")
WORKFLOW = Path(__file__).parents[2] / "workflow"


def stage_configs(workflow_dir: Path = WORKFLOW) -> dict[str, Path]:
    """The config file of each section of an experiment file, as workflow/stages.yaml names them.

    Raises:
        FileNotFoundError: the package is not in a checkout.

    Source: engineering choice
    """
    path = workflow_dir / "stages.yaml"
    if not path.is_file():
        raise FileNotFoundError(
            f"{path} is not there: studies run from a checkout (pip install -e .)"
        )
    stages = read_yaml(path, "stages")
    return {name: workflow_dir.parent / "bundles" / config for name, config in stages.items()}


def bundle_run(
    config_files: list[str | Path],
    settings: Mapping,
    knobs: Mapping,
    processes: int = 1,
) -> str:
    """The shell command of one stage, quoted.

    Args:
        config_files: the config file, then its overlays; the first one's bundle is the root.
        settings: what the study decides, such as folders, fold and seed; None leaves a key out.
        knobs: the experiment's section for this stage.
        processes: of torchrun; the last of the config files must then be an overlay for it.

    Raises:
        ValueError: a knob is one of the settings.

    Source: engineering choice
    """
    files = [str(path) for path in config_files]
    settings = {key: value for key, value in settings.items() if value is not None}
    for key in knobs:
        if key in settings:
            raise ValueError(
                f"`{key}` (value {knobs[key]!r}) is set by the study, not in a section"
            )
    words = ["python"]
    if processes > 1:  # standalone: a port of its own, so that studies may share a machine
        words += ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    words += ["-m", "monai.bundle", "run"]
    words += ["--config_file", files[0] if len(files) == 1 else repr(files)]
    words += ["--bundle_root", str(Path(files[0]).parents[1])]
    for key, value in (settings | dict(knobs)).items():
        words += [f"--{key}", _told(value)]
    return shlex.join(words)


def _told(value: object) -> str:
    """A value as fire, which reads every flag as Python where it can, gives it back."""
    if not isinstance(value, str | Path):
        return repr(value)
    text = str(value)
    return text if DefaultParseValue(text) == text else repr(text)


@contextmanager
def warm_programs() -> Iterator[Path]:
    """A folder to put first on the PATH of stages, whose imports are then done once.

    It holds a `python` and a `diffboost` that hand their work to a warm process, see `warm_client`,
    and the sockets of these, for this user alone. Warm processes end with the block, or when this
    process ends without leaving it.

    Source: engineering choice (issue 6, "Start-up")
    """
    with tempfile.TemporaryDirectory(prefix="diffboost-", ignore_cleanup_errors=True) as name:
        folder = Path(name)
        for program in ("python", "diffboost"):
            words = [sys.executable, "-I", "-S", str(CLIENT), name, program]
            (folder / program).write_text(f'#!/bin/sh\nexec {shlex.join(words)} "$@"\n')
            (folder / program).chmod(0o700)
        with (folder / "study").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield folder


def failures(run_dir: Path, since: float) -> list[str]:
    """What ended stages of a study, with the log of each.

    Args:
        run_dir: folder of the study.
        since: logs that were written later than this are looked at; seconds of the epoch.

    Source: engineering choice (Snakemake prints whole logs)
    """
    found = []
    for log in sorted((run_dir / "logs").rglob("*.log")):
        if log.stat().st_mtime >= since:
            lines = log.read_text(errors="replace").splitlines()
            said = [line for line in lines if line.startswith(ERROR)]
            found += [f"{said[-1]}\n  log: {log}"] if said else []
    return found


def why_cold(options: list[str]) -> str | None:
    """Why stages cannot share a process, or None where they can.

    Args:
        options: those for Snakemake.

    Source: engineering choice
    """
    if sys.platform != "linux":
        return f"a warm process needs Linux, not {sys.platform}"
    elsewhere = ("--executor", "--profile", "--workflow-profile", "-e")
    if any(word.split("=")[0] in elsewhere for word in options):
        return "Snakemake's options name an executor or a profile"
    return "SNAKEMAKE_PROFILE is set" if "SNAKEMAKE_PROFILE" in os.environ else None
