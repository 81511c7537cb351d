"""`ratio: auto`: what a gain is, where a search stops, what it costs, and one small real search."""

import json
import math
import re

import monai.bundle
import numpy as np
import pandas as pd
import pytest
import small_backbone
import yaml

from diffboost.data.slices import slice_items
from diffboost.experiments import read_experiment
from diffboost.prepare import prepare
from diffboost.ratio import probes
from diffboost.ratio import search as ratio_search
from diffboost.ratio.budget import Budget, Price, read_budget, rungs_up_to
from diffboost.ratio.probes import TRIED
from diffboost.ratio.record import decision, reason
from diffboost.ratio.rule import judge, next_step, probe_epochs, reach, search
from diffboost.segmentation.scoring import case_dice, slice_dice
from diffboost.stages import stage_configs
from diffboost.statistics import crossed_interval

CONFIGS = stage_configs()
RUNGS = [1, 2, 5, 10, 20, 50]
PRICE = Price(variants=10.0, probe=2.0, training=40.0)
SAMPLING = {"num_inference_steps": 8, "num_measured": 1}
SETTINGS = {"seeds": [0, 1, 2], "max_ratio": 50, "min_cases": 8}


def scored(ratio, dice, noise=0.0, num_seeds=3, num_units=12):
    """A rung whose probes have this mean Dice, with noise that is drawn anew a rung."""
    draw = np.random.default_rng(ratio).normal(0, noise, (num_seeds, num_units))
    units = [{f"case_{u % 2}:{u}": dice + draw[s, u] for u in range(num_units)} for s in range(3)]
    return {"ratio": ratio, "scores": dict(zip("012", units, strict=True))}


def searched(curve, limit=math.inf, noise=0.0, done=(), tried=None):
    """A search over a curve {ratio: Dice}; `tried` gets the ratios that are really tried."""

    def try_rung(ratio):
        if tried is not None:
            tried.append(ratio)
        return scored(ratio, curve[ratio], noise)

    def step(last):
        probed = RUNGS.index(last) + 1 if last else 0
        spent = PRICE.variants * last + PRICE.probe * 3 * probed
        return next_step(RUNGS, last, spent, PRICE, limit, num_seeds=3)

    return search(RUNGS, done, try_rung, step, min_gain=0.5)


# --- the rule -----------------------------------------------------------------------------------


def test_the_interval_counts_seeds_and_units_as_draws():
    seeds, units = np.array([[-1.0], [1.0]]), np.array([[-3.0, 0.0, 3.0]])
    found = crossed_interval(2 + seeds + units)
    square = 2 / 2 + 9 / 3  # variances 2 and 9, of two seeds and three units
    assert found["mean"] == pytest.approx(2)
    assert found["se"] == pytest.approx(math.sqrt(square))
    freedom = square**2 / (1**2 / 1 + 3**2 / 2)
    assert freedom == pytest.approx(2.909, abs=1e-3)  # Student's 97.5 % point of it: 3.241
    reach = (found["interval"][1] - found["interval"][0]) / 2
    assert reach == pytest.approx(3.241 * math.sqrt(square), rel=2e-3)
    alone = crossed_interval(np.ones((1, 5)))
    assert alone["mean"] == 1 and math.isnan(alone["se"])
    assert crossed_interval(np.ones((2, 5)))["interval"] == [1, 1]


def test_two_rungs_without_a_gain_end_the_search():
    curve = {1: 0.70, 2: 0.76, 5: 0.80, 10: 0.802, 20: 0.803, 50: 0.9}
    ratio, tried, found, why = searched(curve)
    assert [rung["ratio"] for rung in tried] == RUNGS[:5] and (ratio, why) == (20, "noise")
    assert found["enough"] == 5
    assert [(gain["ratio"], gain["over"], gain["gained"]) for gain in found["gains"]] == [
        (2, 1, True), (5, 2, True), (10, 5, False), (20, 5, False),
    ]  # fmt: skip
    assert found["gains"][0]["mean"] == pytest.approx(6)
    ratio, tried, found, why = searched(dict.fromkeys(RUNGS, 0.8))
    assert [rung["ratio"] for rung in tried] == [1, 2, 5] and (ratio, why) == (5, "noise")
    assert found["enough"] == 1


def test_a_gain_must_be_larger_than_its_noise():
    rising = {ratio: 0.5 + ratio / 100 for ratio in RUNGS}
    assert searched(rising)[2]["enough"] == 20
    _, tried, found, why = searched(rising, noise=0.4)
    assert why == "noise" and len(tried) < len(RUNGS)
    for gain in found["gains"]:
        assert gain["gained"] == (gain["mean"] > max(0.5, gain["se"]))


def test_a_slow_gain_over_two_rungs_is_one():
    curve = {1: 0.700, 2: 0.704, 5: 0.708, 10: 0.709, 20: 0.710, 50: 0.71}
    _, tried, found, why = searched(curve)
    assert found["enough"] == 5  # 0.8 points over 1, though each step is below min_gain
    assert len(tried) == 5 and why == "noise"


def test_the_rest_of_a_budget_goes_into_variants():
    rising = {ratio: 0.5 + ratio / 100 for ratio in RUNGS}
    limit = 0.4 * PRICE.whole(50)  # 216: up to ratio 10 costs 100 + 4 x 6, ratio 20 would 230
    ratio, tried, _, why = searched(rising, limit)
    assert [rung["ratio"] for rung in tried] == [1, 2, 5, 10]
    assert (ratio, why) == (19, "budget")  # 92 are left, and a variant of each slice costs 10
    assert reach(RUNGS, PRICE, limit, 3) == (19, [1, 2, 5, 10])
    assert searched(rising, limit=1)[::3] == (1, "budget")  # one variant is always made
    ratio, tried, _, why = searched(rising)
    assert [rung["ratio"] for rung in tried] == RUNGS[:5]
    assert (ratio, why) == (50, "cheap")  # probes of the largest ratio could save no variant


def test_no_probes_are_made_where_variants_are_cheaper():
    price = Price(variants=1.0, probe=20.0, training=40.0)
    assert next_step(RUNGS, 0, 0.0, price, limit=90.0, num_seeds=3) == (50, "cheap")
    assert next_step(RUNGS, 0, 0.0, price, limit=36.0, num_seeds=3) == (36, "budget")
    assert next_step(RUNGS, 50, 0.0, price, limit=90.0, num_seeds=3) == (50, "max_ratio")
    none = decision(36, [], judge([], 0.5), "budget", SETTINGS, price, Budget(0.4, "share"))
    assert none["enough"] is None and none["flops"]["share"] == pytest.approx(0.4)
    assert none["reason"].startswith("36 variants a slice were made: the budget pays for no more")


def test_no_probes_are_made_that_could_not_end_the_search():
    """Two rungs were probed where the budget could not pay for the third, the first to end it."""
    price = Price(variants=10.0, probe=10.0, training=10.0)
    assert next_step([1, 2, 5, 10, 20], 0, 0.0, price, 84.0, num_seeds=3) == (8, "budget")
    assert next_step(RUNGS, 0, 0.0, price, 141.0, num_seeds=3) == (14, "budget")  # 9 saved by 9
    assert next_step(RUNGS, 0, 0.0, price, 151.0, num_seeds=3) == (1, None)
    assert next_step([1, 2], 0, 0.0, price, math.inf, num_seeds=3) == (2, "cheap")


def test_the_budget_alone_decides_where_the_inner_validation_is_too_small():
    """Two cases whose probes differ by chance ended a search that twice as many would have won."""
    limit = 0.4 * PRICE.whole(50)
    assert next_step(RUNGS, 0, 0.0, PRICE, limit, num_seeds=0) == (21, "few_cases")
    assert next_step(RUNGS, 0, 0.0, PRICE, 1.0, num_seeds=0) == (1, "few_cases")
    assert next_step(RUNGS, 0, 0.0, PRICE, math.inf, num_seeds=0) == (50, "few_cases")
    assert reach(RUNGS, PRICE, limit, 0) == (21, [])
    budget = Budget(0.4, "share")
    content = decision(21, [], judge([], 0.5), "few_cases", SETTINGS, PRICE, budget)
    assert content["flops"]["spent"] == 21 * 10 and content["flops"]["share"] <= 0.4
    assert "the inner validation has fewer than 8 cases" in content["reason"]


def test_what_is_done_is_not_done_again():
    rising, again = {ratio: 0.5 + ratio / 100 for ratio in RUNGS}, []
    whole = searched(rising, limit=100)
    assert whole[0] == 8
    rest = searched(rising, limit=100, done=whole[1][:2], tried=again)
    assert again == [5] and rest == whole


def test_one_seed_decides_by_its_mean_alone():
    rungs = [scored(1, 0.7), scored(2, 0.72)]
    for rung in rungs:
        rung["scores"] = {"0": rung["scores"]["0"]}
    found = judge(rungs, 0.5)["gains"][0]
    assert found["gained"] and found["se"] is None and found["ci95"] is None


def test_slices_without_foreground_count_in_cases_alone():
    columns = ["case", "slice", "label", "both", "total", "truth"]
    rows = [("a", 0, 1, 3, 8, 4), ("a", 1, 1, 0, 2, 0), ("b", 0, 1, 0, 0, 0)]
    overlaps = pd.DataFrame(rows, columns=columns)
    assert slice_dice(overlaps).to_dict() == {("a", 0): 6 / 8}
    assert case_dice(overlaps).to_dict() == {"a": 6 / 10, "b": 1.0}


def test_hours_are_predicted_by_what_was_timed(tmp_path):
    class Segmenter:
        def value(self, name):
            return {"epochs": 40}[name]

    timed = [
        {"ratio": 1, "scores": {"0": {"a": 0.5}}, "seconds": {"variants": 6, "probe 0": 2}},
        {"ratio": 2, "scores": {"0": {"a": 0.6}}, "seconds": {"variants": 4, "probe 0": 4}},
    ]
    (tmp_path / TRIED).write_text(json.dumps({"rungs": timed, "last": None}))
    made = probes.Probes(tmp_path, None, Segmenter(), [{"case": "a"}], 2, [0], 10, "cpu")
    assert made.price_in_seconds() == Price(variants=5, probe=3, training=12)
    for seconds, ratio in ((16, 2), (30, 4)):  # 16 were spent; 5 a variant, 18 the next rung
        ended = ratio_search._search(made, RUNGS, Budget(seconds, "seconds"), PRICE, 0.5)
        assert (ended[0], ended[3]) == (ratio, "budget")


def test_hours_without_probes_are_predicted_by_the_first_variants(tmp_path):
    class Stage:
        def __call__(self, **settings):
            grown.append(settings["ratio"])

        def value(self, name):
            return {"epochs": 40}[name]

    grown = []
    made = probes.Probes(tmp_path, Stage(), Stage(), [{"case": "a"}], 2, [], 10, "cpu")
    made.grow(1)
    made.rungs[0]["seconds"] = {"variants": 6}
    assert made.price_in_seconds() == Price(variants=6, probe=0, training=0)
    found = ratio_search._search(made, RUNGS, Budget(60, "seconds"), PRICE, 0.5)
    assert (found[0], found[1], found[3]) == (10, [], "few_cases")
    made.end_with(10, "few_cases")
    assert grown == [1, 10]
    again = probes.Probes(tmp_path, Stage(), Stage(), [{"case": "a"}], 2, [], 10, "cpu")
    found = ratio_search._search(again, RUNGS, Budget(6, "seconds"), PRICE, 0.5)
    assert (found[0], found[3]) == (10, "few_cases")  # noted, whatever a clock says now


def test_a_search_that_was_killed_while_its_last_variants_were_made_says_why_it_ended(tmp_path):
    """It said budget, whatever the reason was."""

    class Stage:
        def __call__(self, **settings):
            if settings["ratio"] == 50:
                raise KeyboardInterrupt

        def value(self, name):
            return {"epochs": 40}[name]

    timed = [{"ratio": 1, "scores": {"0": {"a": 0.5}}, "seconds": {"variants": 1, "probe 0": 90}}]
    (tmp_path / TRIED).write_text(json.dumps({"rungs": timed}))

    def ended():
        made = probes.Probes(tmp_path, Stage(), Stage(), [{"case": "a"}], 2, [0], 10, "cpu")
        found = ratio_search._search(made, RUNGS, Budget(3600, "seconds"), PRICE, 0.5)
        return made, (found[0], found[3])

    made, found = ended()
    assert found == (50, "cheap")
    with pytest.raises(KeyboardInterrupt):
        made.end_with(*found)
    assert ended()[1] == found
    noted = json.loads((tmp_path / TRIED).read_text())
    del noted["why"]  # by an older version
    (tmp_path / TRIED).write_text(json.dumps(noted))
    assert ended()[1] == (50, "budget")


# --- what people read and write -----------------------------------------------------------------


def test_the_reason_names_gain_noise_and_cases():
    curve = {1: 0.70, 2: 0.76, 5: 0.80, 10: 0.802, 20: 0.803, 50: 0.9}
    budget = Budget(0.4, "share")
    content = decision(*searched(curve, noise=0.02), SETTINGS, PRICE, budget)
    assert (content["unit"], content["num_units"], content["num_cases"]) == ("slice", 12, 2)
    assert content["reason"] == reason(content)
    text = content["reason"]
    assert re.match(
        r"20 variants a slice were made: the last 2 steps to more variants gained", text
    )
    assert re.search(r"from 5 to 20 the probes' Dice changed by [+-]\d\.\d points \(95 % in", text)
    assert "3 seeds, 12 slices of 2 cases" in text
    assert "By these probes 5 would have been enough" in text
    assert content["flops"]["spent"] == 20 * 10 + 5 * 3 * 2
    assert content["flops"]["limit"] == 0.4 * (50 * 10 + 40)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (0.4, "budget: 0.4; one of {share: x}, {hours: x}, {tflop: x}, {pflop: x} is needed"),
        ({"hours": 1, "tflop": 2}, "one of {share: x}"),
        ({"hour": 1}, "budget: 'hour' is unknown; did you mean 'hours'?"),
        ({"share": 1.5}, "budget: share: 1.5; a number above 0"),
        ({"tflop": 0}, "budget: tflop: 0; a number above 0"),
        ({"hours": "2"}, "budget: hours: '2'; a number above 0"),
        ({"hours": math.inf}, "budget: hours: inf"),
    ],
)
def test_a_wrong_budget_is_named(value, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        read_budget(value)


def test_budgets_rungs_and_epochs():
    assert read_budget({"hours": 2}) == Budget(7200, "seconds")
    assert read_budget({"pflop": 3}) == Budget(3e15, "flops")
    assert read_budget({"share": 0.4}).limit(PRICE, 20) == pytest.approx(96)
    assert rungs_up_to(50) == RUNGS and rungs_up_to(7) == [1, 2, 5, 7]
    assert (probe_epochs(None, 40), probe_epochs(5, 40)) == (40, 5)
    for ratio in (1, 2.0, "auto"):
        with pytest.raises(ValueError, match="max_ratio: .* a whole number from 2 up"):
            rungs_up_to(ratio)
    with pytest.raises(ValueError, match="epochs: 41; allowed: 1 to 40"):
        probe_epochs(41, 40)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"synthesis": {"ratio": 5}}, "auto_ratio: {'max_ratio': 4}; needs synthesis: ratio: auto"),
        ({"arms": ["baseline"]}, "needs an arm such as diffboost"),
        ({"auto_ratio": {"max_ratio": 1}}, "auto_ratio: max_ratio: 1; a whole number from 2 up"),
        ({"auto_ratio": {"budget": {"hour": 1}}}, "budget: 'hour' is unknown"),
        ({"auto_ratio": {"budget": 1}}, "auto_ratio: budget: 1"),
        ({"auto_ratio": {"maxratio": 4}}, "unknown key 'maxratio' (4); did you mean 'max_ratio'"),
        ({"synthesis": {"ratio": "auto", "guidance_scale": [1.0, 3.0]}}, "guidance_scale: a list"),
        ({"segmentation": {"num_variants": 2}}, "num_variants: leave it out"),
        ({"segmentation": {"selection": "test"}}, "test cases may not choose it"),
    ],
)
def test_a_study_that_cannot_choose_is_refused(tmp_path, changes, message):
    written = {"name": "x", "task": "phantom_organ", "dataset_dir": "phantoms"}
    written |= {"arms": ["baseline", "diffboost"], "synthesis": {"ratio": "auto"}}
    written |= {"auto_ratio": {"max_ratio": 4}}
    path = tmp_path / "x.yaml"
    path.write_text(yaml.safe_dump(written))
    assert read_experiment(path).synthesis["ratio"] == "auto"
    path.write_text(yaml.safe_dump(written | changes))
    with pytest.raises(ValueError, match=re.escape(message)):
        read_experiment(path)


# --- a real search ------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def ready(tmp_path_factory):
    """A store and a generator of fold 0, without training: its lineage names the training part."""
    folder = tmp_path_factory.mktemp("ratio")
    sizes = {"num_training": 6, "num_test": 1, "size_px": 32, "num_slices": 3}
    prepare("phantoms", folder / "store", "phantom_organ", 32, "gradient", phantoms=sizes)
    small_backbone.write_backbone(folder / "backbone", 0.03)
    run("finetune", folder, output_dir="generator", epochs=1, num_copies=2)
    return folder


def run(section, folder, **knobs):
    """A bundle run in this process; folders are relative."""
    config = CONFIGS[section]
    knobs = {k: str(folder / v) if k.endswith("_dir") else v for k, v in knobs.items()}
    if section != "segmentation":
        knobs |= {"backbone": str(folder / "backbone")}
    monai.bundle.run(
        config_file=[str(config)],
        bundle_root=str(config.parents[1]),
        store_dir=str(folder / "store"),
        image_size=32,
        **knobs,
    )


def choose(folder, name, **knobs):
    """A search of up to three rungs, and the largest ratio, into `folder/name`; its ratio.json."""
    settings = {
        "generator_dir": "generator",
        "output_dir": name,
        "synthesis_knobs": SAMPLING,
        "segmenter_configs": [str(CONFIGS["segmentation"])],
        "segmenter_knobs": {"epochs": 2, "channels": [4, 8]},
        "max_ratio": 7,
        "budget": {"tflop": 1000},
        "seeds": [0, 1],
        "min_cases": 1,
    }
    run("auto_ratio", folder, **(settings | knobs))
    return json.loads((folder / name / "ratio.json").read_text())


def test_a_search_makes_the_store_of_its_ratio_and_goes_on_after_a_stop(ready, monkeypatch):
    whole = choose(ready, "chosen")
    assert (whole["ratio"], whole["why"], whole["enough"]) == (5, "noise", 1)
    assert whole["settings"]["epochs"] == 2 and len(whole["rungs"]) == 3
    inner = slice_items(ready / "store", 0, "inner_validation")
    names = {f"{item['case']}:{item['slice']}" for item in inner}
    assert set(whole["rungs"][0]["scores"]["0"]) <= names
    assert not (ready / "chosen.search").exists()

    run("synthesis", ready, generator_dir="generator", output_dir="fixed", ratio=5, **SAMPLING)
    own = {"ratio.json", "ratio_seconds.json"}
    made, fixed = (
        {
            p.relative_to(f): p.read_bytes()
            for p in f.rglob("*")
            if p.is_file() and p.name not in own
        }
        for f in (ready / "chosen", ready / "fixed")
    )
    assert made == fixed

    score, calls = probes.slice_overlaps, []

    def stopped(*arguments, **keywords):
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return score(*arguments, **keywords)

    monkeypatch.setattr(probes, "slice_overlaps", stopped)
    with pytest.raises(KeyboardInterrupt):
        choose(ready, "again")
    noted = json.loads((ready / "again.search" / TRIED).read_text())["rungs"]
    assert [list(rung["scores"]) for rung in noted] == [["0"]]
    assert choose(ready, "again")["rungs"] == whole["rungs"]
    assert len(calls) == 7  # six probes, one of them stopped
    few = choose(ready, "few", min_cases=8)
    assert (few["ratio"], few["why"], few["rungs"]) == (7, "few_cases", [])
    refused = {
        "again": ({"min_gain": 1.0}, "holds another search (min_gain differ)"),
        "fixed": ({}, "is not empty and holds no ratio.json"),
        "other": ({"segmenter_arm": "mirror"}, "segmenter_arm: 'mirror' uses no variants"),
    }
    for name, (knobs, message) in refused.items():
        with pytest.raises(RuntimeError) as error:  # MONAI's, from ours
            choose(ready, name, **knobs)
        assert message in str(error.value.__cause__)
