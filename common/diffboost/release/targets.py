"""Whether all that a release's configs name is there: components, weights, tasks and files."""

import ast
import importlib
import re
from functools import lru_cache
from pathlib import Path

from monai.bundle.config_item import ComponentLocator

from diffboost.data.documents import read_config
from diffboost.release.contents import (
    PACKAGE_DIR,
    WEIGHTS,
    config_files,
    shipped_weights,
    strings,
)

PACKAGE = PACKAGE_DIR.name
# Where components may come from, beside the package: what metadata.json requires, and functions
# of Python's own operators.
LIBRARIES = ("monai", "torch", "ignite", "numpy", "operator")
BELOW_ROOT = re.compile(r"^\$@bundle_root \+ '/([^']+)'$")
MADE = ("output_dir", "partial_dir", "cache_dir", "evaluation_dir")  # by a run
INPUT_SUFFIXES = (".yaml", ".yml", ".json", ".pt", ".safetensors", ".csv", ".txt", ".parquet")


def check_names(release: Path) -> None:
    """Refuses a release whose configs name something that it lacks. Runs none of its code.

    Args:
        release: folder with ``configs`` and, beside it, the package.

    Raises:
        ValueError: a ``_target_`` is neither in the release's package nor in a library that it
            requires; weights of the package or a task, by name, are missing; inference reads a file
            or folder that is not there; or a path lies outside. Names all of them.

    Source: engineering choice (issue 4, "a config names something that the release lacks").
    """
    missing = []
    for path in config_files(release):
        for where, text in strings(read_config(path, "config")):
            key = where.rpartition("::")[2]
            reason = _why_missing(release, path, key, text)
            if reason:
                missing.append(f"{path.name}: {where}: {text!r} {reason}")
    if missing:
        raise ValueError(f"configs name what {release} lacks: {'; '.join(sorted(set(missing)))}")


def _why_missing(release: Path, path: Path, key: str, text: str) -> str:
    """Why what a text names is not there; "" where it is, or names nothing."""
    if key == "_target_" and not text.startswith(("$", "@")):
        return _why_no_component(release, text)
    tasks = release / PACKAGE / "data" / "tasks"
    if key == "task" and re.fullmatch(r"\w+", text) and tasks.is_dir():
        return "" if (tasks / f"{text}.yaml").is_file() else f"is no task in {PACKAGE}/data/tasks"
    if text in shipped_weights() and not (release / PACKAGE / WEIGHTS / text).is_dir():
        return f"is not in {PACKAGE}/{WEIGHTS}"
    if text.startswith(("/", "~", "file:")) or re.match(r"[A-Za-z]:[\\/]", text):
        return "is a path of another machine"
    below = BELOW_ROOT.match(text)
    if path.stem == "inference" and below and key not in MADE:
        return "" if (release / below[1]).exists() else "is not in the release"
    if text.endswith(INPUT_SUFFIXES) and re.fullmatch(r"[\w./-]+/[\w.-]+", text):
        return "" if (release / text).is_file() else "is not in the release"
    return ""


def _why_no_component(release: Path, target: str) -> str:
    """Why a ``_target_`` cannot be found from the release; "" where it can."""
    first, _, name = target.partition(".")
    if first == PACKAGE:
        return "" if _is_defined(release, target) else "is not in the release's package"
    if not name:
        module = ComponentLocator().get_component_module_name(target)
        return "" if module else "is no component of MONAI"
    if first not in LIBRARIES:
        return f"comes from {first!r}; allowed are {PACKAGE}, {', '.join(LIBRARIES)}"
    return "" if _is_importable(target) else "is not importable"


@lru_cache(maxsize=1024)
def _is_importable(target: str) -> bool:
    """Whether a library has a dotted name."""
    module, _, name = target.rpartition(".")
    try:
        return hasattr(importlib.import_module(module), name)
    except ModuleNotFoundError:
        return bool(module) and "." in module and _is_importable(module)


def _is_defined(release: Path, target: str) -> bool:
    """Whether a module of the release's package defines a name, by its text."""
    parts = target.split(".")
    for length in range(len(parts) - 1, 0, -1):
        module = release.joinpath(*parts[:length])
        for file in (module.with_suffix(".py"), module / "__init__.py"):
            if file.is_file():
                return parts[length] in _names_in(file, file.stat().st_mtime_ns)
    return False


@lru_cache(maxsize=1024)
def _names_in(file: Path, changed_ns: int) -> set[str]:
    """The names at a module's top level; a module that is no Python has none."""
    try:
        tree = ast.parse(file.read_bytes())
    except (SyntaxError, ValueError):
        return set()
    names = {alias.asname or alias.name for node in tree.body
             if isinstance(node, ast.ImportFrom) for alias in node.names}  # fmt: skip
    names |= {node.name for node in tree.body if isinstance(node, ast.ClassDef | ast.FunctionDef)}
    assigned = (node.targets for node in tree.body if isinstance(node, ast.Assign))
    return names | {t.id for targets in assigned for t in targets if isinstance(t, ast.Name)}
