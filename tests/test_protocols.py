"""The protocols: knobs that exist, a page that tells their values, and stores that they change."""

import re
from pathlib import Path

import pytest
import raw_data
import yaml

from diffboost.data.slices import read_store
from diffboost.prepare import prepare

ROOT = Path(__file__).parents[1]
PROTOCOLS = {
    name: yaml.safe_load((ROOT / "workflow" / "protocols" / f"{name}.yaml").read_text())
    for name in ("paper", "sound")
}
CONFIGS = {
    "prepare": "task_finetune/configs/prepare.yaml",
    "finetune": "task_finetune/configs/train.yaml",
    "synthesis": "diffboost_synthesis/configs/inference.yaml",
    "segmentation": "diffboost_segmentation/configs/train.yaml",
    "evaluate": "diffboost_segmentation/configs/evaluate.yaml",
}
# "facts 16 to 18, 21"; those of performance_facts have points, and are another list.
CITATION = re.compile(r"\b[Ff]acts,? (?:items? )?(\d+(?:(?:, | to | and )\d+)*)\b(?!\.\d)")
KNOB = re.compile(r"`(\w+)\.(\w+): (.+)`")


def defaults(section: str) -> dict:
    return yaml.safe_load((ROOT / "bundles" / CONFIGS[section]).read_text())


def test_both_protocols_set_the_same_knobs():
    assert list(PROTOCOLS["paper"]) == list(PROTOCOLS["sound"]) == list(CONFIGS)
    for section in CONFIGS:
        paper, sound = (PROTOCOLS[name][section] for name in ("paper", "sound"))
        assert list(paper) == list(sound)
        for knob, value in paper.items():
            assert value != sound[knob], f"{section}.{knob} is no difference"
            both = {type(value), type(sound[knob])}
            assert len(both) == 1 or both == {int, float}, f"{section}.{knob}: one kind of value"


@pytest.mark.parametrize("section", CONFIGS)
def test_sound_is_what_the_configs_have(section):
    own = defaults(section)
    for knob, value in PROTOCOLS["sound"][section].items():
        assert own[knob] == value, f"{section}.{knob}"


def test_the_page_tells_the_values_of_both_files():
    page = (ROOT / "docs" / "protocols.md").read_text(encoding="utf-8")
    told = {"paper": {}, "sound": {}}
    for line in page.splitlines():
        cells = [cell.strip() for cell in line.strip().strip("|").split(" | ")]
        if len(cells) != 7 or not KNOB.fullmatch(cells[4]):
            continue
        assert re.fullmatch(r"\d+(, \d+)*", cells[1]) and all(cells), line
        for name, cell in (("paper", cells[4]), ("sound", cells[5])):
            section, knob, value = KNOB.fullmatch(cell).groups()
            told[name].setdefault(section, {})[knob] = yaml.safe_load(value)
    assert told == PROTOCOLS


def test_every_item_of_the_facts_is_told_of_on_the_page():
    page = (ROOT / "docs" / "protocols.md").read_text(encoding="utf-8")
    rows = [line.split(" | ")[1] for line in page.splitlines() if line.startswith("| ")]
    text = "\n".join(line for line in page.splitlines() if not line.startswith("|"))
    asides = re.findall(r"\(((?:facts )?\d[\d, to]*)\)", text)
    told = set()
    for numbers in [*rows, *asides]:
        for first, last in re.findall(r"(\d+)(?: to (\d+))?", numbers):
            told |= set(range(int(first), int(last or first) + 1))
    assert told == set(range(1, 39))


def test_every_cited_number_of_the_facts_is_a_line_of_their_page():
    page = (ROOT / "docs" / "facts.md").read_text(encoding="utf-8")
    lines = [int(number) for number in re.findall(r"^\| (\d+) \| \S", page, re.MULTILINE)]
    assert lines == list(range(1, len(lines) + 1))
    cited = set()
    for folder in ("benchmarks", "bundles", "common", "docs", "tests", "workflow"):
        for path in (ROOT / folder).rglob("*"):
            if path.suffix not in (".py", ".yaml", ".md", ".smk"):
                continue
            for citation in CITATION.findall(path.read_text(encoding="utf-8")):
                for first, last in re.findall(r"(\d+)(?: to (\d+))?", citation):
                    cited |= set(range(int(first), int(last or first) + 1))
    assert cited and cited <= set(lines), sorted(cited - set(lines))


def test_prepare_knobs_of_protocol_paper_change_the_store(tmp_path):
    scans = raw_data.write_decathlon(tmp_path / "scans", 4)
    stores = {}
    for name, knobs in PROTOCOLS.items():
        options = {"edges": "gradient", "num_folds": 2, "seed": 3}
        store_dir = prepare(
            scans, tmp_path / name, raw_data.TASK_3D, 32, **options, **knobs["prepare"]
        )
        stores[name] = read_store(store_dir)
    paper, sound = stores["paper"].index, stores["sound"].index
    folds = [rows.drop_duplicates("case").sort_values("case").fold for rows in (paper, sound)]
    assert folds[0].tolist() == [0, 0, 1, 1] != folds[1].tolist()
    words = set(sound.prompt).pop().split(", ")
    assert set(paper.prompt) == {f"{words[1]}, MRI"} and words[0] == "MR"
    assert (paper.sha256 != sound.sha256).all()
    assert stores["paper"].header["task"]["intensity_per"] == "slice"
