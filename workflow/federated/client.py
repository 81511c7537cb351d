"""A site of workflow/federated/job.py; NVFlare runs it at every site.

Reads <sites_dir>/<name of the site>.yaml, which holds what is this site's own.
"""

import argparse
import json
from pathlib import Path

import nvflare.client as flare
from nvflare.app_common.abstract.fl_model import MetaKey, ParamsType

from diffboost.federated import build_client, play_round, read_site, record_round


def main() -> None:
    """Plays rounds until the server ends the job."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--sites_dir", required=True)
    parser.add_argument("--num_rounds", type=int, required=True)
    parser.add_argument("--local_epochs", type=int, required=True)
    parser.add_argument("--knobs", type=json.loads, required=True)
    arguments = parser.parse_args()
    flare.init()
    name = flare.get_site_name()
    site = read_site(Path(arguments.sites_dir) / f"{name}.yaml")
    client = build_client(site, arguments.knobs, arguments.num_rounds, arguments.local_epochs, name)
    while flare.is_running():
        received = flare.receive()
        if received is None:
            break
        played = play_round(client, received.params)
        record_round(site["output_dir"], received.current_round, played.metrics)
        sent = flare.FLModel(
            params=played.difference,
            params_type=ParamsType.DIFF,
            metrics=played.metrics,
            meta={MetaKey.NUM_STEPS_CURRENT_ROUND: played.num_steps},
        )
        flare.send(sent)
    client.finalize()


if __name__ == "__main__":
    main()
