"""Bundle runs in two processes, all in one start of torchrun: its imports cost more than they."""

import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

from monai.bundle import run

BUNDLES = Path(__file__).parents[1] / "bundles"


def bundle_settings(bundle: str, configs: list[str], knobs: dict) -> dict:
    """Arguments of `monai.bundle.run` for a bundle, its config and overlays, and knobs."""
    root = BUNDLES / bundle
    files = [str(root / "configs" / f"{name}.yaml") for name in configs]
    return {"config_file": files, "bundle_root": str(root)} | knobs


def torchrun(arguments: list[str], timeout: float = 300) -> str:
    """Two processes on one thread each; returns what they wrote, and raises where they fail.

    A deadlock is how such a run fails. torchrun starts its processes in sessions of their own, so
    that only torchrun itself, asked by SIGTERM, ends them.
    """
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "--standalone"]
    agent = subprocess.Popen(
        [*command, *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    try:
        output, _ = agent.communicate(timeout=timeout)
    except BaseException:
        agent.send_signal(signal.SIGTERM)
        agent.communicate()
        raise
    assert agent.returncode == 0, output[-8000:]
    return output


def run_in_two_processes(runs: list[dict], folder: Path) -> None:
    """Bundle runs (see `bundle_settings`), one after the other, each with a port of its own.

    torchrun's own meeting point would still hold the addresses of the run before.
    """
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in runs]
    ports = [server.getsockname()[1] for server in sockets]
    for server in sockets:
        server.close()
    listed = folder / "runs.json"
    listed.write_text(json.dumps(list(zip(ports, runs, strict=True))))
    torchrun([__file__, str(listed)])


if __name__ == "__main__":
    os.environ["TORCHELASTIC_USE_AGENT_STORE"] = "False"
    for port, settings in json.loads(Path(sys.argv[1]).read_text()):
        os.environ["MASTER_PORT"] = str(port)
        run(**settings)
