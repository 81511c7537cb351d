"""Refuses misspelt knobs: on the command line of a bundle run, and in experiment and task files."""

import ast
import difflib
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import TracebackType

from diffboost.data.documents import read_config

# What `monai.bundle run` takes itself, and ids that MONAI reads though no config need hold them.
RUNNER_ARGUMENTS = {
    "run_id",
    "init_id",
    "final_id",
    "meta_file",
    "config_file",
    "logging_file",
    "tracking",
    "args_file",
}
RUNNER_IDS = {"bundle_root", "run_name", "_meta_"}
WRAPPED = ("Failed to instantiate", "Failed to evaluate")  # how MONAI's own errors begin
ERROR = "ERROR: "


def nearest(name: str, allowed: Iterable[str]) -> str:
    """A clause for error messages: the nearest allowed name, and all of them.

    Args:
        name: what was given.
        allowed: what could have been given.

    Returns:
        "did you mean 'x'? allowed: x, y", without the question if nothing is near.

    Source: engineering choice
    """
    allowed = sorted(str(word) for word in allowed)
    near = difflib.get_close_matches(str(name), allowed, n=1, cutoff=0.5)
    question = f"did you mean '{near[0]}'? " if near else ""
    return f"{question}allowed: {', '.join(allowed)}"


def refuse_unknown(mapping: Mapping, allowed: Iterable[str], where: str) -> None:
    """Raises if a key of `mapping` is not allowed.

    Args:
        mapping: keys as a person wrote them.
        allowed: the names that exist.
        where: the file or section that holds the keys, for the message.

    Raises:
        ValueError: names the key, its value, the nearest allowed name and all allowed names.

    Source: engineering choice
    """
    allowed = set(allowed)
    for key, value in mapping.items():
        if key not in allowed:
            raise ValueError(f"{where}: unknown key '{key}' ({value!r}); {nearest(key, allowed)}")


def read_flags(arguments: list[str]) -> dict[str, str]:
    """The `--key value` and `--key=value` pairs of a command line, in order.

    A value that itself begins with `--` is read as the next key, as fire does.

    Source: engineering choice
    """
    flags = {}
    for position, argument in enumerate(arguments):
        if not argument.startswith("--") or argument == "--":
            continue
        key, equals, value = argument[2:].partition("=")
        following = arguments[position + 1 : position + 2]
        if not equals and following and not following[0].startswith("--"):
            value = following[0]
        flags[key] = value
    return flags


def config_paths(value: str) -> list[str]:
    """The config files that `--config_file` names: one path, or a list written in Python's form."""
    return list(ast.literal_eval(value)) if value.lstrip().startswith(("[", "(")) else [value]


def check_command_line() -> None:
    """Refuses an override of `monai.bundle run` whose top-level id is in none of its config files.

    First in every `run` list. From there on errors end with their message, see
    ``end_with_message``. Does nothing in a process that is not such a run (MONAI Label,
    federated clients, notebooks). Below the top level MONAI itself complains of most mistakes.

    Raises:
        SystemExit: names the override, its value and the nearest id (a person reads it: no trace).

    Source: engineering choice (MONAI 1.6.1 accepts a misspelt override in silence)
    """
    if (
        Path(sys.argv[0]).parts[-3:] != ("monai", "bundle", "__main__.py")
        or "run" not in sys.argv[1:2]
    ):
        return
    end_with_message()
    flags = read_flags(sys.argv[1:])
    settings = dict(flags)
    if "args_file" in flags:
        settings = read_config(flags["args_file"], "args_file") | flags
    files = settings.get("config_file", [])
    files = config_paths(files) if isinstance(files, str) else files
    known = set().union(*(read_config(path, "config_file") for path in files))
    known = {_top_level(key) for key in known} | RUNNER_IDS | RUNNER_ARGUMENTS
    overrides = {_top_level(key): value for key, value in settings.items()}
    try:
        refuse_unknown(overrides, known, f"command line of {', '.join(map(str, files))}")
    except ValueError as error:
        raise SystemExit(str(error)) from None


def end_with_message() -> None:
    """From now on a process that an error ends says it on its last line, below the traceback.

    MONAI's runner wraps an error once for each part of a config that needed the one that failed,
    and its own words come last.

    Source: engineering choice
    """
    sys.excepthook = _print_error


def _print_error(
    kind: type[BaseException], error: BaseException, trace: TracebackType | None
) -> None:
    sys.stdout.flush()  # logs, which would come after it
    sys.__excepthook__(kind, error, trace)
    if isinstance(error, Exception):
        sys.stderr.write(f"{ERROR}{message_of(error)}\n")


def message_of(error: BaseException) -> str:
    """What an error says, without MONAI's wrapping; with its kind, unless a person reads it well.

    Source: engineering choice
    """
    while str(error).startswith(WRAPPED) and error.__cause__ is not None:
        error = error.__cause__
    plain = isinstance(error, ValueError | OSError) and str(error)
    return str(error) if plain else f"{type(error).__name__}: {error}"


def _top_level(key: str) -> str:
    """The first part of a config id: `train` of `+train::handlers` or `train#handlers`."""
    return key.lstrip("+").replace("#", "::").split("::")[0].replace("-", "_")
