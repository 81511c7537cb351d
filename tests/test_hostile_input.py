"""Damaged and planted files: named, refused, never run, never taken for something else."""

import gzip
import hashlib
import io
import json
import os
import pickle
import struct
import tarfile
import zipfile
import zlib
from pathlib import Path

import nibabel as nib
import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest
import raw_data
import small_store
import torch
from monai.apps import DecathlonDataset
from PIL import Image
from safetensors.torch import save_file

from diffboost.audit.guards import guard_evaluation
from diffboost.conditions.edges import load_edge_detector
from diffboost.data.documents import read_json, read_yaml
from diffboost.data.downloads import decathlon_folder, unpack
from diffboost.data.images import decode, read_image
from diffboost.data.slices import case_items, read_store, slice_items, write_label
from diffboost.data.tables import read_csv, read_table, write_table
from diffboost.data.tasks import read_task
from diffboost.data.transforms import LoadSliced
from diffboost.data.volumes import check_volume
from diffboost.data.weights import check_weights, load_weights, read_state
from diffboost.experiments import read_experiment
from diffboost.generation.array_files import load_array
from diffboost.generation.backbones import load_part
from diffboost.generation.lineage import read_lineage, write_lineage
from diffboost.generation.pix2pix import EdgeTranslator, load_translator
from diffboost.generation.synthesis import read_generator, refuse_other_backbone
from diffboost.handlers import save_weights
from diffboost.prepare import prepare


class Payload:
    """Touches a file when it is unpickled."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple:
        return os.system, (f"touch {self.mark}",)


def plant(path: Path, mark: Path, layout: str) -> Path:
    """A file with code in it, in one of torch's layouts or as a plain pickle."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if layout == "plain":
        path.write_bytes(pickle.dumps(Payload(mark)))
    else:
        zipped = layout == "zipped"
        torch.save({"state_dict": Payload(mark)}, path, _use_new_zipfile_serialization=zipped)
    return path


# Weights


def _generator(path: Path) -> None:
    load_weights(torch.nn.Conv2d(1, 1, 1), path)


def _segmenter(path: Path) -> None:
    guard_evaluation("no store", 0, "training_fold", str(path))


def _translator(path: Path) -> None:
    settings = {"channels": [4, 8, 8], "discriminator_channels": 4}
    path.with_name("run.json").write_text(json.dumps(settings))
    load_translator(str(path.parent))


def _edges(path: Path) -> None:
    load_edge_detector("controlnet-hed", path)


def _single_file(path: Path) -> None:
    load_part(str(path), "unet")


READERS = [_generator, _segmenter, _translator, _edges, _single_file]


@pytest.mark.parametrize("layout", ["zipped", "legacy", "plain"])
@pytest.mark.parametrize("read", READERS, ids=lambda read: read.__name__.strip("_"))
def test_planted_code_in_weights_is_refused_and_not_run(tmp_path, read, layout):
    path = plant(tmp_path / "model/model.pt", tmp_path / "executed", layout)
    with pytest.raises(ValueError, match="model.pt (holds more than tensors|cannot be read)"):
        read(path)
    assert not (tmp_path / "executed").exists()
    pickle.loads(pickle.dumps(Payload(tmp_path / "executed")))  # our own: the plant works
    assert (tmp_path / "executed").exists()


def test_a_backbones_pickled_part_is_not_even_opened(tmp_path):
    plant(tmp_path / "vae/diffusion_pytorch_model.bin", tmp_path / "executed", "zipped")
    (tmp_path / "vae/config.json").write_text("{}")
    with pytest.raises(FileNotFoundError, match=f"the part 'vae' of {tmp_path}"):
        load_part(str(tmp_path), "vae")
    assert not (tmp_path / "executed").exists()


@pytest.fixture
def weights(tmp_path) -> Path:
    """A small model.pt."""
    torch.manual_seed(0)
    save_weights(torch.nn.Conv2d(2, 3, 3), tmp_path / "model.pt")
    return tmp_path / "model.pt"


def test_one_flipped_bit_of_a_weight_is_found(weights):
    content = bytearray(weights.read_bytes())
    place = content.find(read_state(weights)["weight"].numpy().tobytes()[:16])
    content[place + 2] ^= 1
    weights.write_bytes(content)
    torch.load(weights, weights_only=True)  # torch takes it
    with pytest.raises(ValueError, match=r"weights: .*model.pt cannot be read: .*checksum"):
        read_state(weights)


def test_weights_that_are_cut_off_packed_empty_or_of_another_network_are_named(weights, tmp_path):
    with pytest.raises(ValueError, match="model.pt does not fit this network: .*size mismatch"):
        load_weights(torch.nn.Conv2d(2, 4, 3), weights)
    with zipfile.ZipFile(tmp_path / "bomb.pt", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("a/data.pkl", bytes(1 << 22))
    torch.save({}, tmp_path / "none.pt")
    torch.save([torch.ones(1)], tmp_path / "list.pt")
    weights.write_bytes(weights.read_bytes()[:-200])
    (tmp_path / "head.safetensors").write_bytes(struct.pack("<Q", 2**62) + b"{}")
    os.mkfifo(tmp_path / "pipe.pt")
    for name, message in (
        ("model.pt", "cannot be read"),
        ("bomb.pt", "claim to hold 4194304; torch does not pack"),
        ("none.pt", "holds no tensors"),
        ("list.pt", "no mapping of names to tensors"),
        ("head.safetensors", "cannot be read"),
        ("pipe.pt", "is no plain file"),
    ):
        with pytest.raises(ValueError, match=f"model_path: .*{name}.*{message}"):
            check_weights(tmp_path / name, "model_path")


def test_a_backbone_with_absurd_sizes_is_refused_before_memory_is_taken(tmp_path):
    (tmp_path / "vae").mkdir()
    for change in ({"block_out_channels": [10**9]}, {"layers_per_block": 10**6}):
        (tmp_path / "vae/config.json").write_text(json.dumps(change))
        with pytest.raises(ValueError, match=f"config.json: {next(iter(change))}: .*at most"):
            load_part(str(tmp_path), "vae")
    (tmp_path / "vae/config.json").write_text("{")
    with pytest.raises(ValueError, match="backbone: .*config.json is not JSON"):
        load_part(str(tmp_path), "vae")


def test_a_backbone_that_changed_since_training_is_refused(tmp_path):
    (tmp_path / "vae").mkdir()
    (tmp_path / "vae/model.safetensors").write_bytes(b"1")
    with pytest.raises(ValueError, match="was trained on backbone 'own' .* not on backbone"):
        generator = {"backbone": "own", "backbone_sha256": "0" * 64}
        refuse_other_backbone(generator, "generator", str(tmp_path))


def test_a_pix2pix_of_absurd_width_is_refused(tmp_path):
    save_weights(EdgeTranslator([4, 8]), tmp_path / "model.pt")
    for channels in ([4, 10**9], "48", [4, -8], [], None):
        settings = {"channels": channels, "discriminator_channels": 4}
        (tmp_path / "run.json").write_text(json.dumps(settings))
        with pytest.raises(ValueError, match="run.json: channels: "):
            load_translator(str(tmp_path))


def test_cached_arrays_hold_numbers_only(tmp_path):
    np.save(tmp_path / "objects.npy", np.array([Payload(tmp_path / "executed")], dtype=object))
    with pytest.raises(ValueError, match="cache_dir: .*objects.npy is damaged"):
        load_array(tmp_path / "objects.npy")
    (tmp_path / "head.npy").write_bytes(b"\x93NUMPY\x01\x00\x08\x00{'a': (\n")
    with pytest.raises(ValueError, match="cache_dir: .*head.npy is damaged"):
        load_array(tmp_path / "head.npy")
    np.savez(tmp_path / "several.npz", a=np.ones(1))
    with pytest.raises(ValueError, match="holds no array of numbers"):
        load_array(tmp_path / "several.npz")
    assert not (tmp_path / "executed").exists()


# Pictures and volumes


def png(width: int, height: int, packed: bytes, depth: int = 8) -> bytes:
    """A PNG with right checksums."""
    parts = [(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, 0, 0, 0, 0))]
    content = b"\x89PNG\r\n\x1a\n"
    for kind, data in (*parts, (b"IDAT", packed), (b"IEND", b"")):
        checksum = zlib.crc32(kind + data)
        content += struct.pack(">I", len(data)) + kind + data + struct.pack(">I", checksum)
    return content


def test_every_flipped_bit_of_a_label_is_found_or_changes_nothing(tmp_path):
    label = (np.indices((24, 24)).sum(0) > 20).astype(np.uint8)
    write_label(tmp_path / "label.png", label)
    content = (tmp_path / "label.png").read_bytes()
    taken, taken_by_pillow = 0, 0
    for place in range(8 * len(content)):
        flipped = bytearray(content)
        flipped[place // 8] ^= 1 << place % 8
        try:
            found = np.array(decode(bytes(flipped)))
        except ValueError:
            found = label
        taken += not np.array_equal(found, label)
        try:
            with Image.open(io.BytesIO(flipped)) as picture:
                taken_by_pillow += not np.array_equal(np.array(picture), label)
        except (OSError, SyntaxError, ValueError):
            continue
    assert taken == 0 and taken_by_pillow > 0


@pytest.mark.parametrize(
    "content, message",
    [
        (png(60_000, 60_000, b""), "claims 60000 x 60000 pixels; 1 to 67108864"),
        (png(0, 5, b""), "claims 0 x 5 pixels"),
        (png(4000, 4000, zlib.compress(b"")), "8 bytes cannot hold the 4000 x 4000 pixels"),
        (b"", "the file is empty"),
        (b"GIF89a" + bytes(40), "no whole picture of the formats PNG, JPEG, TIFF"),
        (png(8, 8, zlib.compress(bytes(72)))[:-20], "it is cut off"),
    ],
    ids=["huge", "none", "missing", "empty", "gif", "cut"],
)
def test_pictures_are_refused_by_what_they_claim(tmp_path, content, message):
    (tmp_path / "a.png").write_bytes(content)
    with pytest.raises(ValueError, match=f"image: .*a.png cannot be read.*{message}"):
        read_image(tmp_path / "a.png", "image")
    with pytest.raises(ValueError, match="edge: .*a.png"):
        LoadSliced("edge")({"edge": str(tmp_path / "a.png")})


def test_a_label_of_another_mode_is_refused(tmp_path):
    Image.fromarray(np.zeros((8, 8), np.uint16)).save(tmp_path / "a.png")
    with pytest.raises(ValueError, match="label: a picture of mode I;16; 8-bit gray is needed"):
        LoadSliced("label")({"label": str(tmp_path / "a.png")})


def write_volume(path: Path, fields: dict[int, tuple] | None = None, more: bytes = b"") -> Path:
    """A NIfTI file of 6 x 5 x 4 voxels, with some bytes of its header changed."""
    nib.save(nib.Nifti1Image(np.arange(120, dtype=np.int16).reshape(6, 5, 4), np.eye(4)), path)
    opened = gzip.open if path.suffix == ".gz" else open
    with opened(path, "rb") as file:
        content = bytearray(file.read())
    for place, (kind, *values) in (fields or {}).items():
        struct.pack_into(kind, content, place, *values)
    with opened(path, "wb") as file:
        file.write(bytes(content) + more)
    return path


@pytest.mark.parametrize("suffix", [".nii", ".nii.gz"])
@pytest.mark.parametrize(
    "fields, message",
    [
        ({42: ("<3h", 32767, 32767, 32767)}, "claims 32767 x 32767 x 32767 voxels; 1 to 1073"),
        ({42: ("<h", -5)}, "claims -5 x 5 x 4 voxels"),
        ({42: ("<3h", 900, 900, 900)}, "bytes (of|cannot hold) the 1458000352 that"),
        ({40: ("<h", 300)}, "truncated or of another format"),
        ({70: ("<h", 128)}, "which are no numbers"),
        ({108: ("<f", float("nan"))}, "truncated or of another format"),
        ({108: ("<f", 3e9)}, "voxels begin at byte 3000000000"),
        ({252: ("<2h", 0, 1), 280: ("<f", float("inf"))}, "NaN or infinite values"),
        ({252: ("<2h", 0, 1), 280: ("<f", 1e9)}, "its spacings are .* are allowed"),
        ({252: ("<2h", 0, 1), 280: ("<2f", 1, 1), 296: ("<2f", 1, 1)}, "directions lie in a plane"),
    ],
)  # fmt: skip
def test_volumes_are_refused_by_what_they_claim(tmp_path, suffix, fields, message):
    path = write_volume(tmp_path / f"a{suffix}", fields)
    with pytest.raises(ValueError, match=f"image: .*a{suffix} cannot be read.*{message}"):
        check_volume(path, "image")


def test_a_packed_volume_is_read_to_its_end_and_not_beyond(tmp_path):
    path = tmp_path / "a.nii.gz"
    raw_data.write_nifti(path, raw_data.volume(0)[0])
    check_volume(path, "image")
    content = bytearray(path.read_bytes())
    content[-6] ^= 1  # the checksum
    path.write_bytes(content)
    nib.load(path).get_fdata()  # nibabel takes it
    with pytest.raises(ValueError, match="image: .*CRC check failed"):
        check_volume(path, "image")
    write_volume(path, more=bytes(1 << 22))
    with pytest.raises(ValueError, match="unpacks to more than the 592 bytes that it claims"):
        check_volume(path, "image")
    with pytest.raises(ValueError, match="its name must end in .nii or .nii.gz"):
        check_volume(tmp_path / "a.img", "image")


def test_huge_and_damaged_cases_are_rejected_with_their_reasons(tmp_path):
    root = raw_data.write_decathlon(tmp_path / "scans", 4)
    write_volume(root / "imagesTr/case_001.nii.gz", {42: ("<3h", 32767, 32767, 32767)})
    label = root / "labelsTr/case_002.nii.gz"
    label.write_bytes(label.read_bytes()[:-6] + b"\x00" * 6)
    store_dir = tmp_path / "store"
    knobs = {"edges": "gradient", "num_folds": 2, "max_rejected_fraction": 0.5}
    prepare(root, store_dir, raw_data.TASK_3D, 32, **knobs)
    rejected = pd.read_csv(store_dir / "rejected.csv").set_index("file").reason
    assert "claims 32767 x" in rejected["imagesTr/case_001.nii.gz"]
    assert "label: " in rejected["imagesTr/case_002.nii.gz"] and len(rejected) == 2


# Stores


@pytest.fixture(scope="module")
def prepared(tmp_path_factory) -> Path:
    """A store that prepare wrote, and its source beside it."""
    root = raw_data.write_decathlon(tmp_path_factory.mktemp("prepared") / "raw", 3)
    knobs = {"edges": "gradient", "num_folds": 3}
    return prepare(root, root.with_name("store"), raw_data.TASK_3D, 32, **knobs)


@pytest.fixture
def kept(prepared):
    """Puts the store's files back after the test."""
    contents = {path: path.read_bytes() for path in prepared.parent.rglob("*") if path.is_file()}
    yield prepared
    for path, content in contents.items():
        path.write_bytes(content)


def test_a_changed_header_is_found_but_its_source_may_move(kept):
    path = kept / "dataset.json"
    header = json.loads(path.read_text())
    path.write_text(json.dumps(header | {"source_dir": "../raw"}))
    assert read_store(kept).source_dir.resolve() == kept.with_name("raw")
    path.write_text(path.read_text().replace('"organ": "head"', '"organ": "heae"'))
    with pytest.raises(ValueError, match="dataset.json is damaged or was changed: its digest"):
        read_store(kept)
    changed = json.loads(path.read_text())
    del changed["digest"]
    path.write_text(json.dumps(changed))
    assert read_store(kept).header["task"]["organ"] == "heae"
    path.write_text(json.dumps(changed | {"labels": None}))
    with pytest.raises(ValueError, match="dataset.json: labels: None; dict is needed"):
        read_store(kept)


def test_flipped_bytes_of_an_index_are_found(kept):
    path = kept / "index.parquet"
    content = path.read_bytes()
    pages = pq.ParquetFile(path).metadata.row_group(0).column(0)
    middle = pages.data_page_offset + pages.total_compressed_size // 2
    path.write_bytes(content[:middle] + bytes([content[middle] ^ 4]) + content[middle + 1 :])
    with pytest.raises(ValueError, match="store_dir: .*index.parquet cannot be read as a table"):
        slice_items(kept, 0, "all")
    for damaged in (content[:-9], content[: len(content) // 2], b"PAR1", b""):
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match="store_dir: .*index.parquet cannot be read"):
            read_store(kept).index  # noqa: B018


def test_sources_that_changed_since_prepare_are_found(kept):
    path = kept.with_name("raw") / "imagesTr/case_001.nii.gz"
    array = nib.load(path).get_fdata(dtype=np.float32)
    array[0, 0, 0] += 1
    raw_data.write_nifti(path, array)
    with pytest.raises(ValueError, match="source files of case 'case_001' are damaged or others"):
        [case_items(kept, fold, "test") for fold in range(3)]


# Documents and tables


@pytest.mark.parametrize(
    "text, message",
    [
        ("[" * 100_000, "is not JSON"),
        ('{"a":' * 500 + "1" + "}" * 500, "nested more than 100 levels"),
        ('{"a": 1, "a": 2}', "'a' stands twice"),
        ('{"a": NaN}', "NaN is no number of JSON"),
        ("[1]", "a mapping is needed, got list"),
        ("\xff", "is not JSON"),
        ("", "is not JSON"),
    ],
    ids=["deep", "nested", "twice", "nan", "list", "text", "empty"],
)
def test_documents_of_json_are_refused_by_key_and_file(tmp_path, text, message):
    (tmp_path / "a.json").write_text(text, encoding="latin-1")
    with pytest.raises(ValueError, match=f"the_key: .*a.json.*{message}"):
        read_json(tmp_path / "a.json", "the_key")


@pytest.mark.parametrize(
    "text, message",
    [
        ("a: &x [1]\nb: *x\n", "aliases"),
        ("a: 1\na: 2\n", "'a' stands twice"),
        ("a: !!python/object/apply:os.system ['touch executed']\n", "could not determine"),
        ("a: !!timestamp 'x'\n", "is not YAML"),
        ("a: !!int ''\n", "is not YAML"),
        ("a: " + "[" * 5000, "is not YAML"),
        ("\x00", "is not YAML"),
    ],
    ids=["alias", "twice", "code", "time", "number", "deep", "zero"],
)
def test_documents_of_yaml_are_refused_by_key_and_file(tmp_path, monkeypatch, text, message):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "a.yaml"
    path.write_text(text)
    for read in (read_task, read_experiment, lambda path: read_yaml(path, "document")):
        with pytest.raises(ValueError, match=f"a.yaml.*{message}"):
            read(path)
    assert not (tmp_path / "executed").exists()


def test_tables_are_refused_by_column_and_kind(tmp_path):
    path = tmp_path / "a.parquet"
    frame = pd.DataFrame({"name": ["x", "y"], "number": [1, 2]})
    write_table(path, frame)
    assert read_table(path, "key", {"name": "text"})["name"].to_pylist() == ["x", "y"]
    for columns, message in (
        ({"other": "text"}, "key: .*a.parquet lacks the columns other; it has name, number"),
        ({"number": "text"}, "column 'number' holds int64, no text"),
        ({"name": "yes or no"}, "column 'name' holds .*string, no yes or no"),
    ):
        with pytest.raises(ValueError, match=message):
            read_table(path, "key", columns)
    write_table(path, frame.assign(name=["x", None]))
    with pytest.raises(ValueError, match="column 'name' has cells that hold nothing"):
        read_table(path, "key", {"name": "text"})
    (tmp_path / "a.csv").write_bytes(b'a,b\n"1\n\xff')
    with pytest.raises(ValueError, match="key: .*a.csv cannot be read as a CSV table"):
        read_csv(tmp_path / "a.csv", "key")


def test_a_changed_lineage_is_found(tmp_path):
    path = tmp_path / "lineage.json"
    write_lineage(path, {"cases": {"a": "ab" * 32}, "ancestors": [], "fold": 0, "store": "s"})
    good = path.read_text()
    path.write_text(good.replace('"ab', '"ac'))
    with pytest.raises(ValueError, match="lineage.json is damaged or was changed"):
        read_lineage(path)
    for text, message in (
        ('{"ancestors": []}', "cases: None; name -> hash"),
        ('{"cases": {"a": 1}}', "cases: .*name -> hash"),
        ('{"cases": {}, "ancestors": 3}', "a list of lineages is needed"),
        ('{"cases": {"file": "../a", "num_cases": 1, "sha256": ""}}', "leads out of the folder"),
    ):
        path.write_text(text)
        with pytest.raises(ValueError, match=f"lineage: .*lineage.json.*{message}"):
            read_lineage(path)
    save_file({"a": torch.ones(1)}, tmp_path / "model.pt")
    path.write_text('{"cases": {"a": 1}}')
    with pytest.raises(ValueError, match="name -> hash"):
        read_generator(str(tmp_path))


@pytest.mark.parametrize(
    "change",
    [
        {"dataset_dir": "$__import__('os').system('touch executed')"},
        {"segmentation": {"alpha": ["$1 / 2", 0.5]}},
        {"segmentation": {"merge": "@seed"}},
        {"synthesis": {"prompt_weights": {"_target_": "os.system"}}},
        {"task": "%task.yaml"},
    ],
    ids=lambda change: next(iter(change)),
)
def test_experiment_files_hold_no_code(tmp_path, change):
    good = {"name": "x", "task": "phantom_organ", "dataset_dir": "phantoms", "arms": ["baseline"]}
    (tmp_path / "experiment.yaml").write_text(json.dumps(good | change))
    with pytest.raises(ValueError, match="experiment.yaml: .* would be evaluated as code"):
        read_experiment(tmp_path / "experiment.yaml")


# Archives


def write_tar(path: Path, *members: tuple[str, bytes, str]) -> Path:
    """A tar with a small folder Task and some planted members: name, type, link."""
    path.parent.mkdir(exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, kind, link in (("Task/dataset.json", tarfile.REGTYPE, ""), *members):
            member = tarfile.TarInfo(name)
            member.type, member.linkname, member.size = kind, link, 2 * (kind == tarfile.REGTYPE)
            tar.addfile(member, io.BytesIO(b"{}"))
    return path


@pytest.mark.parametrize(
    "member, message",
    [
        (("../planted", tarfile.REGTYPE, ""), "leads out of the folder"),
        (("Task/../../planted", tarfile.REGTYPE, ""), "leads out of the folder"),
        (("/tmp/planted", tarfile.REGTYPE, ""), "is absolute"),
        (("C:planted", tarfile.REGTYPE, ""), "is absolute"),
        (("Task/link", tarfile.SYMTYPE, "../../secret"), "is a link or a device"),
        (("Task/link", tarfile.LNKTYPE, "/etc/passwd"), "is a link or a device"),
        (("Task/pipe", tarfile.FIFOTYPE, ""), "is a link or a device"),
        (("Task/disk", tarfile.BLKTYPE, ""), "is a link or a device"),
    ],
    ids=lambda value: value if isinstance(value, str) else value[0],
)
def test_archives_with_planted_members_are_refused_whole(tmp_path, member, message):
    archive = write_tar(tmp_path / "a" / "Task.tar", member)
    with pytest.raises(ValueError, match=f"archive: .*Task.tar: .*{message}"):
        unpack(archive, tmp_path / "a" / "Task")
    assert [path.name for path in (tmp_path / "a").iterdir()] == ["Task.tar"]
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


def test_archives_that_claim_too_much_or_are_damaged_are_refused(tmp_path):
    archive = write_tar(tmp_path / "a" / "Task.tar")
    content = archive.read_bytes()
    head = tarfile.TarInfo("Task/huge")
    head.size = 10**12
    for damaged, message in (
        (head.tobuf() + content, "claims more bytes than the archive's"),
        (gzip.compress(content), "is no whole, uncompressed tar"),
        (content[:300], "is no whole, uncompressed tar"),
        (b"", "is no whole, uncompressed tar"),
    ):
        archive.write_bytes(damaged)
        with pytest.raises(ValueError, match=f"archive: .*Task.tar.*{message}"):
            unpack(archive, tmp_path / "a" / "Task")
    archive.write_bytes(content)
    with pytest.raises(ValueError, match="holds no folder Other"):
        unpack(archive, tmp_path / "a" / "Other")
    unpack(archive, tmp_path / "a" / "Task")
    assert (tmp_path / "a/Task/dataset.json").read_text() == "{}"


def test_a_download_of_another_hash_is_refused(tmp_path, monkeypatch):
    archive = write_tar(tmp_path / "Task09_Spleen.tar")
    digest = hashlib.md5(archive.read_bytes()).hexdigest()
    monkeypatch.setitem(DecathlonDataset.md5, "Task09_Spleen", digest)
    archive.write_bytes(archive.read_bytes() + b"\x00")
    with pytest.raises(ValueError, match="dataset_dir: .*Task09_Spleen.tar is damaged or another"):
        decathlon_folder(tmp_path / "Task09_Spleen", read_task("spleen_ct"), download=True)


def test_a_store_of_fakes_stays_readable(tmp_path):
    store_dir = small_store.write_store(tmp_path / "store", num_cases=3)  # without checksums
    assert len(slice_items(store_dir, 0, "all")) == 15 and len(read_store(store_dir).index) == 15
