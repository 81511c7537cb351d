"""What MONAI's tracking leaves out: a run's name, its executed config, its results as artifacts.

MONAI's ``--tracking mlflow`` logs losses and metrics of the engines. It drops the executed config
without a word where ``output_dir`` is a plain path, keeps none of an evaluation, whose run it never
ends, and cannot read the loss of a trainer that does not decollate. docs/tracking.md shows the use.
"""

import logging
import os
import re
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from ignite.engine import Engine, Events

from diffboost.processes import is_main_process

EXECUTED_CONFIG = re.compile(r"config_\d{8}_\d{6}\.json")
FINISHED = "FINISHED"

logger = logging.getLogger(__name__)


def name_run(output_dir: str) -> str:
    """A name that no other run has: the output folder's, the time, the process.

    Args:
        output_dir: of the run.

    Source: engineering choice (MONAI adds what it logs to the newest run where none is named).
    """
    folder = Path(output_dir).absolute().name
    return f"{folder}_{time.strftime('%Y%m%d_%H%M%S')}_{os.getpid()}"


def loss_of(output: Mapping | Sequence[Mapping]) -> torch.Tensor:
    """The loss of a trainer's output, decollated or not; ``output_transform`` of MONAI's handlers.

    Args:
        output: a dictionary with ``loss``, or a list of them with the same loss.

    Source: engineering choice.
    """
    return (output if isinstance(output, Mapping) else output[0])["loss"]


class ListedOutput:
    """Makes a trainer's output a list of one, of which MONAI's tracking can log the loss.

    It stands behind the handlers that read the output and before the tracking's own.

    Source: engineering choice (monai.bundle.utils.DEFAULT_MLFLOW_SETTINGS, monai 1.6.1).
    """

    def attach(self, engine: Engine) -> None:
        """Listens to the trainer."""
        engine.add_event_handler(Events.ITERATION_COMPLETED, self._list)

    def _list(self, engine: Engine) -> None:
        if not isinstance(engine.state.output, list):
            engine.state.output = [engine.state.output]


def log_results(
    output_dir: str,
    files: Sequence[str],
    executed_config: str | bool | None,
    tracking_uri: str,
    experiment_name: str,
    run_name: str,
) -> None:
    """Stores the executed config and the results of a run in MLflow; ends the run there.

    Last in a config's run list. Does nothing in a run without ``--tracking mlflow``.

    Args:
        output_dir: of the run.
        files: names of the results in it; those that are not there are left out.
        executed_config: MONAI's ``save_execute_config``, which tracking makes a path; a boolean
            says that nothing is tracked.
        tracking_uri: of MLflow; the variable MLFLOW_TRACKING_URI goes before it, as in MONAI.
        experiment_name, run_name: of the run.

    Source: engineering choice.
    """
    if isinstance(executed_config, bool) or not is_main_process():
        return
    folder = Path(output_dir)
    paths = [folder / name for name in files]
    if executed_config is not None:
        found = EXECUTED_CONFIG.search(executed_config)
        paths.append(folder / found[0] if found else Path(executed_config))
    store_files([path for path in paths if path.is_file()], tracking_uri, experiment_name, run_name)


def store_files(
    paths: Sequence[Path], tracking_uri: str, experiment_name: str, run_name: str
) -> None:
    """Stores files as artifacts of a run of MLflow, which is made if it is not there, and ended.

    Args:
        paths: files.
        tracking_uri, experiment_name, run_name: see :func:`log_results`.

    Raises:
        ModuleNotFoundError: mlflow is not installed.

    Source: engineering choice; artifacts of a local database lie beside it, as in MONAI.
    """
    from mlflow import MlflowClient  # an extra, and takes seconds

    environment = os.environ.get("MLFLOW_TRACKING_URI")
    client = MlflowClient(tracking_uri=None if environment else tracking_uri)
    uri = environment or tracking_uri
    experiment = client.get_experiment_by_name(experiment_name)
    if experiment is None:
        local = uri.startswith("sqlite:///")
        place = (Path(uri.removeprefix("sqlite:///")).parent / "mlruns").as_uri() if local else None
        number = client.create_experiment(experiment_name, artifact_location=place)
    else:
        number = experiment.experiment_id
    runs = client.search_runs([number], f"attributes.run_name = '{run_name}'")
    run = runs[0] if runs else client.create_run(number, run_name=run_name)
    for path in paths:
        client.log_artifact(run.info.run_id, str(path))
    client.set_terminated(run.info.run_id, FINISHED)
    logger.info("%s: %d files of run %s", uri, len(paths), run_name)


def store_report(run_dir: str | Path) -> None:
    """Stores a study's page, figures and experiment in MLflow, in ``mlruns.db`` in its folder.

    Args:
        run_dir: the folder of the study, with its report.

    Source: engineering choice.
    """
    folder = Path(run_dir).absolute()
    names = ("report/index.html", "metrics.csv", "summary.json", "experiment.yaml")
    paths = [folder / name for name in names if (folder / name).is_file()]
    database = f"sqlite:///{folder / 'mlruns.db'}"
    store_files(paths, database, "diffboost_study", name_run(str(folder)))
