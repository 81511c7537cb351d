"""Distillation: its steps in closed form, a student end to end, and resume."""

import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from diffusers import DDIMScheduler
from PIL import Image
from test_generation_bundles import (
    FINETUNE,
    bundle_run,
    finetune,
    refused,
    synthesize,
    write_study,
)

from diffboost.data.slices import read_store
from diffboost.files import sha256_of_files
from diffboost.generation.backbones import load_part
from diffboost.generation.distillation import (
    ConsistencyInferer,
    ConsistencyPrepareBatch,
    load_student,
    split_prediction,
)
from diffboost.generation.lineage import read_lineage, write_lineage
from diffboost.generation.schedulers import load_scheduler
from diffboost.generation.text import embed_prompts

SHAPE = (2, 4, 8, 8)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_study(tmp_path_factory.mktemp("distillation"))


@pytest.fixture(scope="module")
def backbone(folder):
    return str(folder / "backbone")


@pytest.fixture(scope="module")
def generator(folder):
    return finetune(folder, "generator")


def distill(folder: Path, generator: Path, name: str, **knobs) -> Path:
    """A student after two epochs of three steps."""
    settings = {"store_dir": str(folder / "store"), "backbone": str(folder / "backbone")}
    settings |= {"generator_dir": str(generator), "output_dir": str(folder / name)}
    settings |= {"image_size": 32, "epochs": 2, "batch_size": 4, "num_copies": 2, "device": "cpu"}
    bundle_run(FINETUNE, ["distill"], **(settings | knobs))
    return folder / name


@pytest.fixture(scope="module")
def student(folder, generator):
    return distill(folder, generator, "student")


class Prompted(torch.nn.Module):
    """A network whose output is its prompt's mean everywhere, or a fixed tensor."""

    def __init__(self, output=None):
        super().__init__()
        self.output = output

    def forward(self, image, timesteps, context, edge):
        if self.output is not None:
            return self.output
        return torch.ones_like(image) * context.mean((1, 2))[:, None, None, None]


def inputs(timestep: int) -> dict:
    """What goes to a network beside the noisy latent."""
    torch.manual_seed(0)
    context, edge = torch.randn(2, 12, 16), torch.rand(2, 1, 32, 32)
    return {"timesteps": torch.full((2,), timestep), "context": context, "edge": edge}


# closed forms


def test_consistency_at_timestep_0_is_the_latent_itself(backbone):
    noisy = torch.randn(SHAPE)
    clean = ConsistencyInferer(backbone)(noisy, Prompted(torch.randn(SHAPE)), **inputs(0))
    assert torch.equal(clean, noisy)


@pytest.mark.parametrize("timestep", [19, 499, 999])
def test_consistency_has_the_scalings_of_the_scheduler_that_samples(backbone, timestep):
    noisy, output = torch.randn(SHAPE), torch.randn(SHAPE)
    found = ConsistencyInferer(backbone)(noisy, Prompted(output), **inputs(timestep))
    alpha = load_part(backbone, "scheduler").alphas_cumprod[timestep]
    clean = (noisy - (1 - alpha).sqrt() * output) / alpha.sqrt()
    scaled = timestep * 10
    c_skip, c_out = 0.25 / (scaled**2 + 0.25), scaled / (scaled**2 + 0.25) ** 0.5
    torch.testing.assert_close(found, c_skip * noisy + c_out * clean)
    scheduler = load_scheduler(backbone, "lcm")
    scheduler.set_timesteps(50)
    torch.testing.assert_close(found, scheduler.step(output, timestep, noisy)[1])


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("timestep", [999, 499, 19])
def test_the_teachers_step_is_that_of_ddim(backbone, timestep, prediction_type):
    noisy, output = torch.randn(SHAPE), torch.randn(SHAPE)
    prepare_batch = ConsistencyPrepareBatch(backbone, Prompted(output), Prompted(output))
    prepare_batch.infer.scheduler.register_to_config(prediction_type=prediction_type)
    nearer, timesteps = prepare_batch.step(noisy, **inputs(timestep))
    assert timesteps.tolist() == [max(timestep - 20, 0)] * 2
    config = load_part(backbone, "scheduler").config
    options = {"timestep_spacing": "trailing", "set_alpha_to_one": False, "clip_sample": False}
    ddim = DDIMScheduler.from_config(config, **options, prediction_type=prediction_type)
    ddim.set_timesteps(50)
    expected = ddim.step(output, timestep, noisy).prev_sample
    torch.testing.assert_close(nearer, expected, atol=1e-5, rtol=1e-5)


def test_both_parts_of_a_prediction_make_the_noisy_latent_again(backbone):
    scheduler = load_scheduler(backbone, "lcm")
    clean, noise, timesteps = torch.randn(SHAPE), torch.randn(SHAPE), torch.tensor([19, 979])
    noisy = scheduler.add_noise(clean, noise, timesteps)
    parts = split_prediction(scheduler, noise, noisy, timesteps)
    torch.testing.assert_close(parts[0], clean, atol=1e-4, rtol=1e-4)
    assert parts[1] is noise


def test_guidance_moves_the_teacher_away_from_the_empty_prompt(backbone):
    conditions = inputs(999)
    prepare_batch = ConsistencyPrepareBatch(backbone, Prompted(), Prompted(), guidance_scale=3.0)
    found = prepare_batch._guided(torch.randn(SHAPE), **conditions)
    empty, full = embed_prompts(backbone, [""]).mean(), conditions["context"].mean((1, 2))
    torch.testing.assert_close(found[:, 0, 0, 0], empty + 3 * (full - empty))
    with pytest.raises(ValueError, match="guidance_scale: 0.5 is not 1"):
        ConsistencyPrepareBatch(backbone, Prompted(), Prompted(), guidance_scale=0.5)


@pytest.mark.parametrize(("drawn", "on_grid"), [(0, 19), (19, 19), (20, 39), (999, 999)])
def test_a_drawn_timestep_goes_to_the_grid_and_the_target_carries_no_gradient(
    backbone, drawn, on_grid
):
    student = torch.nn.Module()
    student.weight = torch.nn.Parameter(torch.ones(1))
    student.forward = lambda image, timesteps, context, edge: image * student.weight
    prepare_batch = ConsistencyPrepareBatch(backbone, Prompted(), student)
    batch = {"latent": torch.randn(SHAPE), "noise": torch.randn(SHAPE)}
    batch |= {"timestep": torch.full((2,), drawn)} | inputs(0)
    noisy, target, _, conditions = prepare_batch(batch, "cpu")
    assert conditions["timesteps"].tolist() == [on_grid] * 2 and not target.requires_grad
    alpha = load_part(backbone, "scheduler").alphas_cumprod[on_grid]
    expected = alpha.sqrt() * batch["latent"] + (1 - alpha).sqrt() * batch["noise"]
    torch.testing.assert_close(noisy, expected)


# a student end to end


def test_a_student_has_weights_log_and_lineage_of_its_own(folder, generator, student):
    names = {path.name for path in student.iterdir()}
    assert names == {"model.pt", "lineage.json", "training_log.csv", "timing.csv", "run.json"}
    log = pd.read_csv(student / "training_log.csv")
    assert list(log.epoch) == [1, 2] and np.isfinite(log.train_loss).all()
    lineage, before = (read_lineage(path / "lineage.json") for path in (student, generator))
    assert lineage["prediction"] == "consistency" and lineage["fold"] == 0
    assert lineage["teacher_sha256"] == sha256_of_files([generator / "model.pt"])
    assert lineage["ancestors"] == [before] and lineage["cases"] == before["cases"]
    assert lineage["steps"] == 6 and "prediction" not in before
    weights = [torch.load(path / "model.pt", weights_only=True) for path in (student, generator)]
    assert weights[0].keys() == weights[1].keys()
    moved = [key for key in weights[0] if not torch.equal(weights[0][key], weights[1][key])]
    assert {key.split(".")[0] for key in moved} == {"controlnet", "unet"}
    (cache,) = (folder / "generator.cache").iterdir()  # the teacher's, not encoded again
    assert cache.is_dir() and not (folder / "student.cache").exists()


def test_a_student_of_a_branch_trains_the_branch_alone(folder):
    teacher = finetune(folder, "branch", train_base=False, epochs=1)
    network = load_student(str(teacher), str(folder / "backbone"))
    assert {name.split(".")[0] for name in network.state_dict()} == {"controlnet"}
    assert not any(parameter.requires_grad for parameter in network.base.parameters())


def test_a_teacher_that_saw_a_test_case_is_refused(folder, generator, tmp_path):
    lineage = read_lineage(generator / "lineage.json")
    hashes = read_store(folder / "store").source_sha256()
    seen = next(case for case in hashes if case.startswith("organ_test"))
    (tmp_path / "model.pt").write_bytes((generator / "model.pt").read_bytes())
    lineage["cases"] = {**lineage["cases"], seen: hashes[seen]}
    write_lineage(tmp_path / "lineage.json", lineage)
    with refused(f"leak: the generator for fold 0 .*{seen}"):
        distill(folder, tmp_path, "leak", cache_dir=str(folder / "generator.cache"))
    assert not (folder / "leak").exists()


def test_guidance_of_the_teacher_changes_the_student(folder, generator, student):
    guided = distill(folder, generator, "guided", guidance_scale=5.0)
    assert (guided / "model.pt").read_bytes() != (student / "model.pt").read_bytes()


def test_a_student_makes_variants_with_lcm_alone(folder, student):
    store = synthesize(folder, student, "few_steps", scheduler="lcm", ratio=1)
    manifest = pd.read_parquet(store / "manifest.parquet")
    assert len(manifest) == 12 and set(manifest.scheduler) == {"lcm"}
    other = synthesize(folder, student, "batches", scheduler="lcm", ratio=1, batch_size=5)
    for name in manifest.image:  # the second step draws noise, for each variant its own
        pair = (np.asarray(Image.open(path / name)).astype(int) for path in (store, other))
        assert abs(np.subtract(*pair)).max() <= 32, name  # of 65535: sums in another order
    match = (
        "scheduler: 'unipc_karras' does not fit .*student, which predicts consistency; allowed: lcm"
    )
    with refused(match):
        synthesize(folder, student, "wrong")


def test_a_plain_generator_refuses_lcm(folder, generator):
    match = (
        "'lcm' does not fit .* predicts noise; allowed: ddim, dpm\\+\\+, unipc, unipc_karras, euler"
    )
    with refused(match):
        synthesize(folder, generator, "wrong", scheduler="lcm")


def test_a_student_is_no_teacher(folder, student):
    with refused("predicts consistency; distillation needs one that predicts noise"):
        distill(folder, student, "twice")
    with refused("weights: .* predict consistency; training that learns noise"):
        finetune(folder, "again", weights=str(student / "model.pt"))


def test_an_unknown_prediction_says_what_is_allowed(folder, generator, tmp_path):
    lineage = read_lineage(generator / "lineage.json")
    (tmp_path / "model.pt").write_bytes((generator / "model.pt").read_bytes())
    write_lineage(tmp_path / "lineage.json", {**lineage, "prediction": "nosie"})
    with pytest.raises(ValueError, match="'nosie' is not known; did you mean 'noise'"):
        load_student(str(tmp_path), str(folder / "backbone"))


def test_a_stopped_distillation_ends_with_the_same_bytes(folder, generator, student, monkeypatch):
    step, calls, stopped_at = ConsistencyPrepareBatch.step, [], 5  # the second of the second epoch

    def stop(*arguments, **named):
        calls.append(1)
        if len(calls) == stopped_at:
            raise KeyboardInterrupt
        return step(*arguments, **named)

    monkeypatch.setattr(ConsistencyPrepareBatch, "step", stop)
    with pytest.raises(KeyboardInterrupt):
        distill(folder, generator, "stopped", checkpoint_interval=1)
    assert not (folder / "stopped").exists()
    resumed = distill(folder, generator, "stopped", checkpoint_interval=1)
    assert len(calls) == stopped_at + 2  # steps 5 and 6: what was saved is not done again
    for file in ("model.pt", "training_log.csv", "lineage.json"):
        assert (resumed / file).read_bytes() == (student / file).read_bytes(), file
    assert json.loads((resumed / "run.json").read_text())["epochs"] == 2
