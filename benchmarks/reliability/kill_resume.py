"""Runs that are killed at random moments: do they end with the bytes of an undisturbed run?

    python benchmarks/reliability/kill_resume.py [--kills 60] [--seed 0] [--stages finetune …]

Every stage is run once undisturbed, on phantoms of 32 px; then, for each kill, again into the same
empty folder: SIGKILL at a random moment (every third one while some file or checkpoint is being
written), the same command again, and the SHA-256 of every file is compared with the undisturbed
run's. Only timing.csv, wall-clock times, is left out. The number of loader workers goes round 0, 1,
2; one thread computes. Last, some stages run on a disk that is too small (a tmpfs, which needs
root), are refused by it, get room, and end with the same bytes. A stage runs in a forked process,
by the configs of its bundle, as `monai.bundle run` does. The last line is JSON.
"""

import os

os.environ["OMP_NUM_THREADS"] = "1"

import argparse
import json
import logging
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import monai.bundle
import torch

from diffboost.files import sha256_of_files
from diffboost.generation.creation import create_backbone

logger = logging.getLogger("kill_resume")

BUNDLES = Path(__file__).parents[2] / "bundles"
PRETRAIN, FINETUNE = BUNDLES / "radimagenet_controlnet_pretrain", BUNDLES / "task_finetune"
SYNTHESIS, SEGMENTATION = BUNDLES / "diffboost_synthesis", BUNDLES / "diffboost_segmentation"
PHANTOMS = {"num_training": 6, "num_test": 2, "size_px": 32, "num_slices": 4}
BACKBONE = {
    "image_size": 32, "autoencoder_channels": [8, 8, 8], "autoencoder_layers": 1,
    "latent_channels": 4, "unet_channels": [16, 16], "unet_layers": 1, "attention_heads": 2,
    "hint_channels": [8, 8, 8], "text_width": 16, "text_layers": 1, "max_tokens": 12,
    "vocab_size": 600, "seed": 0, "zero_convolution_std": 0.03,
}  # fmt: skip
SMALL = {"image_size": 32, "device": "cpu"}
STEPS = {"batch_size": 4, "checkpoint_interval": 2}
SEGMENTER = {"num_classes": 2, "channels": [4, 8, 8], "learning_rate": 0.01}
NOT_COMPARED = ("timing.csv",)
LIMIT_SECONDS = 600


@dataclass(frozen=True)
class Stage:
    """A stage: its configs, its knobs, and what has to lie in its folder before it starts."""

    bundle: Path
    configs: tuple[str, ...]
    knobs: dict
    before: Callable[[Path], None] | None = None


def stages(inputs: Path, trial: Path) -> dict[str, Stage]:
    """Every stage of a study, in the order in which they need each other's output."""
    out = str(trial / "out")
    tree, store = str(inputs / "edges/out"), str(inputs / "prepare/out")
    backbone = str(inputs / "backbone")
    generator, variants = str(inputs / "finetune/out"), str(inputs / "synthesis/out")
    segmenter = {**SMALL, **SEGMENTER, "store_dir": store, "output_dir": out}
    trained = {**SMALL, **STEPS, "output_dir": out, "epochs": 3}
    diffusion = trained | {"backbone": backbone}
    pix2pix = {"channels": [8, 8, 8], "discriminator_channels": 8, "discriminator_layers": 1}
    synthesis = {"ratio": 3, "num_inference_steps": 2, "batch_size": 4, "num_measured": 8}
    table1 = {"generator_dir": str(inputs / "pretrain/out"), "num_inference_steps": 2}
    table1 |= {"pix2pix_dir": str(inputs / "pix2pix/out"), "batch_size": 4, "num_images": 8}

    def with_segmenter(folder: Path) -> None:
        shutil.copytree(inputs / "segmentation/out", folder / "out")

    return {
        "prepare": Stage(
            FINETUNE,
            ("prepare",),
            {**SMALL, "dataset_dir": "phantoms", "phantoms": PHANTOMS, "store_dir": out,
             "edges": "gradient", "num_folds": 2},
        ),
        "edges": Stage(
            PRETRAIN,
            ("prepare",),
            {**SMALL, "phantoms": {"num_images": 80}, "store_dir": out, "edges": "gradient",
             "validation_fraction": 0.1},
        ),
        "autoencoder": Stage(
            PRETRAIN,
            ("train_autoencoder",),
            {**trained, "store_dir": tree, "backbone": backbone, "amp": False, "epochs": 1},
        ),
        "pretrain": Stage(
            PRETRAIN,
            ("train",),
            {**diffusion, "store_dir": tree, "train_base": True, "epochs": 1},
        ),
        "pix2pix": Stage(
            PRETRAIN, ("train_pix2pix",), {**trained, **pix2pix, "store_dir": tree, "epochs": 2}
        ),
        "table1": Stage(
            PRETRAIN,
            ("evaluate",),
            {**SMALL, **table1, "store_dir": tree, "backbone": backbone, "output_dir": out},
        ),
        "finetune": Stage(FINETUNE, ("train",), {**diffusion, "store_dir": store, "num_copies": 2}),
        "synthesis": Stage(
            SYNTHESIS,
            ("inference",),
            {**SMALL, **synthesis, "store_dir": store, "generator_dir": generator,
             "backbone": backbone, "output_dir": out},
        ),
        "segmentation": Stage(
            SEGMENTATION,
            ("train",),
            {**segmenter, **STEPS, "epochs": 4, "arm": "diffboost", "synthetic_dir": variants},
        ),
        "evaluation": Stage(
            SEGMENTATION, ("train", "evaluate"), segmenter | {"batch_size": 4}, with_segmenter
        ),
    }  # fmt: skip


WORKERS = {"evaluation": None}  # whose loader has no knob


def start(stage: Stage, log: Path, num_workers: int | None = 0) -> int:
    """Forks a process group that runs a stage; gives its id."""
    sys.stdout.flush(), sys.stderr.flush()
    pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        os.setpgid(0, 0)
        with log.open("a") as file:
            os.dup2(file.fileno(), 1), os.dup2(file.fileno(), 2)
        files = [str(stage.bundle / "configs" / f"{name}.yaml") for name in stage.configs]
        knobs = stage.knobs | ({} if num_workers is None else {"num_workers": num_workers})
        monai.bundle.run(
            config_file=files[0] if len(files) == 1 else files,
            bundle_root=str(stage.bundle),
            **knobs,
        )
        code = 0
    except SystemExit as error:
        code = error.code if isinstance(error.code, int) else 1
    except BaseException as error:
        logging.getLogger().exception("%s", error)
    finally:
        sys.stdout.flush(), sys.stderr.flush()
        os._exit(code)


def wait(pid: int, kill_after: float = LIMIT_SECONDS, watched: Path | None = None) -> int | None:
    """Waits for a process; its exit code, or None if it was killed.

    Args:
        pid: of :func:`start`.
        kill_after: seconds.
        watched: kill as soon as something below this folder is being written after ``kill_after``.
    """
    begun = time.monotonic()
    while True:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        passed = time.monotonic() - begun
        if passed > kill_after and (watched is None or _writes(watched)) or passed > LIMIT_SECONDS:
            os.killpg(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
            return None
        time.sleep(0.001)


def _writes(folder: Path) -> bool:
    """Whether a file or a checkpoint below a folder is half written now."""
    for parent, folders, files in os.walk(folder):
        checkpoints = folders if parent.endswith("checkpoints") else []
        if any(name.endswith(".partial") for name in (*files, *checkpoints)):
            return True
    return False


def hashes(folder: Path) -> dict[str, str]:
    """Hash of every file of a trial; what a run leaves beside its output counts too."""
    return {
        path.relative_to(folder).as_posix(): sha256_of_files([path])
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name not in NOT_COMPARED
    }


def fresh(trial: Path, stage: Stage) -> None:
    """Empties the folder of a trial."""
    for path in trial.iterdir():
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    if stage.before is not None:
        stage.before(trial)


def differences(found: dict[str, str], expected: dict[str, str]) -> list[str]:
    """Names of files that differ, are missing or too many."""
    return sorted(
        name for name in found.keys() | expected.keys() if found.get(name) != expected.get(name)
    )


class Trials:
    """Undisturbed runs, kills and small disks, in one scratch folder."""

    def __init__(self, scratch: Path, names: list[str], seed: int) -> None:
        self.inputs, self.trial = scratch / "inputs", scratch / "trial"
        self.log = scratch / "log.txt"
        self.inputs.mkdir(), self.trial.mkdir()
        self.stages = stages(self.inputs, self.trial)
        self.names = names or list(self.stages)
        self.random = random.Random(seed)
        self.expected: dict[str, dict[str, str]] = {}
        self.seconds: dict[str, float] = {}

    def run_undisturbed(self) -> None:
        """Runs every stage once; its output is the input of the next."""
        for name, stage in self.stages.items():
            fresh(self.trial, stage)
            begun = time.monotonic()
            if wait(start(stage, self.log, WORKERS.get(name, 0))) != 0:
                raise RuntimeError(f"{name}: the undisturbed run failed\n{self.tail()}")
            self.seconds[name] = time.monotonic() - begun
            self.expected[name] = hashes(self.trial)
            shutil.copytree(self.trial, self.inputs / name)
            logger.info(
                "%s: %d files in %.1f s", name, len(self.expected[name]), self.seconds[name]
            )

    def tail(self) -> str:
        """The last lines of what the stages wrote."""
        return "\n".join(self.log.read_text(errors="replace").splitlines()[-15:])

    def kill(self, number: int) -> dict:
        """One kill and the run after it."""
        name = self.names[number % len(self.names)]
        stage, turn = self.stages[name], number // len(self.names)
        num_workers = WORKERS.get(name, turn % 3)
        in_writing = turn % 3 == 1
        moment = self.random.uniform(0, 0.95)
        for _ in range(20):
            fresh(self.trial, stage)
            pid = start(stage, self.log, num_workers)
            if wait(pid, moment * self.seconds[name], self.trial if in_writing else None) is None:
                break
            moment /= 1.5  # it ended before
        else:
            raise RuntimeError(f"{name}: always ended before it was killed")
        kept = sum(path.is_file() for path in self.trial.rglob("*"))
        code = wait(start(stage, self.log, num_workers))
        different = differences(hashes(self.trial), self.expected[name])
        passed = code == 0 and not different
        if not passed:
            logger.warning("%s, kill %d: exit %s, %s differ", name, number, code, different[:5])
            logger.warning("%s", self.tail())
        return {
            "stage": name, "passed": passed, "in_writing": in_writing,
            "num_workers": num_workers, "files_at_kill": kept,
        }  # fmt: skip

    def fill_disk(self, name: str, share: float) -> dict:
        """A run on a tmpfs of a share of what it needs, and another one with room."""
        stage, disk = self.stages[name], self.trial
        fresh(disk, stage)
        size = sum(path.stat().st_size for path in (self.inputs / name).rglob("*"))
        mounted = subprocess.run(
            ["mount", "-t", "tmpfs", "-o", f"size={max(65536, int(share * size))}", "tmpfs", disk],
            check=False,
            capture_output=True,
        )
        if mounted.returncode:
            return {"stage": name, "tried": False, "why": mounted.stderr.decode().strip()}
        try:
            if stage.before is not None:
                subprocess.run(["mount", "-o", "remount,size=1g", disk], check=True)
                stage.before(disk)
                room = shutil.disk_usage(disk).used + int(share * 16384)
                subprocess.run(["mount", "-o", f"remount,size={room}", disk], check=True)
            mark = len(self.log.read_text(errors="replace"))
            refused = wait(start(stage, self.log, 0 if name not in WORKERS else None))
            told = "No space left on device" in self.log.read_text(errors="replace")[mark:]
            subprocess.run(["mount", "-o", "remount,size=1g", disk], check=True)
            code = wait(start(stage, self.log, 0 if name not in WORKERS else None))
            different = differences(hashes(disk), self.expected[name])
        finally:
            subprocess.run(["umount", disk], check=True)
        passed = refused not in (0, None) and told and code == 0 and not different
        if not passed:
            logger.warning(
                "%s, full disk: exit %s, told %s, then %s, %s differ",
                name, refused, told, code, different[:5],
            )  # fmt: skip
        return {"stage": name, "tried": True, "passed": passed}


def main() -> None:
    """Runs all trials, prints JSON."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--kills", type=int, default=60)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--stages", nargs="*", default=[], help="only these; all if left out")
    parser.add_argument("--scratch", type=Path, help="for a folder that is removed at the end")
    options = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    torch.set_num_threads(1)
    begun = time.monotonic()
    scratch = Path(tempfile.mkdtemp(dir=options.scratch, prefix="kill_resume_"))
    try:
        trials = Trials(scratch, options.stages, options.seed)
        create_backbone(str(trials.inputs / "backbone"), **BACKBONE)
        trials.run_undisturbed()
        results = []
        for number in range(options.kills):
            results.append(trials.kill(number))
            logger.info("kill %d of %d: %s", number + 1, options.kills, results[-1])
        disks = [trials.fill_disk(name, share) for name in trials.names for share in (0.3, 0.7)]
    finally:
        shutil.rmtree(scratch)
    of, passed = (Counter(r["stage"] for r in part) for part in
                  (results, [r for r in results if r["passed"]]))  # fmt: skip
    tried = [disk for disk in disks if disk["tried"]]
    result = {
        "name": "kill_resume",
        "passed": sum(passed.values()),
        "of": sum(of.values()),
        "by_stage": {name: f"{passed[name]} of {of[name]}" for name in of},
        "while_writing": sum(r["in_writing"] for r in results),
        "by_workers": dict(Counter(str(r["num_workers"]) for r in results)),
        "full_disk": {
            "passed": sum(disk["passed"] for disk in tried), "of": len(tried),
            "not_tried": sorted({disk["why"] for disk in disks if not disk["tried"]}),
        },
        "seconds_undisturbed": {name: round(s, 1) for name, s in trials.seconds.items()},
        "seconds": round(time.monotonic() - begun),
    }  # fmt: skip
    sys.stdout.write(json.dumps(result) + "\n")


if __name__ == "__main__":
    main()
