"""The command `diffboost`: studies, reports, costs, audits of stores, releases, DICOM."""

import fcntl
import json
import logging
import os
import shlex
import subprocess
import sys
import time
from contextlib import nullcontext
from pathlib import Path
from typing import TextIO

import fire

from diffboost.audit.commands import AUDITS
from diffboost.command_line import check_arguments, split_command
from diffboost.dicom.commands import DICOM
from diffboost.experiments import read_experiment, study_task
from diffboost.knobs import refuse_unknown
from diffboost.stages import WORKFLOW, failures, warm_programs, why_cold
from diffboost.study_data import missing_data, settle_dataset
from diffboost.targets import check_target

logger = logging.getLogger(__name__)

SNAKEFILE = WORKFLOW / "Snakefile"


def study(
    experiment: str,
    cores: int = 2,
    dataset_dir: str | None = None,
    dry_run: bool = False,
    runs_dir: str | None = None,
    snakemake: str = "",
    target: str = "report",
    warm: bool = True,
) -> None:
    """Runs an experiment file to runs/<name>/report/index.html; what is done is not done again.

    Args:
        experiment: the experiment file; README.md lists its keys.
        cores: how many processor cores to use.
        dataset_dir: used instead of the file's own.
        dry_run: only say what would run.
        runs_dir: folder of all runs, instead of runs/ beside workflow/.
        snakemake: more options for Snakemake in one string, joined to the flag by an equals sign:
            --snakemake="--executor slurm --jobs 50".
        target: what to make: report (all that the file orders), table1, table2, figure4, figure6
            or figure7.
        warm: stages share a process that has done their imports; not with several processes a
            stage, nor where Snakemake's options name an executor or a profile. The results are
            the same.
    """
    path = Path(experiment).absolute()
    try:
        ordered = read_experiment(path)
        task = study_task(ordered, path)
        check_target(ordered, target)
        _check_backbone(ordered.backbone)
    except (OSError, ValueError) as error:
        raise SystemExit(str(error)) from None
    run_dir = Path(runs_dir or SNAKEFILE.parents[1] / "runs").absolute() / ordered.name
    missing = missing_data(ordered, task, run_dir, target, dataset_dir)
    if missing and not dry_run:
        raise SystemExit(missing)
    if missing:
        logger.warning("%s", missing)
    run_dir.mkdir(parents=True, exist_ok=True)
    options = shlex.split(snakemake)
    command = [sys.executable, "-m", "snakemake", target, "--snakefile", str(SNAKEFILE)]
    command += ["--directory", str(run_dir), "--cores", str(cores), "--rerun-incomplete"]
    command += ["--show-failed-logs", "--nolock", "--quiet", "host", "reason"]
    command += ["--dry-run"] * dry_run + options
    with (run_dir / ".lock").open("w") as lock:
        _hold(lock, run_dir)
        try:
            dataset = settle_dataset(run_dir, str(dataset_dir or ordered.dataset_dir), dry_run)
        except ValueError as error:
            raise SystemExit(str(error)) from None
        places = {"experiment": path, "started_in": Path.cwd(), "dataset_dir": dataset}
        # as JSON texts, for Snakemake reads them as YAML
        command += ["--config", *(f"{key}={json.dumps(str(p))}" for key, p in places.items())]
        started = time.time()
        code = _run(command, warm and not dry_run, why_cold(options))
    if code:
        for failure in failures(run_dir, started):
            logger.error("%s", failure)
        raise SystemExit(code)
    page = run_dir / "report" / "index.html"
    if not dry_run and target == "report" and page.is_file() and not options:
        logger.info("report: %s", page)


def report(run_dir: str, only: str | None = None, tracking: str | None = None) -> None:
    """Writes metrics.csv, summary.json and report/index.html into a study's folder.

    Args:
        run_dir: the folder, such as runs/demo.
        only: write only this one, of what has been run: table2, figure4, figure6, figure7.
        tracking: mlflow: store the three files in mlruns.db in the folder, too.
    """
    # pandas, matplotlib and torch take seconds
    from diffboost.exhibits import EXHIBITS
    from diffboost.report import write_report
    from diffboost.results import read_experiment_as_run

    if tracking not in (None, "mlflow") or (tracking and only):
        raise SystemExit(f"tracking: {tracking!r}; allowed: mlflow, for the whole report")
    try:
        if only is not None:
            refuse_unknown({only: "only"}, EXHIBITS, "report")
            check_target(read_experiment_as_run(Path(run_dir)), only)
            EXHIBITS[only](Path(run_dir))
            return
        write_report(run_dir)
    except (OSError, ValueError) as error:
        raise SystemExit(str(error)) from None
    if tracking:
        from diffboost.tracking import store_report

        store_report(run_dir)


def cost(
    experiment: str,
    device: str = "cpu",
    dataset_dir: str | None = None,
    num_slices: int | None = None,
    num_pretraining: int | None = None,
    json: str | bool | None = None,
    runs_dir: str | None = None,
) -> None:
    """Shows what a study will cost, before anything runs: FLOPs, memory, images, disk and hours.

    Counts passes of the real networks on the meta device: no weights, no network, no GPU needed.
    The number of slices is taken from the study's store, else from the headers of the scans.

    Args:
        experiment: the experiment file.
        device: what the hours are for: cpu (this machine, measured for two seconds), a6000, a100
            or h100.
        dataset_dir: used instead of the file's own.
        num_slices: where the data is not here: count with so many cases of one slice each.
        num_pretraining: the same for images of the pretraining tree.
        json: a file for the plan as JSON; without a value, or as "-", it is printed instead.
        runs_dir: folder of all runs, where the study's store may lie, as for `study`.
    """
    from diffboost.cost.command import show_cost  # imports diffusers, which takes seconds

    sizes = {"dataset_dir": dataset_dir, "num_slices": num_slices, "runs_dir": runs_dir}
    sizes["num_pretraining"] = num_pretraining
    try:
        target = "-" if json is True else json or None
        sys.stdout.write(show_cost(experiment, device, target, **sizes))
    except (OSError, ValueError) as error:
        raise SystemExit(str(error)) from None


def package(
    bundle: str | None = None,
    all: bool = False,
    run: str | None = None,
    license: str | None = None,
    output_dir: str = "dist",
    url: str | None = None,
) -> None:
    """Writes a bundle's release, dist/<name>-<version>/ and its zip, which run where nothing is
    installed but the packages that its metadata.json names.

    Args:
        bundle: folder of the bundle, such as bundles/diffboost_segmentation.
        all: all bundles of this checkout, without a run.
        run: folder of a model that was trained, or of a study that holds one such: the release
            gets its weights, label names, sizes, figures and lineage.
        license: with --run: a text file with the terms of its data and weights.
        output_dir: folder of the releases.
        url: https address of the folder that files over 25 MB will lie in.
    """
    from diffboost.package import package as write_release  # imports torch, MONAI and diffusers

    if all == (bundle is not None) or (all and run):
        raise SystemExit("package: name one bundle's folder, or say --all (without --run)")
    folders = sorted((WORKFLOW.parent / "bundles").iterdir()) if all else [bundle]
    try:
        for folder in folders:
            write_release(str(folder), output_dir, run, license, url)
    except (OSError, ValueError) as error:
        raise SystemExit(str(error)) from None


def verify(release: str, trust: bool = False) -> None:
    """Checks a release, folder or zip: hashes, metadata, twins, weights, and that all is there.

    Args:
        release: the folder, or the zip, of which no entry may lead elsewhere.
        trust: also build its network and load the weights, which evaluates the release's config.
    """
    from diffboost.package import verify as check  # imports torch, MONAI and diffusers

    try:
        manifest = check(release, trust)
    except (OSError, ValueError) as error:
        raise SystemExit(str(error)) from None
    logger.info("%s %s: whole and unchanged", manifest["name"], manifest["version"])


def _run(command: list[str], warm: bool, cold: str | None) -> int:
    """Runs Snakemake, its stages in a warm process if that is wanted and can be; the exit code."""
    # The stages are found by the name `python`: it must be this one, also outside an active venv.
    programs = [str(Path(sys.executable).parent), os.environ["PATH"]]
    if warm and cold:
        logger.info("stages start cold: %s", cold)
    with warm_programs() if warm and not cold else nullcontext() as folder:
        programs[:0] = [str(folder)] if folder else []
        environment = os.environ | {"PATH": os.pathsep.join(programs)}
        return subprocess.run(command, check=False, env=environment).returncode


def _check_backbone(backbone: str) -> None:
    """Raises where a backbone is none, which otherwise only the second stage would say."""
    if backbone != "tiny":
        from diffboost.generation.backbones import has_part  # imports diffusers: takes seconds

        if not has_part(backbone, "unet"):
            raise ValueError(f"backbone: {backbone} has no folder unet; the layout is diffusers'")


def _hold(lock: TextIO, run_dir: Path) -> None:
    """Exits if another process runs this study; the lock goes with the process, however it ends."""
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise SystemExit(f"{run_dir}: another process is running this study") from None


COMMANDS = {"study": study, "report": report, "cost": cost, "audit": AUDITS, "dicom": DICOM}
COMMANDS |= {"package": package, "verify": verify}
HELP = {"--help", "-h"}


def main() -> None:
    """Entry of the console script `diffboost`."""
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    try:
        arguments = check_arguments(sys.argv[1:], COMMANDS)
    except ValueError as error:
        raise SystemExit(str(error)) from None
    if HELP.intersection(arguments):  # fire would run `study FILE` first, and explain its result
        arguments = [*split_command(arguments, COMMANDS)[0], "--help"]
    fire.Fire(COMMANDS, command=arguments, name="diffboost")


if __name__ == "__main__":
    main()
