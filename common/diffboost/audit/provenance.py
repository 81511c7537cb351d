"""`diffboost audit provenance`: what synthetic files say of themselves, and whether that is so.

A file's seal is verified from the file alone. A manifest beside it, the slice store and the
generator are compared with its facts where they are given; and the file is made again from them.
"""

import hashlib
import io
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from PIL import Image
from tqdm import tqdm

from diffboost.data.images import read_levels
from diffboost.data.manifest import read_manifest
from diffboost.data.slices import read_store
from diffboost.files import sha256_of_files
from diffboost.generation.backbones import backbone_sha256
from diffboost.generation.decoding import decoder_sha256
from diffboost.generation.deformation import deform_slice
from diffboost.generation.provenance import (
    FACTS,
    OWN_DECODER,
    is_intact,
    is_sealed,
    machine_facts,
    read_facts,
)
from diffboost.generation.regeneration import regenerate
from diffboost.generation.synthesis import read_generator

logger = logging.getLogger(__name__)

NOTHING = "no provenance: not made by DiffBoost, or its text chunks were taken out"
BROKEN = "its bytes are not those of its own hash: damaged or edited"


@dataclass
class FileAudit:
    """What is known of a file: its facts (None: none that can be trusted), what holds and fails."""

    path: Path
    facts: dict | None = None
    edge: str | None = None  # its edge file in the slice store, if that is the right one
    verified: list[str] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)


def audit_provenance(
    path: str | Path,
    store_dir: str | Path | None = None,
    generator_dir: str | Path | None = None,
    backbone: str | None = None,
    again: bool = False,
    decoder: str | None = None,
) -> list[FileAudit]:
    """Verifies a synthetic PNG, or all of a folder.

    Args:
        path: a PNG; a synthetic store, of which the manifest and ``images/`` are compared; or a
            folder, of which every PNG is taken.
        store_dir: the slice store that the variants were made from.
        generator_dir: the generator that made them.
        backbone: the one that they were made on; None takes the name that the files say.
        again: make the files again from their facts and compare the bytes.
        decoder: the tiny decoder of those that have one; None takes the name that the files say.

    Returns:
        One entry a file, in the order of the names.

    Raises:
        FileNotFoundError: no such file or folder, or no PNG in it.
        ValueError: ``again`` without a store or a generator.

    Source: engineering choice (issue 5, "Provenance").
    """
    if again and (store_dir is None or generator_dir is None):
        raise ValueError("regenerate: needs store_dir, for the edges, and generator_dir")
    path = Path(path)
    manifest = _manifest_of(path)
    audits = [_audit_file(file, manifest) for file in tqdm(_files(path, manifest), unit="PNG")]
    told = [audit for audit in audits if audit.facts is not None]
    if store_dir is not None:
        _compare_with_store(told, store_dir)
    if generator_dir is not None:
        generator = read_generator(str(generator_dir))
        _compare(told, {name: generator[name] for name in ("model_sha256", "lineage_sha256")})
    if backbone is not None:
        _compare(told, {"backbone_sha256": backbone_sha256(backbone)})
    if again:
        _make_again(told, str(generator_dir), backbone, decoder)
    return audits


def _manifest_of(path: Path) -> pd.DataFrame | None:
    """The manifest of the store that a file or folder is (in), by absolute paths of the images."""
    folder = path.parent.parent if path.is_file() else path
    file = folder / "manifest.parquet"
    if not file.is_file():
        return None
    manifest = read_manifest(folder)
    return manifest.set_index(
        pd.Index([str((folder / image).absolute()) for image in manifest.image])
    )


def _files(path: Path, manifest: pd.DataFrame | None) -> list[Path]:
    """The files to audit, of a store those that the manifest names as well."""
    if path.is_file():
        return [path.absolute()]
    if not path.is_dir():
        raise FileNotFoundError(f"no such file or folder: {path}")
    folder = path if manifest is None else path / "images"
    files = {file.absolute() for file in folder.rglob("*.png")}
    if manifest is not None:
        files |= {Path(name) for name in manifest.index}
    if not files:
        raise FileNotFoundError(f"no PNG in {path}")
    return sorted(files)


def _audit_file(path: Path, manifest: pd.DataFrame | None) -> FileAudit:
    """What a file says alone, and what the manifest beside it says of it."""
    audit = FileAudit(path)
    if not path.is_file():
        audit.failures.append("the manifest names it, but there is no such file")
        return audit
    data = path.read_bytes()
    try:
        facts = read_facts(data)
    except ValueError as error:
        audit.failures.append(BROKEN if is_sealed(data) else str(error))
        return audit
    if facts is None or not is_intact(data):
        audit.failures.append(BROKEN if is_sealed(data) else NOTHING)
        return audit
    audit.facts = facts
    audit.verified.append("own hash")
    if manifest is not None:
        audit.failures += _against_manifest(path, data, facts, manifest)
        audit.verified += [] if audit.failures else ["manifest"]
    return audit


def _against_manifest(path: Path, data: bytes, facts: Mapping, manifest: pd.DataFrame) -> list[str]:
    """In what a file differs from its row of the manifest."""
    if str(path) not in manifest.index:
        return ["the manifest beside it does not name it"]
    if "sha256" not in manifest:
        return ["the manifest beside it has no hashes: made by an older version"]
    row = {**manifest.loc[str(path)]}
    for name in ("backbone", "decoder"):
        if Path(row.get(name, "")).name == facts[name]:  # files tell no paths
            row[name] = facts[name]
    if row["sha256"] != hashlib.sha256(data).hexdigest():
        return ["the manifest names another hash: not the file that was written there"]
    return [
        f"the manifest says {name} {row[name]!r}, the file {facts[name]!r}"
        for name, kind in FACTS.items()
        if name in row and kind(row[name]) != facts[name]
    ]


def _compare(audits: Sequence[FileAudit], true: Mapping[str, str]) -> None:
    """Notes in which hashes files differ from what is here."""
    for audit in audits:
        for name, value in true.items():
            if audit.facts[name] == value:
                audit.verified.append(name.removesuffix("_sha256"))
            else:
                audit.failures.append(f"{name} is {audit.facts[name]}, here it is {value}")


def _compare_with_store(audits: Sequence[FileAudit], store_dir: str | Path) -> None:
    """Compares source, edge and prompt with those of the slice store."""
    store = read_store(store_dir)
    columns = ["case", "slice", "edge", "label", "prompt", "source_sha256"]
    rows = store.columns(columns).set_index(["case", "slice"])
    for audit in audits:
        place = audit.facts["case"], audit.facts["slice"]
        if place not in rows.index:
            audit.failures.append(f"{store.store_dir} has no slice {place[1]} of case {place[0]}")
            continue
        row = rows.loc[place]
        edge = store.path(row.edge)
        if audit.facts["deformation_px"] > 0:
            edge = _deformed_edge(audit, {"edge": edge, "label": store.path(row.label)})
        edges = {} if edge is None else {"edge_sha256": sha256_of_files([edge])}
        true = {"source_sha256": row.source_sha256, **edges, "prompt": row.prompt}
        _compare([audit], true)
        audit.edge = str(edge) if "edge" in audit.verified else None


def _deformed_edge(audit: FileAudit, source: Mapping) -> Path | None:
    """The edges of a deformed variant, beside it; None unless they and its label are what its facts
    make of the slice's."""
    facts = audit.facts
    options = (facts[f"deformation_{name}"] for name in ("px", "spacing_px"))
    edges, label = deform_slice(
        {**facts, **source}, *options, facts["image_size"], facts["noise_address"]
    )
    files = {key: audit.path.parents[1] / f"{key}s" / audit.path.name for key in ("edge", "label")}
    for key, levels in (("edge", np.round(edges * 255)), ("label", label)):
        if not files[key].is_file():
            audit.failures.append(f"{files[key]} is not there: the {key} of its deformed slice")
        elif not np.array_equal(read_levels(files[key], key), levels):
            audit.failures.append(f"{files[key]} is not the slice's {key}, displaced by its field")
        else:
            audit.verified.append(f"deformed {key}")
    verified = all(f"deformed {key}" in audit.verified for key in files)
    return files["edge"] if verified else None


def _make_again(
    audits: Sequence[FileAudit], generator_dir: str, backbone: str | None, decoder: str | None
) -> None:
    """Makes files again whose generator, backbone and edge are here, and compares the bytes."""
    model = read_generator(generator_dir)["model_sha256"]
    chosen: dict[str, list[FileAudit]] = {}
    for audit in audits:
        name = backbone or audit.facts["backbone"]
        reason = _missing(audit, model, name) or _missing_decoder(audit, decoder)
        if reason:
            audit.failures.append(f"not made again: {reason}")
        else:
            chosen.setdefault(name, []).append(audit)
    for name, same_backbone in chosen.items():
        files = [{**audit.facts, "edge": audit.edge} for audit in same_backbone]
        made = regenerate(files, generator_dir, name, decoder)
        for number, data in tqdm(made, "made again", total=len(files), unit="PNG"):
            _compare_bytes(same_backbone[number], data)


def _missing(audit: FileAudit, model_sha256: str, backbone: str) -> str:
    """What a file would need to be made again and is not here; "" if all is."""
    try:
        here = backbone_sha256(backbone)
    except FileNotFoundError:
        return f"no backbone by the name {backbone!r} is here; give its folder"
    if audit.edge is None:
        return "the slice store has no such edge"
    if audit.facts["model_sha256"] != model_sha256 or audit.facts["backbone_sha256"] != here:
        return "model or backbone here are others"
    if audit.facts["machine"].startswith("cuda") and not torch.cuda.is_available():
        return f"made on {audit.facts['machine']}, and there is no such device here"
    return ""


def _missing_decoder(audit: FileAudit, decoder: str | None) -> str:
    """Why a file's tiny decoder is not the one here; "" where it is, or it has none."""
    told = audit.facts["decoder"]
    if told == OWN_DECODER:
        return ""
    try:
        here = decoder_sha256(decoder or told, audit.facts["backbone"])
    except FileNotFoundError:
        return f"no decoder by the name {told!r} is here; give its folder"
    return "" if here == audit.facts["decoder_sha256"] else "the decoder here is another"


def _compare_bytes(audit: FileAudit, data: bytes) -> None:
    """Notes whether a file came out the same, and if not, whether it may have been rounding."""
    there = audit.path.read_bytes()
    if there == data:
        audit.verified.append("made again, the same bytes")
        return
    first, second = (np.asarray(Image.open(io.BytesIO(x))).astype(int) for x in (there, data))
    same_size = first.shape == second.shape
    most = f"by up to {abs(first - second).max()} of 65535" if same_size else "in their size"
    here = machine_facts("cuda" if audit.facts["machine"].startswith("cuda") else "cpu")
    others = [
        f"{name} {audit.facts[name]} there, {here[name]} here"
        for name in ("machine", "versions")
        if audit.facts[name] != here[name]
    ]
    reason = "no other program or processor explains it"
    if others:
        reason = f"which may be rounding: {'; '.join(others)}"
    audit.failures.append(f"made again, its pixels differ {most}; {reason}")
