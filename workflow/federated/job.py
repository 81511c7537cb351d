"""Federated averaging of a bundle with NVFlare: a simulation on this machine, or a job to submit.

python workflow/federated/job.py job.yaml              # simulates the sites in sites_dir
python workflow/federated/job.py job.yaml --export --export-dir jobs   # writes the job for a server

job.yaml holds bundle_root, sites_dir, workspace, num_rounds, local_epochs and knobs; see
docs/federated.md. The global weights end as <workspace>/model.pt.
"""

import argparse
import json
from pathlib import Path

from nvflare.app_opt.pt.recipes.fedavg import FedAvgRecipe
from nvflare.recipe import SimEnv

from diffboost.data.documents import read_config
from diffboost.federated import build_network, describe_network, save_global_weights
from diffboost.handlers import save_weights
from diffboost.knobs import refuse_unknown

KEYS = ("bundle_root", "sites_dir", "workspace", "num_rounds", "local_epochs", "knobs")
NAME = "diffboost"
GLOBAL_WEIGHTS = f"{NAME}/server/simulate_job/app_server/FL_global_model.pt"


def read_job(path: str) -> dict:
    """The job file; ValueError names an unknown or missing key, or a knob that cannot travel."""
    job = read_config(path, "job")
    refuse_unknown(job, KEYS, path)
    missing = [key for key in KEYS if key not in job]
    if missing:
        raise ValueError(f"{path} lacks {', '.join(missing)}")
    if any(blank in _as_argument(job["knobs"]) for blank in " \t\n"):
        raise ValueError(f"{path}: knobs: a value has a blank, at which NVFlare cuts arguments")
    return job


def _as_argument(knobs: dict) -> str:
    return json.dumps(knobs, separators=(",", ":"))


def make_recipe(job: dict, names: list[str]) -> FedAvgRecipe:
    """Federated averaging that begins with the weights a single training would begin with."""
    network = describe_network(job["bundle_root"], job["knobs"])
    initial = Path(job["workspace"]).absolute() / "initial.pt"
    save_weights(build_network(job["bundle_root"], job["knobs"]), initial)
    words = ["--sites_dir", str(Path(job["sites_dir"]).absolute())]
    words += ["--num_rounds", str(job["num_rounds"]), "--local_epochs", str(job["local_epochs"])]
    words += ["--knobs", _as_argument(job["knobs"])]
    return FedAvgRecipe(
        name=NAME,
        model={"class_path": network.class_path, "args": network.args},
        initial_ckpt=str(initial),
        min_clients=len(names),
        num_rounds=job["num_rounds"],
        train_script=str(Path(__file__).with_name("client.py")),
        train_args=" ".join(words),
        key_metric=network.key_metric,
        key_metric_mode=network.key_metric_mode,
    )


def main() -> None:
    """Simulates, or exports, the job."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("job", help="job.yaml, see docs/federated.md")
    # NVFlare reads these two itself, when it is imported
    parser.add_argument("--export", action="store_true", help="write the job, do not simulate")
    parser.add_argument("--export-dir", default="fl_job", help="folder that gets the job")
    job = read_job(parser.parse_args().job)
    names = sorted(path.stem for path in Path(job["sites_dir"]).glob("*.yaml"))
    recipe = make_recipe(job, names)
    run = recipe.execute(SimEnv(clients=names, workspace_root=str(job["workspace"])))
    checkpoint = Path(job["workspace"]) / GLOBAL_WEIGHTS
    if run is None or not checkpoint.is_file():  # exported
        return
    path = Path(job["workspace"]) / "model.pt"
    save_global_weights(checkpoint, job["bundle_root"], job["knobs"], path)


if __name__ == "__main__":
    main()
