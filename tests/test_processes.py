"""Two processes with half the batch do what one does: losses, variants, scores."""

import copy
import os
import re
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pandas as pd
import psutil
import pytest
import small_backbone
import torch
import yaml
from monai.bundle import run
from torchrun import bundle_settings, run_in_two_processes, torchrun

from diffboost.prepare import prepare
from diffboost.segmentation import batch_norm

PRETRAIN, FINETUNE = "radimagenet_controlnet_pretrain", "task_finetune"
SYNTHESIS, SEGMENTATION = "diffboost_synthesis", "diffboost_segmentation"
# name: bundle, config, overlay, knobs; 15 slices have a last batch of 3, or of 2 and 1. A small
# learning rate keeps rounding small, which Adam and batch norm enlarge with every step.
TRAININGS = {
    "pretrain": (PRETRAIN, "train", "multi_gpu_train", {"train_base": False, "batch_size": 8}),
    "autoencoder": (
        PRETRAIN, "train_autoencoder", "multi_gpu_train",
        {"amp": False, "batch_size": 6, "downsampling": 4},
    ),
    "pix2pix": (
        PRETRAIN, "train_pix2pix", "multi_gpu_train_pix2pix",
        {"channels": [4, 8], "discriminator_channels": 4, "batch_size": 6},
    ),
    "finetune": (FINETUNE, "train", "multi_gpu_train", {"num_copies": 2, "batch_size": 4}),
    "segmentation": (
        SEGMENTATION, "train", "multi_gpu_train",
        {"arm": "diffboost+nnunet", "channels": [4, 8, 8], "batch_size": 4,
         "learning_rate": 1.0e-4},
    ),
}  # fmt: skip


def training(folder: Path, name: str, processes: int) -> dict:
    """The run of a training in so many processes, with the same effective batch."""
    bundle, config, overlay, knobs = TRAININGS[name]
    knobs = knobs | {
        "store_dir": str(folder / "store"),
        "output_dir": str(folder / f"{name}_{processes}"),
        "image_size": 32,
        "epochs": 3,
        "device": "cpu",
    }
    knobs["batch_size"] //= processes
    if (name, processes) == ("finetune", 2):  # and half of that twice a step
        knobs |= {"batch_size": knobs["batch_size"] // 2, "accumulation": 2}
    if bundle == SEGMENTATION:
        knobs["synthetic_dir"] = str(folder / "synthetic_1")
    elif config != "train_pix2pix":
        knobs["backbone"] = str(folder / "backbone")
    return bundle_settings(bundle, [config, overlay][:processes], knobs)


def synthesis(folder: Path, name: str, processes: int = 1) -> dict:
    """A synthesis whose last batch is not full: 30 variants, 7 a batch."""
    knobs = {"store_dir": folder / "store", "backbone": folder / "backbone"}
    knobs |= {"generator_dir": folder / "finetune_1", "output_dir": folder / name}
    knobs = {key: str(value) for key, value in knobs.items()}
    knobs |= {"image_size": 32, "ratio": 2, "num_inference_steps": 2, "batch_size": 7}
    configs = ["inference", "multi_gpu_inference"][:processes]
    return bundle_settings(SYNTHESIS, configs, knobs | {"device": "cpu"})


def evaluation(folder: Path, name: str, processes: int = 1) -> dict:
    """The scores of the segmenter that one process trained, over all cases: an odd number."""
    settings = training(folder, "segmentation", 1)
    settings |= {"output_dir": str(folder / name), "part": "all"}
    settings["model_path"] = str(folder / "segmentation_1" / "model.pt")
    configs = ["train", "evaluate", "multi_gpu_evaluate"][: processes + 1]
    return settings | bundle_settings(SEGMENTATION, configs, {})


def comparison(folder: Path, name: str, processes: int = 1) -> dict:
    """Table 1 of the held-out images: an odd number of batches."""
    knobs = {"store_dir": "store", "backbone": "backbone", "generator_dir": "pretrain_1"}
    knobs |= {"pix2pix_dir": "pix2pix_1", "output_dir": name}
    knobs = {key: str(folder / value) for key, value in knobs.items()}
    knobs |= {"image_size": 32, "num_inference_steps": 2, "num_images": 5, "batch_size": 2}
    configs = ["evaluate", "multi_gpu_evaluate"][:processes]
    return bundle_settings(PRETRAIN, configs, knobs | {"device": "cpu"})


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Every run in one process, then all of them in two; a thread a process."""
    folder = tmp_path_factory.mktemp("processes")
    phantoms = {"num_training": 4, "num_test": 1, "size_px": 32, "num_slices": 5}
    prepare(
        "phantoms", folder / "store", "phantom_organ", 32, "gradient", num_folds=2,
        phantoms=phantoms,
    )  # fmt: skip
    small_backbone.write_backbone(folder / "backbone", zero_convolution_std=0.03)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    for name in ("pretrain", "autoencoder", "pix2pix", "finetune"):
        run(**training(folder, name, 1))
    run(**synthesis(folder, "synthetic_1"))
    run(**training(folder, "segmentation", 1))
    run(**evaluation(folder, "scores_1"))
    run(**comparison(folder, "table1_1"))
    torch.set_num_threads(threads)
    again = [training(folder, name, 2) for name in TRAININGS]
    again += [synthesis(folder, "synthetic_2", 2), evaluation(folder, "scores_2", 2)]
    again += [comparison(folder, "table1_2", 2)]
    run_in_two_processes(again, folder)
    return folder


@pytest.mark.parametrize("name", TRAININGS)
def test_two_processes_have_the_losses_of_one(folder, name):
    one, two = (pd.read_csv(folder / f"{name}_{n}" / "training_log.csv") for n in (1, 2))
    losses = [column for column in one if column.endswith("loss")]
    assert losses and one[losses].nunique().min() == 3 == len(two)
    np.testing.assert_allclose(two[losses], one[losses], rtol=1e-7, atol=1e-5)
    first, second = (
        torch.load(folder / f"{name}_{n}" / "model.pt", weights_only=True) for n in (1, 2)
    )
    assert list(first) == list(second)


def test_two_processes_write_the_variants_of_one_byte_for_byte(folder):
    one, two = (folder / f"synthetic_{n}" for n in (1, 2))
    pd.testing.assert_frame_equal(
        *(pd.read_parquet(store / "manifest.parquet") for store in (one, two))
    )
    names = sorted(path.name for path in (one / "images").iterdir())
    assert names == sorted(path.name for path in (two / "images").iterdir()) and len(names) == 30
    for name in [f"images/{name}" for name in names] + ["edge_agreement.json", "run.json"]:
        assert (one / name).read_bytes() == (two / name).read_bytes(), name


def test_an_interrupted_synthesis_is_taken_up(folder):
    whole, partial = folder / "synthetic_1", folder / "resumed.partial"
    (partial / "images").mkdir(parents=True)
    manifest = pd.read_parquet(whole / "manifest.parquet")
    assert list(manifest.batch_place[:9]) == [0, 1, 2, 3, 4, 5, 6, 0, 1]
    for image in manifest.image[:9]:  # the first batch is whole, the second is made for its rest
        shutil.copy(whole / image, partial / image)
        os.utime(partial / image, (0, 0))
    shutil.copy(whole / "run.json", partial)
    settings = synthesis(folder, "resumed")
    with pytest.raises(RuntimeError) as error:
        run(**settings | {"seed": 1})
    assert "resumed.partial holds another run" in str(error.value.__cause__)
    run(**settings)
    files = [folder / "resumed" / image for image in manifest.image]
    assert [file.stat().st_mtime == 0 for file in files] == [True] * 9 + [False] * 21
    for file, image in zip(files, manifest.image, strict=True):
        assert file.read_bytes() == (whole / image).read_bytes()
    assert not partial.exists()


def test_two_processes_write_the_scores_of_one(folder):
    one, two = (folder / f"scores_{n}" for n in (1, 2))
    assert (one / "metrics.csv").read_bytes() == (two / "metrics.csv").read_bytes()
    assert pd.read_csv(one / "metrics.csv").case.nunique() == 5
    for path in (one / "predictions").iterdir():
        assert path.read_bytes() == (two / "predictions" / path.name).read_bytes()


def test_comparison_of_table1_in_two_processes(folder):
    one, two = (folder / f"table1_{n}" for n in (1, 2))
    for name in ("image_quality.csv", "table1.csv"):
        assert (one / name).read_bytes() == (two / name).read_bytes()


def test_batch_norm_over_two_equal_batches_is_that_of_both(monkeypatch):
    monkeypatch.setattr(batch_norm, "process_rank_and_count", lambda: (0, 2))
    monkeypatch.setattr(batch_norm, "sum_over_processes", lambda tensor: 2 * tensor)
    torch.manual_seed(0)
    images = torch.randn(3, 4, 5, 5) * 3 + 100
    plain = torch.nn.Sequential(torch.nn.BatchNorm2d(4)).double()
    torch.nn.init.normal_(plain[0].weight)
    joint = batch_norm.synchronize_batch_norm(copy.deepcopy(plain))
    first, both = (
        x.double().requires_grad_() for x in (images.clone(), torch.cat([images, images]))
    )
    (joint(first) ** 3).sum().backward()
    (plain(both) ** 3).sum().backward()
    torch.testing.assert_close(first.grad, both.grad[:3])
    torch.testing.assert_close(2 * joint[0].weight.grad, plain[0].weight.grad)
    for name, value in plain.state_dict().items():
        torch.testing.assert_close(joint.state_dict()[name], value)
    torch.testing.assert_close(joint.eval()(first), plain.eval()(first))


def test_a_torchrun_that_takes_too_long_leaves_no_process(tmp_path):
    script = tmp_path / "sleeper.py"
    script.write_text("import time\ntime.sleep(600)\n")
    with pytest.raises(subprocess.TimeoutExpired):
        torchrun([str(script)], timeout=8)
    commands = [process.info["cmdline"] or [] for process in psutil.process_iter(["cmdline"])]
    assert not [command for command in commands if str(script) in command]


def test_slurm_profile_knows_every_stage():
    workflow = Path(__file__).parents[1] / "workflow"
    profile = yaml.safe_load((workflow / "profiles/slurm/config.yaml").read_text())
    text = "".join(path.read_text() for path in (workflow / "rules").glob("*.smk"))
    local = re.search(r"localrules:\n((?: +\w+,\n)+)", text).group(1)
    stages = set(re.findall(r"^rule (\w+):", text, re.M)) - set(re.findall(r"\w+", local))
    assert set(profile["set-resources"]) == stages and profile["executor"] == "slurm"
