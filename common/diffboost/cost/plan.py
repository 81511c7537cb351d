"""The stages of a study with what each costs: units a slice times the slices of its folds."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from functools import cache
from pathlib import Path

import pandas as pd
from monai.bundle import ConfigParser

from diffboost import plans
from diffboost.cost import units
from diffboost.cost.configs import parse, value
from diffboost.cost.ratio import passes_of, search_bound, training_flops
from diffboost.cost.stage import Stage, plain_stage
from diffboost.cost.units import Unit
from diffboost.data.splits import select
from diffboost.plans import Experiment
from diffboost.precision import PRECISIONS
from diffboost.ratio.study import fixed_knobs, is_auto, probe_arm

NPY_HEADER = 128  # bytes
# Knobs on which the cost of a variant depends, and those on which that of a segmenter does not.
SAMPLING_KNOBS = (
    "scheduler", "num_inference_steps", "guidance_scale", "guidance_interval", "control_scale",
    "control_interval", "decoder", "batch_size",
)  # fmt: skip
FREE_KNOBS = ("alpha", "patch_size", "num_variants", "epochs", "learning_rate")


class StudyCost:
    """Counts every stage of an experiment.

    Args:
        experiment: the study.
        configs: the config file of each section, see ``stage_configs``.
        index: a row a slice, see ``study_slices``.
        num_classes: with background.
        num_pretraining: images of the tree of pretraining; None where the study has none.

    Source: engineering choice
    """

    def __init__(
        self,
        experiment: Experiment,
        configs: Mapping[str, Path],
        index: pd.DataFrame,
        num_classes: int,
        num_pretraining: int | None = None,
    ) -> None:
        self.experiment = experiment
        self.configs = configs
        self.index = index
        self.num_classes = num_classes
        self.num_pretraining = num_pretraining
        self._counted: dict[tuple, object] = {}
        self._edges = cache(units.edge_detection)
        self._encoding = cache(units.encoding)

    def _once(self, key: tuple, counting: Callable):
        """What ``counting`` gives; folds, arms and seeds share it, so it is counted once."""
        if key not in self._counted:
            self._counted[key] = counting()
        return self._counted[key]

    def stages(self) -> list[Stage]:
        """Every run, in the order of the study."""
        found = [self._prepare(), *self._pretraining()]
        if any(map(plans.uses_variants, self.experiment.arms)):
            found += [stage for fold in self.experiment.folds for stage in self._finetune(fold)]
            found += self._syntheses()
        for setting in plans.settings(self.experiment):
            for segmenter in plans.segmenters(self.experiment, setting):
                found += self._segmentation(segmenter)
        return found

    def _parse(self, section: str, knobs: Mapping, **settings) -> ConfigParser:
        """The config of a diffusion stage with the overlay of the study's scale."""
        files = [self.configs[section]]
        if self.experiment.scale != "tiny":
            files.append(files[0].with_name(f"{self.experiment.scale}.yaml"))
        study = {"backbone": self.experiment.backbone, "image_size": self.experiment.image_size}
        return parse(files, study | settings | dict(knobs))

    def _slices(self, fold: int, part: str, knobs, min_foreground_px: bool = True) -> pd.DataFrame:
        """The slices of one part of a fold; those with foreground only if the index knows it."""
        fraction = value(knobs, "inner_fraction", 0.2)
        rows = select(self.index, fold, part, fraction, num_cases=self.experiment.num_cases)
        if min_foreground_px and "foreground_px" in rows:
            rows = rows[rows.foreground_px >= value(knobs, "min_foreground_px", 0)]
        return rows

    def _prepare(self) -> Stage:
        study, number = self.experiment, len(self.index)
        unit = self._edges(study.edges, study.image_size, study.hed_size_px)
        disk = number * (2 + 1 + 1) * study.image_size**2  # 16-bit image, label, edge
        return plain_stage("prepare", number, unit, disk_bytes=disk)

    def _latents(self, stage: str, parser, number: int, prompts: int, fold=None) -> Stage:
        """The cache of latents: every copy encoded, every prompt embedded, once."""
        backbone, size = (value(parser, key) for key in ("backbone", "image_size"))
        images = number * value(parser, "num_copies", 1)
        unit, text = self._encoding(backbone, size), units.embedding(backbone)
        channels, height, width = units.latent_shape(backbone, size)
        tokens, text_width = units.context_shape(backbone)
        wide = PRECISIONS[value(parser, "latent_precision", "float16")].itemsize
        disk = images * (2 * channels * height * width * wide + size**2)  # moments, 8-bit edge
        disk += (prompts + 1) * tokens * text_width * 4 + number * 4  # embeddings and whose
        disk += 4 * NPY_HEADER
        row = plain_stage(stage, images, unit, fold=fold, disk_bytes=disk)
        return replace(row, flops=row.flops + (prompts + 1) * text.flops)

    def _training(self, stage: str, parser, number: int, drop_last: bool, fold=None) -> Stage:
        """A training of the generator on so many slices."""
        unit = self._once((stage,), lambda: units.generator_training(parser))
        epochs, batch = (value(parser, key) for key in ("epochs", "batch_size"))
        together = batch * self.experiment.processes  # slices of an update
        together *= value(parser, "accumulation", 1)
        if drop_last:
            number -= number % together
        steps = epochs * -(-number // together)
        row = plain_stage(stage, epochs * number, unit, fold=fold, steps=steps)
        row = replace(row, disk_bytes=unit.saved_bytes)
        if value(parser, "cache_latents", True):
            return row
        encoding = self._encoding(
            *(value(parser, key) for key in ("backbone", "image_size")), batch
        )
        unit = replace(
            unit,
            weight_bytes=unit.weight_bytes + encoding.weight_bytes,
            activation_bytes=max(unit.activation_bytes, encoding.activation_bytes),
        )
        encoded = row.images * encoding.flops
        return replace(row, unit=unit, flops=row.flops + encoded, float32_flops=encoded)

    def _unlabelled(self, fold: int) -> Iterator[Stage]:
        """Edges, latents and training of the images whose labels are not used."""
        study, size = self.experiment, self.experiment.image_size
        if study.unlabelled is None:
            return
        parser = self._parse("unlabelled", plans.unlabelled_knobs(study))
        taken = select(self.index, fold, "training_fold", num_cases=study.num_cases)
        number = len(select(self.index, fold, "training_fold")) - len(taken)
        unit = self._edges(study.edges, size, study.hed_size_px)
        yield plain_stage(
            "prepare_unlabelled", number, unit, fold=fold, disk_bytes=number * 3 * size**2
        )
        if value(parser, "cache_latents", True):
            yield self._latents("unlabelled_latents", parser, number, 1, fold)
        yield self._training("train_on_unlabelled", parser, number, False, fold)

    def _finetune(self, fold: int) -> Iterator[Stage]:
        yield from self._unlabelled(fold)
        parser = self._parse("finetune", plans.finetune_knobs(self.experiment))
        rows = self._slices(fold, "training", parser)
        prompts = rows.prompt.nunique() if "prompt" in rows else 1
        if value(parser, "cache_latents", True):
            yield self._latents("latents", parser, len(rows), prompts, fold)
        yield self._training("finetune", parser, len(rows), False, fold)

    def _syntheses(self) -> Iterator[Stage]:
        """The base's synthetic store of each fold, and those of settings that need their own."""
        study, made = self.experiment, set()
        for setting in plans.settings(study):
            ablated = None if setting == plans.BASE else study.ablation_folds
            for fold in ablated or study.folds:
                folder = plans.synthetic_dir(setting, fold)
                if folder not in made:
                    made.add(folder)
                    ratio, probes = self._search(fold) if is_auto(study) else (None, [])
                    yield from [*probes, self._synthesis(setting, fold, ratio)]

    def _search(self, fold: int) -> tuple[int, list[Stage]]:
        """The largest ratio that a search can end with, and the probes on the way there."""
        study, arm = self.experiment, probe_arm(self.experiment)
        synthesis = self._parse("synthesis", fixed_knobs(study.synthesis))
        knobs = plans.segmentation_knobs(study, plans.BASE, arm)
        parser = self._segmentation_parser(study.networks[0], knobs)
        search = parse([self.configs["auto_ratio"]], study.auto_ratio)
        varied, trained = (self._slices(fold, "training", p) for p in (synthesis, parser))
        checked = self._slices(fold, "inner_validation", parser, min_foreground_px=False)
        counts = (len(varied), len(trained), len(checked), checked["case"].nunique())
        ratio, images, flops, unit = search_bound(synthesis, parser, search, arm, *counts)
        row = replace(plain_stage("probes", images, unit, "at most", fold), flops=flops)
        return ratio, [row] if images else []

    def _synthesis(self, setting: plans.Setting, fold: int, ratio: int | None = None) -> Stage:
        study = self.experiment
        parser = self._parse("synthesis", fixed_knobs(plans.synthesis_knobs(study, setting)))
        knobs = {key: value(parser, key) for key in SAMPLING_KNOBS if key in parser}
        train_base = value(self._parse("finetune", study.finetune), "train_base")
        unit = self._once(("sampling", repr(knobs)), lambda: units.sampling(parser, train_base))
        number = len(self._slices(fold, "training", parser)) * (ratio or value(parser, "ratio"))
        disk = number * 2 * study.image_size**2
        what = f"at most ratio {ratio}" if ratio else _label(setting)
        row = plain_stage("synthesize", number, unit, what, fold, disk_bytes=disk)
        passed = -(-number // unit.batch_size) * unit.batch_size  # the last batch is filled up
        measured = min(number, value(parser, "num_measured", 0))
        edges = self._edges(study.edges, study.image_size, study.hed_size_px)
        flops = passed * unit.flops + measured * edges.flops
        if plans.synthesis_knobs(study, setting).get("quality_filter"):
            knobs = plans.segmentation_knobs(study, plans.BASE, "baseline")
            forward = self._segmenter_pass(study.networks[0], knobs)
            flops += number * (edges.flops + forward.flops)
        return replace(row, flops=flops)

    def _segmentation(self, segmenter: plans.Segmenter) -> Iterator[Stage]:
        """Training and evaluation of one segmenter."""
        study, arm, fold = self.experiment, segmenter.arm, segmenter.fold
        knobs = plans.segmentation_knobs(study, segmenter.setting, arm)
        network = plans.segmentation_network(study, segmenter.setting)
        parser = self._segmentation_parser(network, knobs)
        passes = passes_of(arm, parser)
        key = ("train", network, passes, _counted(knobs))
        training = self._once(key, lambda: units.segmenter_training(parser, passes))
        forward = self._segmenter_pass(network, knobs)
        number = len(self._slices(fold, "training", parser))
        epochs, batch = (value(parser, key) for key in ("epochs", "batch_size"))
        batch *= study.processes
        what = " ".join(filter(None, (arm, _label(segmenter.setting))))
        two = arm == plans.SYNTHETIC_THEN_REAL
        row = plain_stage(
            "train_segmentation", epochs * number, training, what, fold, segmenter.seed,
            epochs * -(-number // batch), training.saved_bytes * (2 if two else 1),
        )  # fmt: skip
        selection = value(parser, "selection", "inner_validation")
        checked = len(self._slices(fold, selection, parser, selection == "test"))
        yield replace(row, flops=training_flops(parser, training, forward, number, checked))
        tested = self._slices(fold, "test", parser, min_foreground_px=False)
        disk = int(tested.pixels.sum())  # a byte a voxel
        yield plain_stage("evaluate", len(tested), forward, what, fold, segmenter.seed, 0, disk)

    def _segmenter_pass(self, network: str, knobs: Mapping) -> Unit:
        """What a segmenter's plain pass of a slice costs."""
        parser = self._segmentation_parser(network, knobs)
        key = ("test", network, _counted(knobs))
        return self._once(key, lambda: units.segmenter_inference(parser))

    def _segmentation_parser(self, network: str, knobs: Mapping):
        files = [self.configs["segmentation"]]
        files += plans.network_overlay(files[0], network)
        study = {"image_size": self.experiment.image_size, "num_classes": self.num_classes}
        return parse(files, study | dict(knobs))

    def _pretraining(self) -> Iterator[Stage]:
        """Table 1: the tree's edges, latents, generator, Pix2Pix, and their comparison."""
        study = self.experiment
        if study.pretrain is None:
            return
        settings = {"image_size": study.pretrain.get("image_size") or study.image_size}
        size = settings["image_size"]
        knobs = {name: study.pretrain.get(name) or {} for name in ("prepare", "train", "pix2pix")}
        if self.num_pretraining is not None:
            unit = self._edges(study.edges, size, study.hed_size_px)
            row = plain_stage("prepare_tree", self.num_pretraining, unit)
            yield replace(row, disk_bytes=row.images * size**2)
            fraction = knobs["prepare"].get("validation_fraction", 0.01)
            training = round(self.num_pretraining * (1 - fraction))
            held_out = self.num_pretraining - training
        else:
            training = len(select(self.index, 0, "training_fold"))
            held_out = len(select(self.index, 0, "test"))
        parser = self._parse("pretrain.train", knobs["train"], **settings)
        if value(parser, "cache_latents", True):
            yield self._latents("pretrain_latents", parser, training, 1)
        yield self._training("pretrain", parser, training, True)
        yield self._pix2pix(settings | knobs["pix2pix"], training)
        knobs = {"batch_size": 32} | (study.pretrain.get("evaluate") or {})
        parser = parse(
            [self.configs["pretrain.evaluate"]], {"backbone": study.backbone} | settings | knobs
        )
        number, unit = min(held_out, value(parser, "num_images")), units.sampling(parser)
        yield plain_stage("evaluate_images", number, unit, disk_bytes=2 * number * 2 * size**2)

    def _pix2pix(self, knobs: Mapping, number: int) -> Stage:
        """The training of Table 1's baseline on so many slices."""
        parser = parse([self.configs["pretrain.pix2pix"]], knobs)
        unit = units.translator_training(parser)
        epochs, batch = (value(parser, key) for key in ("epochs", "batch_size"))
        together = batch * self.experiment.processes
        updates = number // together  # an incomplete last one is left out
        images = epochs * updates * together
        row = plain_stage("train_pix2pix", images, unit, steps=epochs * updates)
        return replace(row, disk_bytes=unit.saved_bytes)


def _counted(knobs: Mapping) -> str:
    """The knobs of a segmenter that its FLOPs depend on, as a text."""
    return repr({key: value for key, value in knobs.items() if key not in FREE_KNOBS})


def _label(setting: plans.Setting) -> str:
    return f"{setting.knob}={setting.value}" if setting.knob else ""
