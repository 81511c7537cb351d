"""The warm process of a study: the same files, exit codes and signals as without it; its end."""

import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import yaml
from monai.bundle import run
from small_store import write_store
from torchrun import bundle_settings

from diffboost import warm_process
from diffboost.files import sha256_of_files
from diffboost.results import read_costs
from diffboost.stages import why_cold
from diffboost.warm_client import receive, send

HOLD = """
import sys
from diffboost.stages import warm_programs
with warm_programs() as folder:
    print(folder, flush=True)
    sys.stdin.read()
"""
STUB = """#!/bin/sh
case "$2" in diffboost.warm_process) exec {python} "$@";; esac
echo "cold: $*"
"""
WAIT = {
    "imports": ["$import os", "$import time"],
    "run": ["$open(@pid, 'w').write(str(os.getpid()))", "$time.sleep(60)"],
    "pid": "pid",
}


@pytest.fixture(scope="module")
def programs(tmp_path_factory):
    """A PATH whose `python` is the warm one, before one that only says that it starts cold."""
    stub = tmp_path_factory.mktemp("bin") / "python"
    stub.write_text(STUB.format(python=sys.executable))
    stub.chmod(0o700)
    study = subprocess.Popen(
        [sys.executable, "-c", HOLD], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    folder = study.stdout.readline().strip()
    yield {"folder": Path(folder), "study": study, "path": f"{folder}:{stub.parent}:/usr/bin:/bin"}
    study.kill()
    study.communicate()


def start(programs: dict, folder: Path, config: dict | Path, **knobs) -> subprocess.Popen:
    """Starts a bundle run by the name `python`, in a folder."""
    if isinstance(config, dict):
        (folder / "config.yaml").write_text(yaml.safe_dump(config))
        config = folder / "config.yaml"
    words = ["python", "-m", "monai.bundle", "run", "--config_file", str(config)]
    words += [word for key, value in knobs.items() for word in (f"--{key}", str(value))]
    environment = os.environ | {"PATH": programs["path"], "OMP_NUM_THREADS": "1"}
    del environment["PYTEST_CURRENT_TEST"]  # another environment has another warm process
    return subprocess.Popen(
        ["env", "--default-signal=INT", *words],  # a suite in the background ignores it
        cwd=folder,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )


def pid_of(folder: Path) -> int:
    """The process of a run of WAIT, when it has begun."""
    for _ in range(600):
        if (folder / "pid").is_file() and (folder / "pid").read_text():
            return int((folder / "pid").read_text())
        time.sleep(0.05)
    raise TimeoutError(folder)


def ends(pid: int) -> bool:
    """Whether a process is gone within some seconds."""
    for _ in range(200):
        if not Path(f"/proc/{pid}").exists():
            return True
        time.sleep(0.05)
    return False


def test_a_warm_stage_writes_the_bytes_of_another(programs, tmp_path):
    knobs = {"store_dir": str(write_store(tmp_path / "store")), "image_size": 32, "num_classes": 3}
    knobs |= {"epochs": 1, "channels": [4, 8, 8], "arm": "nnunet", "device": "cpu"}
    settings = bundle_settings("diffboost_segmentation", ["train"], knobs)
    run(**settings | {"output_dir": str(tmp_path / "cold")})
    config = settings.pop("config_file")[0]
    stage = start(programs, tmp_path, Path(config), output_dir=tmp_path / "warm", **settings)
    output = stage.communicate()[0].decode()
    assert stage.returncode == 0, output
    assert output.splitlines()[-1].startswith("warm process: ")
    names = sorted(path.name for path in (tmp_path / "cold").iterdir())
    assert names == sorted(path.name for path in (tmp_path / "warm").iterdir())
    for name in set(names) - {"timing.csv"}:
        hashes = [sha256_of_files([tmp_path / kind / name]) for kind in ("cold", "warm")]
        assert hashes[0] == hashes[1], name


def test_exit_codes_and_messages_are_the_stages_own(programs, tmp_path):
    stage = start(programs, tmp_path, {"imports": ["$import sys"], "run": ["$sys.exit(7)"]})
    stage.communicate()
    assert stage.returncode == 7
    checked = {"epochs": 1, "run": [{"_target_": "diffboost.knobs.check_command_line"}]}
    stage = start(programs, tmp_path, checked, epoch=2)
    assert b"did you mean 'epochs'" in stage.communicate()[0]
    assert stage.returncode == 1
    others = subprocess.run(
        ["python", "-m", "torch.distributed.run"],
        env=os.environ | {"PATH": programs["path"]},
        capture_output=True,
        check=True,
    )
    assert others.stdout == b"cold: -m torch.distributed.run\n"


@pytest.mark.parametrize(
    ("number", "code"),
    [(signal.SIGTERM, -15), (signal.SIGINT, 1), (signal.SIGKILL, -9)],  # MONAI's own for SIGINT
)
def test_a_signal_to_the_client_reaches_the_stage(programs, tmp_path, number, code):
    stage = start(programs, tmp_path, WAIT)
    pid = pid_of(tmp_path)
    assert pid != stage.pid
    stage.send_signal(number)
    stage.communicate()
    assert stage.returncode == code
    assert ends(pid)


def test_what_is_no_request_is_refused_and_the_next_one_is_served(programs, tmp_path):
    # The first stage begins the warm process, whose socket is looked for.
    start(programs, tmp_path, {"run": ["$print('first')"]}).communicate()
    path = next(path for path in programs["folder"].iterdir() if path.is_socket())
    for garbage in (b"", b"\xff\xff\xff\xff", b"\0\0\0\4nope", b"\0\0\0\2[]"):
        with socket.socket(socket.AF_UNIX) as client:
            client.connect(str(path))
            client.sendall(garbage)
            client.shutdown(socket.SHUT_WR)
            assert "refused" in receive(client)[0]
    stage = start(programs, tmp_path, {"run": ["$print('served')"]})
    assert b"served" in stage.communicate()[0]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"words": ["sh", "-c", "true"]}, "words: .*'sh'.* are run"),
        ({"words": ["python", "-c", "1"]}, "words: .* are run"),
        ({"umask": "22"}, "umask: '22'; a int is needed"),
        ({"environment": {"A": 1}}, "texts are needed"),
    ],
)
def test_a_request_is_checked(change, message):
    request = {"words": ["python", "-m", "monai.bundle"], "cwd": "/", "umask": 0}
    with pytest.raises(ValueError, match=message):
        warm_process.check_request(request | {"environment": {}} | change, [0, 1, 2])


def test_another_user_is_refused(monkeypatch):
    sides = socket.socketpair()
    warm_process.refuse_other_user(sides[0])
    monkeypatch.setattr(os, "getuid", lambda: 12345)
    with pytest.raises(PermissionError, match="of user 12345"):
        warm_process.refuse_other_user(sides[0])
    warm_process.close_all(*sides)


@pytest.mark.parametrize("begun", [False, True])
def test_without_its_warm_process_a_stage_starts_cold(tmp_path, monkeypatch, begun):
    """One that is killed before, or while, a stage runs."""

    def serve() -> None:
        connection, _ = listener.accept()
        _, descriptors = receive(connection)
        if begun:
            send(connection, {}, (os.pidfd_open(sleeping.pid),))
            sleeping.kill()
            sleeping.wait()
        warm_process.close_all(connection, *descriptors)

    sleeping = subprocess.Popen(["sleep", "60"])
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(str(tmp_path / "socket"))
    listener.listen()
    server = threading.Thread(target=serve)
    server.start()
    (tmp_path / "python").write_text('#!/bin/sh\necho "cold: $*"\n')
    (tmp_path / "python").chmod(0o700)
    client = "import sys; from diffboost import warm_client as w; from pathlib import Path; "
    client += f"w.environment_key = lambda: 'socket'; sys.argv[1:1] = [{str(tmp_path / 'x')!r}, "
    client += "'python', '-m', 'monai.bundle', 'run']; w.main()"
    (tmp_path / "x").symlink_to(tmp_path)
    done = subprocess.run(
        [sys.executable, "-c", client],
        env=os.environ | {"PATH": f"{tmp_path}:/usr/bin:/bin"},
        capture_output=True,
        text=True,
        check=True,
    )
    server.join()
    sleeping.kill()
    sleeping.wait()
    listener.close()
    assert done.stdout == "cold: -m monai.bundle run\n"
    assert "no warm process" in done.stderr and "python starts cold" in done.stderr


def test_memory_of_a_warm_stage_is_read_from_its_log(tmp_path):
    for folder in ("benchmarks", "logs"):
        (tmp_path / folder).mkdir()
    written = {"name": "a", "task": "balls", "dataset_dir": "balls", "arms": ["baseline"]}
    (tmp_path / "experiment.yaml").write_text(yaml.safe_dump(written))
    for stage in ("prepare", "evaluate"):
        (tmp_path / "benchmarks" / f"{stage}.tsv").write_text("s\tmax_rss\n3.5\t12.0\n")
    (tmp_path / "logs" / "prepare.log").write_text(
        "words\nwarm process: 3.4 s, 3.0 s of CPU, 640 MiB at most\n"
    )
    assert read_costs(tmp_path)["memory_mib"].to_dict() == {"prepare": 640.0, "evaluate": 12.0}


def test_executors_and_profiles_keep_stages_cold(monkeypatch):
    assert why_cold(["--forceall", "--jobs", "2"]) is None
    for options in (["--executor", "slurm"], ["--profile=workflow/profiles/slurm"]):
        assert why_cold(options) == "Snakemake's options name an executor or a profile"
    monkeypatch.setattr(sys, "platform", "darwin")
    assert why_cold([]) == "a warm process needs Linux, not darwin"


def test_warm_processes_end_with_a_study_that_is_killed(programs, tmp_path):
    stage = start(programs, tmp_path, WAIT)
    pid = pid_of(tmp_path)
    assert oct(programs["folder"].stat().st_mode)[-3:] == "700"
    programs["study"].kill()
    programs["study"].wait()
    assert ends(pid)
    assert b"python starts cold\ncold: -m monai.bundle run" in stage.communicate()[0]
    for _ in range(100):
        if not programs["folder"].exists():
            break
        time.sleep(0.05)
    assert not programs["folder"].exists()
    shutil.rmtree(tmp_path)


def test_a_stage_that_was_killed_is_told_as_such():
    """No handler can be set for SIGKILL: the client ended in a traceback."""
    code = "from diffboost.warm_client import end_like; end_like(9)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, check=False)
    assert (done.returncode, done.stderr) == (-signal.SIGKILL, b"")
