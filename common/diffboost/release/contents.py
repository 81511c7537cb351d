"""What goes into a release: the bundle as authored, JSON twins, and the package beside it."""

import re
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path

from diffboost.release.twins import TWINNED, json_twin

PACKAGE_DIR = Path(__file__).parents[1]
WEIGHTS = "weights"
# Of a bundle's folder; what runs leave there (data, eval, models.partial …) is no part of it.
AUTHORED = ("LICENSE", "large_files.yml", "configs", "docs", "example")
MODELS = ("model.pt", "lineage.json", "lineage_cases*.parquet")


def copy_authored(bundle: Path, release: Path) -> None:
    """Copies a bundle's authored files, byte for byte.

    Args:
        bundle: folder of the bundle.
        release: the new folder.

    Raises:
        FileNotFoundError: one of the files that every bundle has is missing.
        ValueError: one of them is a link.

    Source: engineering choice.
    """
    for name in (
        *AUTHORED[:2],
        "configs/metadata.json",
        "configs/inference.yaml",
        "docs/README.md",
    ):
        if not (bundle / name).is_file():
            raise FileNotFoundError(f"bundle: {bundle} has no {name}")
    for source in _authored(bundle):
        if source.is_symlink():
            raise ValueError(f"bundle: {source} is a link; a release has plain files alone")
        _copy(source, release / source.relative_to(bundle))


def _authored(bundle: Path) -> Iterator[Path]:
    """The files that a bundle was authored as."""
    for name in AUTHORED:
        path = bundle / name
        found = [path] if path.is_file() else sorted(path.rglob("*"))
        yield from (file for file in found if file.is_file() and not _is_hidden(file, bundle))


def _is_hidden(path: Path, root: Path) -> bool:
    parts = path.relative_to(root).parts
    return any(part.startswith((".", "__pycache__")) for part in parts)


def copy_model(source_dir: Path, release: Path) -> None:
    """Copies model.pt and what says where it comes from into a release's models/.

    Args:
        source_dir: holds model.pt.
        release: the new folder.

    Source: engineering choice.
    """
    for pattern in MODELS:
        for source in sorted(source_dir.glob(pattern)):
            _copy(source, release / "models" / source.name)


def write_twins(release: Path) -> list[str]:
    """Writes the JSON twins of the client-facing configs; returns their names.

    Args:
        release: folder with ``configs``.

    Raises:
        ValueError: a config has no twin, or one of another name stands in the twin's place.

    Source: engineering choice (clients read JSON; people read YAML).
    """
    names = []
    for name in TWINNED:
        path = release / "configs" / f"{name}.yaml"
        if path.is_file():
            twin = path.with_suffix(".json")
            twin.write_text(json_twin(path), encoding="utf-8")
            names.append(twin.relative_to(release).as_posix())
    return names


def copy_package(release: Path) -> list[str]:
    """Copies this package beside ``configs``, with those of its weights that configs name.

    Args:
        release: folder with ``configs``.

    Returns:
        Names of the weights that go with it.

    Source: engineering choice (design, "The house": a release runs where nothing is installed).
    """
    wanted = named_weights(release)
    for source in sorted(PACKAGE_DIR.rglob("*")):
        place = source.relative_to(PACKAGE_DIR)
        if not source.is_file() or _is_hidden(source, PACKAGE_DIR):
            continue
        if place.parts[0] != WEIGHTS or place.parts[1] in wanted:
            _copy(source, release / "diffboost" / place)
    return wanted


def named_weights(release: Path) -> list[str]:
    """The package's weights that a release's configs name, such as ``tiny``.

    Args:
        release: folder with ``configs``.

    Source: engineering choice.
    """
    texts = (path.read_text(encoding="utf-8") for path in config_files(release))
    plain = (re.sub(r"(^|\s)#.*", "", text) for text in texts)  # without comments
    words = {word for text in plain for word in re.findall(r"\w+", text)}
    return [name for name in shipped_weights() if name in words]


def shipped_weights() -> list[str]:
    """Names of the weights that this package has, in order.

    Source: engineering choice.
    """
    return sorted(path.name for path in (PACKAGE_DIR / WEIGHTS).iterdir() if path.is_dir())


def config_files(release: Path) -> list[Path]:
    """The configs of a release; JSON twins are left out, which say the same.

    Source: engineering choice.
    """
    folder = release / "configs"
    others = [path for path in folder.glob("*.json") if path.name != "metadata.json"]
    others = [path for path in others if not path.with_suffix(".yaml").is_file()]
    return sorted([*folder.glob("*.yaml"), *others])


def strings(value: object, where: str = "") -> Iterable[tuple[str, str]]:
    """Every text of a config with the id of its place, the last key behind ``::``.

    Args:
        value: a config, or a part of one.
        where: id of the part.

    Source: engineering choice.
    """
    if isinstance(value, dict):
        for key, item in value.items():
            yield from strings(item, f"{where}::{key}" if where else str(key))
    elif isinstance(value, list):
        for item in value:
            yield from strings(item, where)
    elif isinstance(value, str):
        yield where, value


def _copy(source: Path, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(source, target)
