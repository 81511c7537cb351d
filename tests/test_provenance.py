"""Variants exactly once, what each says of itself, and that every edit of it is found."""

import json
import os
import re
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import small_backbone
import torch
from documents import REPOSITORY, fences
from monai.bundle import run
from PIL import Image, PngImagePlugin
from torchrun import bundle_settings

from diffboost.audit.commands import provenance
from diffboost.audit.provenance import audit_provenance
from diffboost.conditions.prompts import STOCK_NEGATIVE_PROMPT
from diffboost.data.tables import write_table
from diffboost.generation.provenance import (
    BEFORE_FORMAT,
    FACTS,
    FORMAT,
    OWN_DECODER,
    RUN_FACTS,
    is_intact,
    is_whole,
    machine_facts,
    read_facts,
    variant_png,
)
from diffboost.generation.variant_store import VariantWriter, write_manifest

FACTS_OF_ONE = {name: kind("7") for name, kind in FACTS.items()} | machine_facts("cpu")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A store of 12 slices to vary, an untrained generator, and two variants of each slice."""
    folder = small_backbone.write_study(tmp_path_factory.mktemp("provenance"))
    torch.set_num_threads(1)
    synthesize(folder, "synthetic")
    return folder


def synthesize(folder: Path, name: str, **knobs) -> Path:
    """Two variants a slice, 5 a pass: 24 variants, the last pass not full."""
    paths = {"store_dir": "store", "backbone": "backbone", "generator_dir": "generator"}
    settings = {key: str(folder / value) for key, value in (paths | {"output_dir": name}).items()}
    settings |= {"image_size": 32, "ratio": 2, "num_inference_steps": 2, "batch_size": 5}
    settings |= {"device": "cpu", "num_measured": 2}
    run(**bundle_settings("diffboost_synthesis", ["inference"], settings | knobs))
    return folder / name


def contents(store: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted((store / "images").iterdir())}


def audit(folder: Path, name: str, again: bool = True) -> list:
    return audit_provenance(
        folder / name, folder / "store", folder / "generator", str(folder / "backbone"), again
    )


def test_a_file_says_in_words_that_it_is_synthetic_and_holds_all_facts():
    data = variant_png(np.linspace(-1, 1, 64).reshape(8, 8), FACTS_OF_ONE)
    assert is_intact(data) and read_facts(data) == FACTS_OF_ONE
    assert b"Synthetic image, drawn by a generative model" in data


def test_the_page_shows_every_fact_of_the_present_format():
    page = (REPOSITORY / "docs" / "provenance.md").read_text(encoding="utf-8")
    (shown,) = (block for language, block in fences(page) if language == "text")
    told = dict(re.findall(r"^  (\w+) *(.*)$", shown, re.MULTILINE))
    assert told.keys() == FACTS.keys() and told["format"] == str(FORMAT)
    assert all(f"Format {number} added" in page for number in BEFORE_FORMAT)


def test_files_of_older_formats_say_what_was_always_so_and_are_written_as_they_were():
    new = FACTS_OF_ONE | {"guidance_interval": "[0.0, 1.0]", "control_interval": "[0.0, 1.0]"}
    new |= {"deformation_px": 0.0, "deformation_spacing_px": 16}
    new |= {"negative_prompt": STOCK_NEGATIVE_PROMPT}
    old = new | {"format": 1, "decoder": OWN_DECODER, "decoder_sha256": new["backbone_sha256"]}
    data = variant_png(np.zeros((4, 4)), old)
    assert is_intact(data) and read_facts(data) == old
    assert b"diffboost:decoder" not in data and b"interval" not in data
    data = variant_png(np.zeros((4, 4)), new | {"format": 2})
    assert read_facts(data) == new | {"format": 2}
    assert b"diffboost:decoder" in data and b"deformation" not in data
    data = variant_png(np.zeros((4, 4)), new | {"format": 3})
    assert read_facts(data) == new | {"format": 3}
    assert b"diffboost:deformation_px" in data and b"negative_prompt" not in data
    assert b"diffboost:negative_prompt" in variant_png(np.zeros((4, 4)), new)


def test_every_byte_is_sealed():
    data = variant_png(np.zeros((4, 4)), FACTS_OF_ONE)
    for place in range(len(data)):
        edited = bytearray(data)
        edited[place] ^= 1
        assert not is_intact(bytes(edited)), place
    assert not is_intact(data + b"\0") and not is_intact(data[:-1]) and not is_intact(b"")


def test_manifest_and_files_say_the_same(folder):
    manifest = pd.read_parquet(folder / "synthetic" / "manifest.parquet")
    assert len(manifest) == 24 == len(contents(folder / "synthetic"))
    assert list(manifest.variant) == [0] * 12 + [1] * 12
    assert list(manifest.batch_place[:6]) == [0, 1, 2, 3, 4, 0]
    audits = audit(folder, "synthetic", again=False)
    assert not [failure for each in audits for failure in each.failures]
    names = ["own hash", "manifest", "source", "edge", "prompt", "model", "lineage", "backbone"]
    assert all(each.verified == names for each in audits)


def test_a_larger_ratio_extends_a_store_and_changes_no_byte(folder):
    shutil.copytree(folder / "synthetic", folder / "extended")
    before = contents(synthesize(folder, "extended"))  # nothing to make
    assert before == contents(folder / "synthetic")
    inodes = {path.name: path.stat().st_ino for path in (folder / "extended/images").iterdir()}
    after = contents(synthesize(folder, "extended", ratio=3))
    assert len(after) == 36 and {name: after[name] for name in before} == before
    links = {path.name: path.stat().st_ino for path in (folder / "extended/images").iterdir()}
    assert {name: links[name] for name in inodes} == inodes
    assert contents(synthesize(folder, "at_once", ratio=3)) == after
    with pytest.raises(RuntimeError) as error:
        synthesize(folder, "extended", ratio=1)
    assert re.search("ratio: 1, but .* has 3 .* num_variants", str(error.value.__cause__))
    assert contents(folder / "extended") == after and not (folder / "extended.partial").exists()


def test_damaged_files_are_made_again(folder, monkeypatch):
    whole = contents(folder / "synthetic")
    shutil.copytree(folder / "synthetic", folder / "damaged")
    first, second, third = ((folder / "damaged" / "images" / name) for name in list(whole)[:3])
    first.write_bytes(whole[first.name][:-40])  # a finished store's, cut
    second.unlink()
    shutil.copytree(folder / "damaged", folder / "damaged.partial")
    (folder / "damaged.partial" / "images" / third.name).write_bytes(b"")  # a stopped run's
    (folder / "damaged.partial" / "images" / "left.png.partial").write_bytes(b"half")

    def no_links(*_):
        raise OSError("no hard links here")

    monkeypatch.setattr(os, "link", no_links)
    assert contents(synthesize(folder, "damaged")) == whole


def test_a_store_of_other_settings_is_refused(folder):
    with pytest.raises(RuntimeError) as error:
        synthesize(folder, "synthetic", ratio=3, license="none")
    assert "holds another run (facts" in str(error.value.__cause__)


def test_variants_of_a_store_that_has_changed_since_are_refused(folder):
    """Neither a finished store nor a stopped run is gone on with, nor one that does not say."""
    index = folder / "store" / "index.parquet"
    original = index.read_bytes()
    shutil.copytree(folder / "synthetic", folder / "stopped.partial")
    older = shutil.copytree(folder / "synthetic", folder / "older") / "run.json"
    settings = json.loads(older.read_text())
    assert list(settings.pop("inputs_sha256")) == ["store_dir"]
    older.write_text(json.dumps(settings))
    table = pd.read_parquet(index)
    try:
        write_table(index, table.assign(fold=1 - table.fold))
        for name in ("synthetic", "stopped"):
            with pytest.raises(RuntimeError) as error:
                synthesize(folder, name, ratio=3 if name == "synthetic" else 2)
            message = r"holds another run \(inputs_sha256 .* instead of"
            assert re.search(message, str(error.value.__cause__))
    finally:
        index.write_bytes(original)
    with pytest.raises(RuntimeError) as error:
        synthesize(folder, "older")
    message = r"another run \(inputs_sha256 \{.*\}, of which an older version recorded nothing\)"
    assert re.search(message, str(error.value.__cause__))


def test_a_variant_of_other_edges_does_not_enter_a_manifest(folder, tmp_path):
    item = {"case": "a", "slice": 0, "variant": 0, "image": "a.png", "label": "l.png"}
    item |= {"slicing": "{}"}
    item |= {name: FACTS_OF_ONE[name] for name in ("prompt", "phrase", "source_sha256")}
    item |= {"edge": str(tmp_path / "edge.png")}
    facts = {name: FACTS_OF_ONE[name] for name in RUN_FACTS}
    facts |= {"prompt_weights": "{}", "batch_size": 1}
    writer = VariantWriter(str(tmp_path), [item], facts)
    Path(item["edge"]).write_bytes(b"edge")
    batch = {"case": ["a"], "slice": torch.tensor([0]), "variant": torch.tensor([0])}
    output = {"pred": torch.zeros(1, 1, 8, 8)}
    writer._write(SimpleNamespace(state=SimpleNamespace(batch=batch, output=output)))
    write_manifest(str(tmp_path), [item], facts)
    assert len(pd.read_parquet(tmp_path / "manifest.parquet")) == 1
    Path(item["edge"]).write_bytes(b"another edge")
    with pytest.raises(ValueError, match=r"is another variant \(edge_sha256 differ\)"):
        write_manifest(str(tmp_path), [item], facts)


def test_a_variant_that_is_not_finite_is_refused(tmp_path):
    (tmp_path / "edge.png").write_bytes(b"edge")
    one = {"case": "liver_7", "slice": 3, "prompt": "", "phrase": "", "source_sha256": "0" * 64}
    one |= {"edge": str(tmp_path / "edge.png")}
    data = [one | {"variant": variant} for variant in (0, 1)]
    facts = {name: FACTS_OF_ONE[name] for name in RUN_FACTS} | {"precision": "float16"}
    writer = VariantWriter(str(tmp_path), data, facts)
    batch = {"case": ["liver_7"] * 2, "slice": torch.tensor([3, 3]), "variant": torch.arange(2)}
    images = torch.zeros(2, 1, 8, 8)
    images[1, 0, 4, 5] = torch.nan
    engine = SimpleNamespace(state=SimpleNamespace(batch=batch, output={"pred": images}))
    message = "variant 1 of slice 3 of case liver_7 has NaN or infinite .*precision float16"
    with pytest.raises(FloatingPointError, match=message):
        writer._write(engine)
    assert list(contents(tmp_path)) == ["liver_7_0003_000.png"]  # the finite one of the batch


def test_a_license_that_says_nothing_is_refused(folder):
    with pytest.raises(RuntimeError) as error:
        synthesize(folder, "unlicensed", license=" ")
    assert "license: ' '; name the terms" in str(error.value.__cause__)


def test_the_same_bytes_are_made_again_from_what_the_files_say(folder):
    threads = torch.get_num_threads()
    audits = audit(folder, "synthetic")
    assert all(each.verified[-1] == "made again, the same bytes" for each in audits)
    assert len(audits) == 24 and not [line for each in audits for line in each.failures]
    assert torch.get_num_threads() == threads


def rewritten(path: Path, **changes) -> None:
    """A forgery: other facts under a new, right hash."""
    facts = read_facts(path.read_bytes())
    pixels = np.asarray(Image.open(path)) / 65535 * 2 - 1
    path.write_bytes(variant_png(pixels, facts | changes))


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"model_sha256": "0" * 64}, "model_sha256 is 0000"),
        ({"prompt": "CT, lung, normal"}, "prompt is CT, lung, normal, here it is"),
        ({"case": "nobody"}, "has no slice 0 of case nobody"),
        ({"seed": 5}, "its pixels differ by up to .*; no other program or processor explains it"),
        ({"seed": 5, "machine": "cpu abacus"}, "may be rounding: machine cpu abacus there"),
        ({"machine": "cuda abacus"}, "not made again: made on cuda abacus"),
        ({"edge_sha256": "0" * 64}, "edge_sha256 is 000.*\nnot made again: .* no such edge"),
        ({"backbone_sha256": "0" * 64}, "not made again: model or backbone here are others"),
    ],
)
def test_other_facts_are_named(folder, tmp_path, changes, named):
    name = "organ_training_000_0000_001.png"
    path = shutil.copy(folder / "synthetic" / "images" / name, tmp_path / name)
    rewritten(path, **changes)
    assert is_whole(path)
    (found,) = audit_provenance(
        path, folder / "store", folder / "generator", str(folder / "backbone"), again=True
    )
    assert re.search(named, "\n".join(found.failures))


def test_a_replaced_a_lost_and_a_foreign_file_of_a_store_are_named(folder, capsys):
    store = folder / "tampered"
    shutil.copytree(folder / "synthetic", store)
    first, second, third = sorted((store / "images").iterdir())[:3]
    rewritten(first, license="anything goes")
    second.unlink()
    shutil.copy(third, store / "images" / "stranger.png")
    failures = {each.path.name: each.failures for each in audit_provenance(store) if each.failures}
    assert set(failures) == {first.name, second.name, "stranger.png"}
    assert "names another hash" in failures[first.name][0]
    assert "no such file" in failures[second.name][0]
    assert "does not name it" in failures["stranger.png"][0]
    with pytest.raises(SystemExit) as stopped:
        provenance(str(store))
    assert stopped.value.code == 1 and "22 of 25 files hold" in capsys.readouterr().out


def test_old_foreign_and_broken_files_are_told_apart(folder, tmp_path, capsys):
    whole = (folder / "synthetic" / "images" / "organ_training_000_0000_000.png").read_bytes()
    old = PngImagePlugin.PngInfo()
    old.add_text("diffboost:seed", "0")
    Image.new("L", (8, 8)).save(tmp_path / "old.png", pnginfo=old)
    Image.new("L", (8, 8)).save(tmp_path / "foreign.png")
    (tmp_path / "broken.png").write_bytes(b"\x89PNG broken")
    (tmp_path / "edited.png").write_bytes(whole.replace(b"higher", b"lower!"))
    failures = {each.path.stem: each.failures for each in audit_provenance(tmp_path)}
    assert "format of a version before 1" in failures["old"][0]
    assert "no provenance" in failures["foreign"][0] and "no readable PNG" in failures["broken"][0]
    assert "damaged or edited" in failures["edited"][0]
    provenance(str(folder / "synthetic" / "images" / "organ_training_000_0000_000.png"))
    shown = capsys.readouterr().out
    assert re.search(r"scheduler +unipc_karras\n", shown)
    assert "1 of 1 files hold what they say" in shown
    with pytest.raises(SystemExit, match="regenerate: needs store_dir"):
        provenance(str(tmp_path), regenerate=True)
    with pytest.raises(SystemExit, match="no such file or folder"):
        provenance(str(tmp_path / "nowhere"))
