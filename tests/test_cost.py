"""`diffboost cost` against counted runs of the bundles and known figures of Stable Diffusion."""

import json
import re
import socket
from dataclasses import replace
from functools import partial

import pytest
import small_backbone
import torch
import yaml
from controlnet_aux.hed import ControlNetHED_Apache2
from documents import REPOSITORY, fences
from monai.bundle import ConfigParser
from small_store import write_variants
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from diffboost import cli
from diffboost.conditions.edges import EdgeDetector, _hed, load_edge_detector
from diffboost.cost import command, units
from diffboost.cost.command import plan_study
from diffboost.cost.configs import parse
from diffboost.cost.counting import LiveBytes
from diffboost.cost.devices import GPUS, find_device
from diffboost.cost.report import rows, table
from diffboost.data.slices import read_store
from diffboost.generation.backbones import SD15
from diffboost.prepare import prepare
from diffboost.stages import stage_configs
from diffboost.unlabelled import prepare_unlabelled

CONFIGS = stage_configs()
SIZE = 32
CHANNELS = [8, 8, 16]
PHANTOMS = {"num_training": 4, "num_test": 2, "size_px": SIZE, "num_slices": 4}


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    """An experiment file with its store and synthetic store in runs/small."""
    folder = tmp_path_factory.mktemp("cost")
    experiment = {
        "name": "small",
        "task": "phantom_organ",
        "dataset_dir": "phantoms",
        "backbone": small_backbone.write_backbone(folder / "backbone", 0.03),
        "image_size": SIZE,
        "edges": "gradient",
        "num_folds": 2,
        "arms": ["baseline", "diffboost"],
        "prepare": {"phantoms": PHANTOMS},
        "finetune": {"epochs": 2, "batch_size": 4, "num_copies": 2, "min_foreground_px": 1},
        "synthesis": {"ratio": 2, "num_inference_steps": 2, "guidance_scale": 3.0,
                      "batch_size": 7, "min_foreground_px": 1},
        "segmentation": {"epochs": 2, "batch_size": 4, "channels": CHANNELS},
    }  # fmt: skip
    (folder / "small.yaml").write_text(yaml.safe_dump(experiment))
    store = folder / "runs/small/store"
    prepare("phantoms", store, "phantom_organ", SIZE, "gradient", num_folds=2, phantoms=PHANTOMS)
    write_variants(store, folder / "runs/small/fold0/synthetic")
    return folder


@pytest.fixture(scope="module")
def planned(study):
    """What `plan_study` gives for that experiment."""
    return plan_study(study / "small.yaml", runs_dir=study / "runs")


@pytest.fixture(scope="module")
def plan(planned):
    """{(stage, arm): stage} of that experiment."""
    return {(stage.stage, stage.what): stage for stage in planned[1]}


def counted(run) -> int:
    """FLOPs of what really runs; the plain attention is the one that the counter knows on CPUs."""
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        run()
    return counter.get_total_flops()


def bundle(section: str, study, *overlays: str, **knobs) -> ConfigParser:
    """A bundle's config with the knobs of the experiment, ready to run on the CPU."""
    files = [CONFIGS[section], *(CONFIGS[section].with_name(f"{name}.yaml") for name in overlays)]
    parser = ConfigParser(ConfigParser.load_config_files([str(file) for file in files]))
    experiment = yaml.safe_load((study / "small.yaml").read_text())
    settings = {"store_dir": str(study / "runs/small/store"), "device": "cpu", "image_size": SIZE}
    parser.update(settings | experiment.get(section, {}) | knobs)
    return parser


def test_generator_costs_what_a_run_of_it_counts(study, plan):
    backbone = str(study / "backbone")
    generator = study / "generator"
    parser = bundle("finetune", study, backbone=backbone, output_dir=str(generator))
    cache = counted(lambda: parser.get_parsed_content("train::dataset"))
    latents, finetune = plan["latents", ""], plan["finetune", ""]
    assert latents.flops == pytest.approx(cache, rel=0.05)
    files = [file for file in (study / "generator.cache").rglob("*.npy")]
    assert latents.disk_bytes == pytest.approx(sum(f.stat().st_size for f in files), rel=0.001)
    trainer = parser.get_parsed_content("train::trainer")
    assert finetune.flops == pytest.approx(counted(trainer.run), rel=0.05)
    assert finetune.steps == trainer.state.iteration
    assert finetune.images == 2 * len(trainer.data_loader.dataset)
    states = [v for state in trainer.optimizer.state.values() for v in state.values()]
    assert finetune.unit.optimizer_bytes == sum(v.nbytes for v in states)
    saved = torch.load(generator / "model.pt", weights_only=True)
    assert finetune.disk_bytes == sum(tensor.nbytes for tensor in saved.values())

    parser = bundle(
        "synthesis", study, backbone=backbone, generator_dir=str(generator),
        output_dir=str(study / "synthetic"),
    )  # fmt: skip
    evaluator = parser.get_parsed_content("evaluator")
    synthesis = plan["synthesize", ""]
    assert synthesis.flops == pytest.approx(counted(evaluator.run), rel=0.05)
    assert synthesis.images == len(list((study / "synthetic.partial/images").iterdir()))


def test_the_quality_filter_costs_an_edge_map_and_a_pass_a_variant(study, plan, tmp_path):
    """A plan left it out."""
    experiment = yaml.safe_load((study / "small.yaml").read_text())
    experiment["synthesis"] = experiment.get("synthesis", {}) | {"quality_filter": True}
    (tmp_path / "small.yaml").write_text(yaml.safe_dump(experiment))
    stages = plan_study(tmp_path / "small.yaml", runs_dir=study / "runs")[1]
    (filtered,) = [stage for stage in stages if stage.stage == "synthesize"]
    plain, tested = plan["synthesize", ""], plan["evaluate", "baseline"]
    judged = plain.images * (plan["prepare", ""].unit.flops + tested.unit.flops)
    assert filtered.flops - plain.flops == pytest.approx(judged)


@pytest.mark.parametrize("arm", ["baseline", "diffboost"])
def test_segmenter_costs_what_a_run_of_it_counts(study, plan, arm):
    knobs = {"arm": arm, "num_classes": 2, "output_dir": str(study / arm)}
    if arm == "diffboost":
        knobs["synthetic_dir"] = str(study / "runs/small/fold0/synthetic")
    parser = bundle("segmentation", study, **knobs)
    trainer = parser.get_parsed_content("train::trainer")
    training, evaluation = plan["train_segmentation", arm], plan["evaluate", arm]
    assert training.flops == pytest.approx(counted(trainer.run), rel=0.05)
    assert (training.images, training.steps) == (2 * 3 * 4, trainer.state.iteration)
    assert training.disk_bytes == sum(v.nbytes for v in trainer.network.state_dict().values())
    parser = bundle("segmentation", study, "evaluate", **knobs)
    evaluator = parser.get_parsed_content("validate::evaluator")
    assert evaluation.flops == pytest.approx(counted(evaluator.run), rel=0.05)
    assert evaluation.disk_bytes == 8 * SIZE**2  # a byte a pixel of two cases of four slices


def test_pix2pix_costs_what_a_run_of_it_counts(study):
    knobs = {"epochs": 1, "batch_size": 4, "channels": [8, 16], "discriminator_channels": 8}
    parser = bundle("pretrain.pix2pix", study, **knobs, output_dir=str(study / "pix2pix"))
    trainer = parser.get_parsed_content("train::trainer")
    run = counted(trainer.run)
    unit = units.translator_training(
        parse([CONFIGS["pretrain.pix2pix"]], knobs | {"image_size": SIZE})
    )
    assert 4 * trainer.state.iteration * unit.flops == pytest.approx(run, rel=0.05)
    networks = (trainer.state.g_network, trainer.state.d_network)
    weights = sum(weight.nbytes for network in networks for weight in network.parameters())
    assert unit.gradient_bytes == weights


def test_edges_cost_what_a_run_of_them_counts(tmp_path, plan):
    network = ControlNetHED_Apache2().requires_grad_(False)
    torch.save(network.state_dict(), tmp_path / "hed.pth")
    slices = torch.linspace(-1, 1, 24 * SIZE**2).reshape(24, 1, SIZE, SIZE)
    direct = EdgeDetector("controlnet-hed", partial(_hed, network), None, "", "cpu")
    unit = units.edge_detection("controlnet-hed", SIZE, None)
    assert 24 * unit.flops == pytest.approx(counted(lambda: direct(slices)), rel=0.05)
    winograd = load_edge_detector("controlnet-hed", tmp_path / "hed.pth")
    assert counted(lambda: winograd(slices)) < 0.35 * 24 * unit.flops  # what processors do
    gradient = load_edge_detector("gradient")
    assert plan["prepare", ""].flops == pytest.approx(counted(lambda: gradient(slices)), rel=0.05)
    assert plan["prepare", ""].disk_bytes == 24 * 4 * SIZE**2


def test_generator_without_a_cache_encodes_in_its_steps(study):
    file = study / "uncached.yaml"
    experiment = yaml.safe_load((study / "small.yaml").read_text())
    experiment["finetune"] |= {"cache_latents": False, "precision": "bfloat16", "epochs": 1}
    file.write_text(yaml.safe_dump(experiment))
    stages = {stage.stage: stage for stage in plan_study(file, runs_dir=study / "runs")[1]}
    assert "latents" not in stages
    backbone = str(study / "backbone")
    parser = bundle("finetune", study, backbone=backbone, cache_latents=False, epochs=1,
                    output_dir=str(study / "uncached"))  # fmt: skip
    run = counted(parser.get_parsed_content("train::trainer").run)
    finetune = stages["finetune"]
    assert finetune.flops == pytest.approx(run, rel=0.05)
    encoder = finetune.images * units.encoding(backbone, SIZE).flops
    assert finetune.float32_flops == pytest.approx(encoder)  # whatever the step's precision
    device = find_device("a100")
    hours = rows([finetune], device).hours.item()
    expected = device.hours(run - encoder, "bfloat16") + device.hours(encoder, "float32")
    assert hours == pytest.approx(expected, rel=0.05)


def test_live_bytes_follow_what_is_freed():
    weight = torch.zeros(4, 4, device="meta")
    with LiveBytes([weight]) as live:
        first = weight.new_zeros(1000)  # 4000 bytes
        second = first + 1
        del first
        assert (live.bytes, live.peak) == (4000, 8000)
        third = second.view(10, 100)  # a view takes nothing, nor does one of what was there
        weight.t()
        del second
        assert (live.bytes, live.peak) == (4000, 8000)
        del third
        assert live.bytes == 0


@pytest.fixture(scope="module")
def paper_fold(tmp_path_factory):
    """The paper's breast fold: 98 training images of 384 px, Stable Diffusion 1.5."""
    path = tmp_path_factory.mktemp("paper") / "breast.yaml"
    experiment = {
        "name": "breast_without_store",
        "task": "breast_ultrasound",
        "dataset_dir": "nowhere",
        "backbone": SD15,
        "image_size": 384,
        "arms": ["baseline", "diffboost"],
        "finetune": {"epochs": 1600, "batch_size": 32, "train_base": False, "inner_fraction": 0.0},
        "synthesis": {"ratio": 50, "scheduler": "ddim", "num_inference_steps": 20,
                      "guidance_scale": 9.0, "inner_fraction": 0.0},
        "segmentation": {"epochs": 100, "inner_fraction": 0.0, "selection": "test",
                         "allow_selection_on_test": True,
                         "merge": "logits"},
    }  # fmt: skip
    path.write_text(yaml.safe_dump(experiment))
    return path


def test_the_papers_breast_fold_costs_what_the_literature_says(paper_fold, monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError("cost opened a connection")

    monkeypatch.setattr(socket, "create_connection", refuse)
    monkeypatch.setattr(socket.socket, "connect", refuse)
    _, stages, _ = plan_study(paper_fold, num_slices=147)
    plan = {(stage.stage, stage.what): stage for stage in stages}
    finetune, synthesis = plan["finetune", ""], plan["synthesize", ""]
    # performance_facts 3.1: 1.17 TFLOP a cached training step, 24.3 a guided sample, 119 PFLOP all;
    # folded upsampling saves 3.6 and 4.4 % of them; hint features and text keys, computed once, 2 %
    # of a sample
    assert finetune.unit.flops == pytest.approx(1.133e12, rel=0.001)
    assert (finetune.images, finetune.steps) == (98 * 1600, 6400)
    assert synthesis.unit.flops == pytest.approx(22.69e12, rel=0.001)
    assert synthesis.flops == pytest.approx(111.84e15, rel=0.001)  # with batches filled up
    branch, unet, autoencoder = 361_279_120, 859_520_964, 83_653_863
    average = branch
    unet += 16 * (2 * 1280**2 + 640**2)  # the frozen UNet's folded kernels
    assert finetune.unit.weight_bytes == 4 * (branch + unet + average)
    assert finetune.unit.gradient_bytes == finetune.disk_bytes == 4 * branch
    assert finetune.unit.optimizer_bytes == pytest.approx(8 * branch, rel=1e-5)
    assert synthesis.unit.weight_bytes == 4 * (branch + unet + autoencoder)
    merged, plain = (plan["train_segmentation", arm] for arm in ("diffboost", "baseline"))
    assert merged.unit.flops == pytest.approx(2 * plain.unit.flops, rel=0.001)


def test_the_experiment_of_the_page_gives_the_table_of_the_page(tmp_path):
    blocks = fences((REPOSITORY / "docs" / "cost.md").read_text(encoding="utf-8"))
    shown = dict(blocks)  # one experiment, one table
    path = tmp_path / "breast_fold.yaml"
    path.write_text(shown["yaml"])
    _, stages, _ = plan_study(path, num_slices=147)
    counted = f"breast_fold on a6000\n\n{table(rows(stages, find_device('a6000')))}\n"
    # The activations of finetuning come out some 5 % higher or lower from count to count.
    counted, shown = (
        re.sub(r"(finetune .* 4\.34 GB) +\S+ GB +\S+ GB", r"\1", text).split()
        for text in (counted, shown["text"])
    )
    assert counted == shown


def test_stable_diffusion_counts_agree_with_the_literature():
    # performance_facts 3.1: GMAC of the encoder by image size, TFLOP of a guided sample at 512 px
    for size, encoder in ((256, 136.4), (384, 309.8), (512, 558.3)):
        assert units.encoding(SD15, size, 1).flops == pytest.approx(2e9 * encoder, rel=0.001)
    knobs = {"backbone": SD15, "image_size": 512, "guidance_scale": 9.0, "scheduler": "ddim"}
    parser = parse([CONFIGS["synthesis"]], knobs | {"num_inference_steps": 20})
    # 46.0 there; folded upsampling saves 4 %, conditions computed once 2 %
    assert units.sampling(parser).flops == pytest.approx(43.34e12, rel=0.001)
    assert units.embedding(SD15).flops == pytest.approx(2e9 * 6.6, rel=0.01)


def test_half_precision_and_checkpointing_change_what_they_should(study):
    backbone = str(study / "backbone")
    knobs = {"backbone": backbone, "image_size": SIZE, "batch_size": 4, "train_base": False}
    whole = units.generator_training(parse([CONFIGS["finetune"]], knobs))
    changed = knobs | {"precision": "bfloat16", "gradient_checkpointing": True}
    half = units.generator_training(parse([CONFIGS["finetune"]], changed))
    assert half.precision == "bfloat16" and whole.precision == "float32"
    assert half.weight_bytes < whole.weight_bytes  # the frozen UNet in 16 bit
    assert half.flops > 1.02 * whole.flops  # computed again
    assert half.activation_bytes < whole.activation_bytes
    changed = knobs | {"optimizer_name": "adamw8bit"}
    eight = units.generator_training(parse([CONFIGS["finetune"]], changed))
    assert eight.optimizer_bytes == whole.optimizer_bytes // 4


def test_command_prints_a_table_and_json(study, planned, capsys, tmp_path, monkeypatch):
    monkeypatch.setitem(GPUS, "a6000", replace(GPUS["a6000"], memory_bytes=1e6))
    file, settings = str(study / "small.yaml"), {"runs_dir": str(study / "runs")}
    cli.cost(file, "a6000", json=str(tmp_path / "plan.json"), **settings)
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "small on a6000"
    stages = [line.split()[0] for line in lines[3 : lines.index("", 3)]]
    assert stages == ["prepare", "latents", "finetune", "synthesize", "train_segmentation",
                      "evaluate", "total"]  # fmt: skip
    for line in lines[7:9]:  # merged images cost what plain ones do
        assert "baseline, diffboost" in line
    assert any("40% of 38.7 TFLOP/s in float32" in line for line in lines)
    assert any("24 slices of 6 cases, of the store" in line for line in lines)
    warned = [line for line in lines if line.startswith("Warning: finetune: up to")]
    assert len(warned) == 1 and "a6000 has 1 MB; a smaller batch_size" in warned[0]
    plan = json.loads((tmp_path / "plan.json").read_text())
    assert plan["total"]["flops"] == pytest.approx(sum(s["flops"] for s in plan["stages"]))
    finetune = plan["stages"][2]
    assert finetune["hours"] == pytest.approx(finetune["flops"] / (38.7e12 * 0.4) / 3600)
    monkeypatch.setattr(command, "plan_study", lambda *args, **sizes: planned)
    cli.cost(file, "a6000", json=True, **settings)
    assert json.loads(capsys.readouterr().out) == plan
    cli.cost(file, "cpu", **settings)  # this machine, measured
    assert "measured now, convolutions on" in capsys.readouterr().out


@pytest.mark.parametrize(
    "settings, words",
    [
        ({"device": "h10"}, "device: 'h10' is unknown; did you mean 'h100'"),
        ({"device": "a100"}, "dataset_dir: no such folder.*--num_slices"),
        ({"device": "a100", "num_slices": 2}, "num_slices: 2; .* from num_folds"),
    ],
)
def test_bad_input_names_the_key(paper_fold, tmp_path, settings, words):
    with pytest.raises(SystemExit) as refused:
        cli.cost(str(paper_fold), runs_dir=str(tmp_path), **settings)
    assert re.search(words, str(refused.value))


def test_unlabelled_images_are_counted_as_they_are_trained_on(study, tmp_path):
    written = yaml.safe_load((study / "small.yaml").read_text())
    (study / "few.yaml").write_text(
        yaml.safe_dump(written | {"num_cases": 2, "unlabelled": {"epochs": 3}})
    )
    stages = {
        stage.stage: stage for stage in plan_study(study / "few.yaml", runs_dir=study / "runs")[1]
    }
    store = prepare_unlabelled(study / "runs/small/store", tmp_path / "made", fold=0, num_cases=2)
    number = len(read_store(store).index)
    assert number == 8 == stages["prepare_unlabelled"].images
    first, then = stages["train_on_unlabelled"], stages["finetune"]
    assert (first.images, first.steps) == (3 * number, 3 * 2)
    assert first.flops / first.images == then.flops / then.images


def test_an_auto_ratio_is_bounded_by_its_budget_or_its_largest(study):
    written = yaml.safe_load((study / "small.yaml").read_text())
    written["synthesis"]["ratio"] = "auto"

    def planned(**search):
        path = study / "auto.yaml"
        path.write_text(yaml.safe_dump(written | {"auto_ratio": search}))
        stages = plan_study(path, runs_dir=study / "runs")[1]
        return {stage.stage: stage for stage in stages}

    whole = planned(max_ratio=10, budget={"hours": 1}, epochs=1, seeds=[0], min_cases=1)
    assert whole["synthesize"].what == "at most ratio 10" and whole["probes"].flops > 0
    slices = whole["train_segmentation"].images // written["segmentation"]["epochs"]
    assert whole["probes"].images == 3 * slices  # at ratios 1, 2 and 5, of one epoch each
    few = planned(max_ratio=10, budget={"hours": 1}, epochs=1, seeds=[0])
    assert few["synthesize"].what == "at most ratio 10" and "probes" not in few
    fixed = {**written, "synthesis": {**written["synthesis"], "ratio": 10}, "name": "small"}
    (study / "fixed.yaml").write_text(yaml.safe_dump(fixed))
    stages = plan_study(study / "fixed.yaml", runs_dir=study / "runs")[1]
    assert whole["synthesize"].flops in [stage.flops for stage in stages]
    small = planned(max_ratio=10, budget={"tflop": 1e-6})
    assert small["synthesize"].what == "at most ratio 1" and "probes" not in small
