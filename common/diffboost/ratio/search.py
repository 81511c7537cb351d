"""`ratio: auto`: makes a fold's synthetic store with as many variants a slice as pay."""

import json
import logging
import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

from diffboost.cost.configs import parse
from diffboost.cost.ratio import search_price
from diffboost.data.documents import read_json
from diffboost.data.slices import slice_items
from diffboost.files import write_json
from diffboost.locks import release_folder
from diffboost.ratio.budget import Budget, Price, read_budget, rungs_up_to
from diffboost.ratio.probes import STORE, Probes
from diffboost.ratio.record import DECISION, SECONDS, decision, spent_flops
from diffboost.ratio.rule import next_step, probe_epochs, search
from diffboost.ratio.stage_runs import BundleRun
from diffboost.runs import hash_inputs, resume_run
from diffboost.segmentation.arms import split_arm

logger = logging.getLogger(__name__)


def choose_ratio(
    store_dir: str,
    output_dir: str,
    search_dir: str,
    synthesis: BundleRun,
    segmenter: BundleRun,
    fold: int,
    num_classes: int,
    max_ratio: int,
    budget: Mapping,
    seeds: Sequence[int],
    epochs: int | None,
    min_gain: float,
    min_cases: int,
    num_cases: int | None = None,
    device: str | torch.device = "cpu",
) -> None:
    """Makes a fold's synthetic store with as many variants a slice as pay, and says why.

    The store is that of a synthesis of the same ratio, byte for byte, with ratio.json and
    ratio_seconds.json beside its manifest. Test cases are not looked at.

    Args:
        store_dir: slice store.
        output_dir: gets the synthetic store.
        search_dir: holds the growing store and the probes until then.
        synthesis, segmenter: the two stages; the segmenter's settings hold its arm.
        fold: the fold that is held out.
        num_classes: with background.
        max_ratio: largest ratio to try.
        budget: see ``read_budget``.
        seeds: of the probes, different whole numbers.
        epochs: of a probe; None: those of the segmenter, for variants pay late in a training.
        min_gain: Dice points (1 = 0.01) that a rung must add, see ``judge``.
        min_cases: of the inner validation; with fewer no probes are made, for they could not tell a
            gain from chance, and the budget goes into variants.
        num_cases: labelled training cases to use; None: all.
        device: where probes are scored.

    Raises:
        ValueError: a value is not allowed, the segmenter is not chosen by the inner validation, or
            the folder holds another run.

    Source: engineering choice (issue 6, "How many variants")
    """
    allowance, rungs = read_budget(budget), rungs_up_to(max_ratio)
    epochs = probe_epochs(epochs, segmenter.value("epochs"))
    _check(segmenter, synthesis, seeds, min_gain)
    settings = {
        "fold": fold,
        "max_ratio": max_ratio,
        "budget": budget,
        "seeds": list(seeds),
        "epochs": epochs,
        "min_gain": min_gain,
        "min_cases": min_cases,
        "synthesis": synthesis.settings | synthesis.knobs,
        "segmenter": segmenter.settings | segmenter.knobs,
        "configs": [Path(f).name for f in (*synthesis.config_files, *segmenter.config_files)],
        "inputs_sha256": synthesis.value("settings::inputs_sha256")
        | hash_inputs(generator_dir=synthesis.settings["generator_dir"]),
    }
    if _in_place(Path(output_dir), Path(search_dir), settings):
        return
    resume_run(search_dir, settings)
    slices = _slices(store_dir, fold, num_cases, synthesis, segmenter)
    inner = slices["inner_validation"]
    enough = len({item["case"] for item in inner}) >= min_cases
    probes = Probes(
        search_dir,
        synthesis,
        segmenter,
        inner,
        num_classes,
        seeds if enough else [],
        epochs,
        device,
    )
    price = _price(synthesis, segmenter, epochs, slices)
    ratio, tried, found, why = _search(probes, rungs, allowance, price, min_gain)
    probes.end_with(ratio, why)
    content = decision(ratio, tried, found, why, settings, price, allowance)
    _finish(Path(output_dir), Path(search_dir), content, probes)


def _check(
    segmenter: BundleRun,
    synthesis: BundleRun,
    seeds: Sequence[int],
    min_gain: float,
) -> None:
    """Raises ValueError on what a search can not do, before it costs anything."""
    arm = segmenter.settings["arm"]
    if not split_arm(arm)[0]:
        raise ValueError(f"segmenter_arm: {arm!r} uses no variants; name one that does")
    selection = segmenter.value("selection")
    if selection != "inner_validation":
        raise ValueError(
            f"segmenter_knobs: selection: {selection!r}; the ratio is chosen by the inner "
            "validation, and so must its segmenters be"
        )
    fractions = synthesis.value("inner_fraction"), segmenter.value("inner_fraction")
    if fractions[0] != fractions[1]:
        raise ValueError(
            f"inner_fraction: {fractions[0]} in synthesis, {fractions[1]} in the segmenter; they "
            "must be the same"
        )
    whole = all(type(seed) is int and 0 <= seed < 2**32 for seed in seeds)
    if not seeds or len(set(seeds)) < len(seeds) or not whole:
        raise ValueError(f"seeds: {list(seeds)!r}; different whole numbers from 0 up are needed")
    if type(min_gain) not in (int, float) or not 0 <= min_gain < 100:
        raise ValueError(f"min_gain: {min_gain!r}; Dice points from 0 to below 100 are needed")


def _slices(
    store_dir: str, fold: int, num_cases: int | None, synthesis: BundleRun, segmenter: BundleRun
) -> dict[str, Sequence[dict]]:
    """The slices that get variants, that are trained on, and that probes are scored on."""
    common = {"inner_fraction": synthesis.value("inner_fraction"), "num_cases": num_cases}
    parts = {
        "varied": ("training", synthesis.value("min_foreground_px")),
        "trained": ("training", segmenter.value("min_foreground_px")),
        "inner_validation": ("inner_validation", 0),
    }
    return {
        name: slice_items(store_dir, fold, part, min_foreground_px=least, **common)
        for name, (part, least) in parts.items()
    }


def _price(
    synthesis: BundleRun, segmenter: BundleRun, epochs: int, slices: Mapping[str, Sequence]
) -> Price:
    """What the parts of the search cost, in FLOPs."""
    parsers = (
        parse(stage.config_files, stage.settings | stage.knobs) for stage in (synthesis, segmenter)
    )
    return search_price(
        *parsers,
        segmenter.settings["arm"],
        epochs,
        len(slices["varied"]),
        len(slices["trained"]),
        len(slices["inner_validation"]),
    )


def _search(
    probes: Probes, rungs: Sequence[int], allowance: Budget, price: Price, min_gain: float
) -> tuple[int, list, dict, str]:
    """The search, by the budget's unit."""
    num_seeds = len(probes.seeds)
    limit = allowance.limit(price, rungs[-1])

    def step(last: int) -> tuple[int, str | None]:
        if allowance.counts == "flops":
            spent = spent_flops(price, last, len(probes.done()), num_seeds)
            return next_step(rungs, last, spent, price, limit, num_seeds)
        if probes.last is not None:  # of a search that was stopped behind its last rung
            return probes.last, probes.why or "budget"  # an older version noted none
        if last == 0:  # nothing has been timed yet
            if num_seeds:
                return rungs[0], None
            last = rungs[0]
            probes.grow(last)
        measured = probes.price_in_seconds()
        return next_step(rungs, last, probes.spent_seconds(), measured, limit, num_seeds)

    done = probes.done() if num_seeds else []  # without probes a rung says nothing
    return search(rungs, done, probes.try_rung, step, min_gain)


def _in_place(output_dir: Path, search_dir: Path, settings: Mapping) -> bool:
    """Whether this search is at its end; raises ValueError if another one's store is there."""
    path = output_dir / DECISION
    if not path.is_file():
        if output_dir.is_dir() and any(output_dir.iterdir()):
            raise ValueError(
                f"output_dir: {output_dir} is not empty and holds no {DECISION}; name another "
                "folder, or remove this one"
            )
        return False
    found = read_json(path, "output_dir")["settings"]
    wanted = json.loads(json.dumps(settings, default=str))
    different = [name for name in wanted if found.get(name) != wanted[name]]
    if different:
        raise ValueError(
            f"output_dir: {output_dir} holds another search ({', '.join(different)} differ); name "
            "another folder, or remove this one"
        )
    logger.info("%s: this search is in place already; remove the folder to search again", path)
    shutil.rmtree(search_dir, ignore_errors=True)
    return True


def _finish(output_dir: Path, search_dir: Path, content: Mapping, probes: Probes) -> None:
    """Moves the store into place with the decision in it, and removes what the search needed."""
    store = search_dir / STORE
    seconds = {str(rung["ratio"]): rung["seconds"] for rung in probes.rungs}
    write_json(store / SECONDS, seconds)
    write_json(store / DECISION, content)
    output_dir.parent.mkdir(parents=True, exist_ok=True)
    os.replace(store, output_dir)
    shutil.rmtree(search_dir)
    release_folder(search_dir)
    logger.info("%s: %s", output_dir, content["reason"])
