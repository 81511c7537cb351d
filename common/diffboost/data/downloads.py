"""The data sets of the Medical Segmentation Decathlon: found in a local folder, or downloaded."""

import os
import shutil
import tarfile
from collections.abc import Mapping
from pathlib import Path

from monai.apps import DecathlonDataset, download_url, extractall
from monai.apps.utils import HashCheckError

from diffboost.data.containment import ALLOWED, refusal, refuse_special
from diffboost.knobs import nearest


def decathlon_places(dataset_dir: str | Path, task: Mapping) -> list[Path]:
    """Where a task's data set may lie: ``dataset_dir``, and the data set's folder in it.

    Args:
        dataset_dir: the data set's own folder, or the one that holds it.
        task: a task as ``read_task`` gives it.

    Source: engineering choice.
    """
    folder, name = Path(dataset_dir), task["download"]
    return [folder] if name in (None, folder.name) else [folder, folder / name]


def decathlon_folder(dataset_dir: str | Path, task: Mapping, download: bool = False) -> Path:
    """The folder of a task's data set: ``dataset_dir``, or a folder of the data set's name in it.

    Args:
        dataset_dir: the data set's own folder, or the folder that holds it or will get it.
        task: a task as ``read_task`` gives it; its key ``download`` names the data set.
        download: get it by MONAI (archive of known MD5, kept beside the folder) if it is not there.

    Returns:
        Folder with dataset.json; ``dataset_dir`` itself where the task names no data set.

    Raises:
        ValueError: ``download`` for a task that names no data set, or an unknown name.
        FileNotFoundError: not there, or the download failed; says where it was looked for and the
            address.

    Source: engineering choice (MONAI's DecathlonDataset).
    """
    name = task["download"]
    dataset_dir = Path(dataset_dir)
    if name is None:
        if download:
            raise ValueError(f"download: task '{task['name']}' names no data set to download")
        return dataset_dir
    if name not in DecathlonDataset.resource:
        raise ValueError(f"task: download '{name}'; {nearest(name, DecathlonDataset.resource)}")
    parent = dataset_dir.parent if dataset_dir.name == name else dataset_dir
    for folder in decathlon_places(dataset_dir, task):
        if (folder / "dataset.json").is_file():
            return folder
    if dataset_dir.is_dir() and any(dataset_dir.iterdir()) and not download:
        return dataset_dir  # other data: the reader says what it lacks
    url = DecathlonDataset.resource[name]
    looked = f"dataset_dir: no dataset.json in {dataset_dir} nor in {parent / name}"
    if not download:
        raise FileNotFoundError(
            f"{looked}; set download to True, or unpack {url} (MD5 {DecathlonDataset.md5[name]})"
        )
    archive = parent / f"{name}.tar"
    if archive.exists():
        refuse_special(archive, "dataset_dir")
    try:
        download_url(url, archive, DecathlonDataset.md5[name], "md5", progress=False)
    except HashCheckError as error:
        raise ValueError(
            f"dataset_dir: {archive} is damaged or another file than {url} was: its MD5 (md5) is "
            f"not {DecathlonDataset.md5[name]}; remove it"
        ) from error
    except (OSError, RuntimeError) as error:
        raise FileNotFoundError(
            f"{looked}, and {url} could not be downloaded ({error}); get that file on a machine "
            f"with a network and lay it into {parent}"
        ) from error
    unpack(archive, parent / name)
    return parent / name


def unpack(archive: str | Path, folder: str | Path) -> None:
    """Unpacks one folder of a plain tar archive; nothing is there unless it is whole.

    All members are looked at before one is written: MONAI's extraction refuses paths and links that
    lead out, but keeps what came before them, and does not look at sizes.

    Args:
        archive: a tar file that is not compressed.
        folder: where the archive's folder of this name belongs; other members are left out.

    Raises:
        FileNotFoundError: there is no archive.
        ValueError: it is damaged or compressed, or a member leads out, is a link or device, or
            claims more bytes than the archive has; or the folder is not in it.

    Source: PEP 706 (what Python's filter "data" refuses); MONAI's extractall.
    """
    folder = Path(folder)
    _check_members(Path(archive))
    partial = folder.with_name(folder.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        extractall(archive, partial, file_type="tar")
        if not (partial / folder.name).is_dir():
            raise ValueError(f"archive: {archive} holds no folder {folder.name}")
        os.replace(partial / folder.name, folder)
    except tarfile.TarError as error:
        raise ValueError(f"archive: {archive} cannot be unpacked: {error}") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _check_members(archive: Path) -> None:
    """Raises ValueError for an archive with a member that must not be written."""
    total, largest = 0, archive.stat().st_size
    try:
        with tarfile.open(archive, "r:") as tar:
            for member in tar:
                reason = refusal(member.name)
                if not reason and not (member.isreg() or member.isdir()):
                    reason = "is a link or a device"
                total += max(0, member.size)
                if not reason and (member.size < 0 or total > largest):
                    reason = f"claims more bytes than the archive's {largest}"
                if reason:
                    raise ValueError(f"archive: {archive}: {member.name!r} {reason}; {ALLOWED}")
    except (tarfile.TarError, EOFError, OverflowError) as error:
        raise ValueError(f"archive: {archive} is no whole, uncompressed tar: {error}") from error
