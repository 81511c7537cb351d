"""What a study consists of: its base, the settings of its ablations, and their segmenters."""

import itertools
import re
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

from diffboost.segmentation.arms import split_arm

# The network of the segmentation bundle's train.yaml; each other one has an overlay beside it.
DEFAULT_NETWORK = "attention_unet"
# An arm of studies alone: two trainings, the second from the first one's weights.
SYNTHETIC_THEN_REAL = "synthetic_then_real"
# Knobs of segmentation that act through variants alone: they change no arm without them.
VARIANT_KNOBS = ("alpha", "patch_size", "merge", "num_variants")


@dataclass(frozen=True)
class Experiment:
    """One study: a task, folds x arms x seeds, the knobs of each stage, and what is ablated.

    Args:
        name: names the folder `runs/<name>`; letters, digits, `_`, `-` and `.`.
        task: a task's name, or the path of a task file (relative to the experiment file).
        dataset_dir: folder of the scans, or `phantoms`.
        arms: ways to train the segmenter; `baseline`, which the others are compared with, is one.
        backbone: `tiny`, a hub id, a local folder or a single file.
        scale: `tiny`, the configs as they are, or `sd15`, the overlays of that name on top.
        image_size: side of a prepared slice in pixels.
        edges: edge detector.
        hed_size_px: side to which a slice is enlarged before HED, in pixels; None: prepare's own.
        num_folds: how many folds the cases are dealt into.
        folds: the folds that are run, of 0 … num_folds - 1.
        ablation_folds: those of `folds` in which ablations are run; None: all of them.
        seeds: a segmenter is trained per seed; the generator is fitted once a fold.
        num_cases: labelled training cases a fold may use, for few-label studies; None: all.
        network: the segmentation network, or a list whose first is the base and the others are
            ablated.
        processes: of torchrun, for each stage that has a `multi_gpu` overlay.
        protocol: names a file of workflow/protocols, whose knobs hold where the file has none.
        arm_epochs: {arm: epochs} of arms that train other than segmentation's `epochs`, such as
            half as many where ``merge: logits`` passes two images for one: the same time.
        prepare, finetune, synthesis, auto_ratio, segmentation, evaluate: knobs of the stage's
            config file (auto_ratio: where synthesis says `ratio: auto`). A list of values in
            synthesis or segmentation is an ablation, its first value the base.
        ablations: {section: {knob: [base, …]}}: what those lists become when the file is read.
        pretrain: Table 1: `dataset_dir` (a tree, or `phantoms`; none: the task's own slices, and
            nothing is finetuned from them), `image_size` (px; none: the study's) and
            the knobs of the pretraining bundle's `prepare`, `train`, `pix2pix` and `evaluate`.
        unlabelled: the generator learns from the training cases beyond `num_cases` first, from
            their images alone, and is finetuned on the labelled ones then: knobs of that first
            training other than finetune's, such as `epochs`; None: it does not.

    Source: engineering choice
    """

    name: str
    task: str
    dataset_dir: str
    arms: list[str]
    backbone: str = "tiny"
    scale: str = "tiny"
    image_size: int = 64
    edges: str = "hed-bsds500"
    hed_size_px: int | None = None
    num_folds: int = 3
    folds: list[int] = field(default_factory=lambda: [0])
    ablation_folds: list[int] | None = None
    seeds: list[int] = field(default_factory=lambda: [0])
    num_cases: int | None = None
    network: str | list[str] = DEFAULT_NETWORK
    processes: int = 1
    protocol: str = "sound"
    arm_epochs: dict[str, int] = field(default_factory=dict)
    prepare: dict = field(default_factory=dict)
    finetune: dict = field(default_factory=dict)
    synthesis: dict = field(default_factory=dict)
    auto_ratio: dict = field(default_factory=dict)
    segmentation: dict = field(default_factory=dict)
    evaluate: dict = field(default_factory=dict)
    ablations: dict = field(default_factory=dict)
    pretrain: dict | None = None
    unlabelled: dict | None = None

    @property
    def networks(self) -> list[str]:
        """The segmentation networks, the base's first."""
        return self.network if isinstance(self.network, list) else [self.network]


@dataclass(frozen=True)
class Setting:
    """A point of an ablation: one knob off the base; without a knob, the base itself.

    Args:
        section: `synthesis`, `segmentation` or `network`; empty for the base.
        knob: its name; empty for the base.
        value: its value.

    Source: engineering choice
    """

    section: str = ""
    knob: str = ""
    value: object = None

    @property
    def folder(self) -> str:
        """Where the setting's results lie in the study's folder, with a slash at the end."""
        if not self.knob:
            return ""
        text = re.sub(r"[^\w.+-]+", "_", str(self.value)).strip("_")
        return f"ablation/{self.knob}={text}/"


BASE = Setting()


@dataclass(frozen=True)
class Segmenter:
    """One training with its evaluation.

    Source: engineering choice
    """

    setting: Setting
    fold: int
    arm: str
    seed: int

    @property
    def folder(self) -> str:
        """Where its results lie in the study's folder."""
        return f"{self.setting.folder}fold{self.fold}/{self.arm}/seed{self.seed}"


def fold_cores(experiment: Experiment, cores: int, gpu: bool) -> int:
    """Cores that finetuning and synthesis of one fold take, so that others go on beside it.

    Small networks gain less from a second core than from a second fold: two folds of breast
    ultrasound (96 px, steps of 8) side by side are finetuned 1.4 times as fast as one after the
    other. A GPU, and networks as large as Stable Diffusion, are not shared.

    Args:
        experiment: the study.
        cores: of the whole study.
        gpu: whether stages run on one.

    Source: engineering choice
    """
    if gpu or experiment.scale != "tiny":
        return cores
    return max(1, cores // len(experiment.folds))


def uses_variants(arm: str) -> bool:
    """Whether an arm of a study needs a synthetic store."""
    return arm == SYNTHETIC_THEN_REAL or split_arm(arm)[0]


def ablated_knobs(experiment: Experiment) -> dict[str, tuple[str, list]]:
    """{knob: (section, [base, …])} of every knob with more than one value, networks included.

    Source: engineering choice
    """
    found = {
        knob: (section, values)
        for section, knobs in experiment.ablations.items()
        for knob, values in knobs.items()
    }
    if len(experiment.networks) > 1:
        found["network"] = ("network", experiment.networks)
    return found


def settings(experiment: Experiment) -> list[Setting]:
    """The base, then one setting for each further value of each ablated knob.

    Source: engineering choice
    """
    return [BASE] + [
        Setting(section, knob, value)
        for knob, (section, values) in ablated_knobs(experiment).items()
        for value in values[1:]
    ]


def ablation_arms(experiment: Experiment, section: str, knob: str) -> list[str]:
    """The arms that an ablation trains: diffboost, and baseline too if the knob reaches it.

    Source: engineering choice
    """
    reaches_baseline = section != "synthesis" and knob not in VARIANT_KNOBS
    wanted = ("baseline", "diffboost") if reaches_baseline else ("diffboost",)
    return [arm for arm in wanted if arm in experiment.arms]


def segmenters(experiment: Experiment, setting: Setting = BASE) -> list[Segmenter]:
    """Every segmenter that a setting trains, by fold, arm and seed.

    Source: engineering choice
    """
    if setting == BASE:
        folds, arms = experiment.folds, experiment.arms
    else:
        folds = experiment.ablation_folds or experiment.folds
        arms = ablation_arms(experiment, setting.section, setting.knob)
    return [
        Segmenter(setting, fold, arm, seed)
        for fold, arm, seed in itertools.product(folds, arms, experiment.seeds)
    ]


def ablation_segmenters(experiment: Experiment, knob: str) -> Iterator[tuple[Segmenter, object]]:
    """The segmenters of one ablation with their knob's value, those shared with the base included.

    Args:
        experiment: the study.
        knob: one of `ablated_knobs`.

    Source: engineering choice
    """
    section, values = ablated_knobs(experiment)[knob]
    for number, value in enumerate(values):
        for segmenter in segmenters(experiment, Setting(section, knob, value)):
            shared = number == 0
            yield replace(segmenter, setting=BASE) if shared else segmenter, value


def synthetic_dir(setting: Setting, fold: int) -> str:
    """The synthetic store that a setting's segmenters read: the base's, unless it has its own.

    A smaller ratio needs none of its own: it is the first variants of the base's.

    Source: engineering choice
    """
    own = setting.section == "synthesis" and setting.knob != "ratio"
    return f"{setting.folder if own else ''}fold{fold}/synthetic_store"


def finetune_knobs(experiment: Experiment) -> dict:
    """Knobs of finetuning, without ``weights`` where it goes on from unlabelled images.

    Source: engineering choice
    """
    if experiment.unlabelled is None:
        return experiment.finetune
    return {key: value for key, value in experiment.finetune.items() if key != "weights"}


def unlabelled_knobs(experiment: Experiment) -> dict:
    """Knobs of the generator's training on unlabelled images: finetune's, and the section's own.

    All of these images are learned from: none are kept for selection, none has foreground.

    Source: engineering choice
    """
    knobs = experiment.finetune | (experiment.unlabelled or {})
    return knobs | {"inner_fraction": 0.0, "min_foreground_px": 0}


def synthesis_knobs(experiment: Experiment, setting: Setting) -> dict:
    """Knobs of a setting's synthesis; the base's store holds the largest ratio of the study.

    Source: engineering choice
    """
    if synthetic_dir(setting, 0) != synthetic_dir(BASE, 0):
        return experiment.synthesis | {setting.knob: setting.value}
    ratios = experiment.ablations.get("synthesis", {}).get("ratio")
    return experiment.synthesis | ({"ratio": max(ratios)} if ratios else {})


def segmentation_knobs(experiment: Experiment, setting: Setting, arm: str) -> dict:
    """Knobs of a setting's segmenters: an arm's own epochs, and of how many variants where ratios
    are ablated.

    Source: engineering choice
    """
    own = experiment.arm_epochs.get(arm)
    knobs = experiment.segmentation | ({} if own is None else {"epochs": own})
    if setting.section == "segmentation":
        knobs[setting.knob] = setting.value
    ratios = experiment.ablations.get("synthesis", {}).get("ratio")
    if ratios and uses_variants(arm):
        knobs["num_variants"] = setting.value if setting.knob == "ratio" else ratios[0]
    return knobs


def segmentation_network(experiment: Experiment, setting: Setting) -> str:
    """The network of a setting's segmenters."""
    return setting.value if setting.knob == "network" else experiment.networks[0]


def network_overlay(config_file: Path, network: str) -> list[Path]:
    """The overlay of a network beside the segmentation config; none for the config's own."""
    own = network == DEFAULT_NETWORK
    return [] if own else [config_file.with_name(f"network_{network}.yaml")]
