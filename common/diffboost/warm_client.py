"""Runs a command of a study in the study's warm process: a script of the standard library alone.

`diffboost study` puts a folder with a `python` and a `diffboost` first on the PATH of its stages;
both are this script. What a warm process does not run, or cannot, runs as it would without: the
script replaces itself with the program of that name that the rest of the PATH has.
"""

import array
import contextlib
import fcntl
import hashlib
import json
import os
import select
import signal
import socket
import sys
from pathlib import Path

LARGEST_MESSAGE = 1 << 22  # bytes; an environment has some thousands
FORWARDED = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)
# What a shell sets anew for every command, and no library reads when it is imported.
SHELLS_OWN = ("PWD", "OLDPWD", "SHLVL", "_")
WARM = {"python": ["-m", "monai.bundle"], "diffboost": []}  # how a command that is run warm begins
# The last line of a warm stage's log. Snakemake measures what is below its own shell: the client.
USAGE = "warm process: {seconds:.1f} s, {cpu_seconds:.1f} s of CPU, {peak_mib:.0f} MiB at most"
# Devices are then counted without a use of CUDA, which no fork could take up.
COUNT_DEVICES = {"PYTORCH_NVML_BASED_CUDA_CHECK": "1"}
MOST_PROCESSES = 4  # of a study: a stage's threads are a part of its environment
LISTENER = 3  # the number under which a new warm process finds its socket


def send(connection: socket.socket, message: dict, descriptors: tuple[int, ...] = ()) -> None:
    """Sends JSON, its length before it, with open files.

    Source: engineering choice
    """
    content = json.dumps(message).encode()
    numbers = array.array("i", descriptors)
    control = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, numbers)] if descriptors else []
    connection.sendmsg([len(content).to_bytes(4, "big")], control)
    connection.sendall(content)


def receive(connection: socket.socket) -> tuple[dict, list[int]]:
    """What `send` sent: the message and its open files.

    Raises:
        EOFError: the other side closed the connection.
        ValueError: no such message came.

    Source: engineering choice
    """
    size = array.array("i").itemsize
    head, controls, _, _ = connection.recvmsg(4, socket.CMSG_SPACE(3 * size))
    descriptors = array.array("i")
    for level, kind, data in controls:
        if (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS):
            descriptors.frombytes(data[: len(data) - len(data) % size])
    try:
        message = _read_json(connection, head + _read(connection, 4 - len(head)))
    except (EOFError, ValueError, OSError):
        for number in descriptors:
            os.close(number)
        raise
    return message, list(descriptors)


def _read_json(connection: socket.socket, head: bytes) -> dict:
    """The mapping of so many bytes as the head says."""
    length = int.from_bytes(head, "big")
    if length > LARGEST_MESSAGE:
        raise ValueError(f"a message claims {length} bytes; {LARGEST_MESSAGE} are allowed")
    message = json.loads(_read(connection, length))
    if not isinstance(message, dict):
        raise ValueError(f"a message is a {type(message).__name__}, no mapping")
    return message


def _read(connection: socket.socket, length: int) -> bytes:
    """So many bytes."""
    content = b""
    while len(content) < length:
        part = connection.recv(length - len(content))
        if not part:
            raise EOFError("the connection was closed")
        content += part
    return content


def environment_key() -> str:
    """Tells environments apart in which libraries, when imported, could find another value."""
    found = {name: value for name, value in os.environ.items() if name not in SHELLS_OWN}
    return hashlib.sha256(json.dumps(sorted(found.items())).encode()).hexdigest()[:16]


def connect(folder: Path) -> socket.socket:
    """A connection to the warm process of this environment, which is started where there is none.

    Raises:
        OSError: none can be reached or started.
    """
    path = str(folder / environment_key())
    connection = socket.socket(socket.AF_UNIX)
    with (folder / "starting").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # one client starts it, the others find it
        try:
            connection.connect(path)
        except (FileNotFoundError, ConnectionRefusedError):
            others = [each for each in folder.iterdir() if each.is_socket() and str(each) != path]
            if len(others) >= MOST_PROCESSES:
                raise OSError(f"the study has {MOST_PROCESSES}, of other environments") from None
            _start(folder, path)
            connection.connect(path)
    return connection


def _start(folder: Path, path: str) -> None:
    """Starts a warm process; its socket is there at once, it answers when all is imported."""
    Path(path).unlink(missing_ok=True)
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(path)
        listener.listen(64)
        log = os.O_WRONLY | os.O_CREAT | os.O_APPEND
        os.posix_spawnp(
            "python",
            ["python", "-m", "diffboost.warm_process", str(folder)],
            os.environ | COUNT_DEVICES,
            file_actions=[
                (os.POSIX_SPAWN_OPEN, 0, os.devnull, os.O_RDONLY, 0),
                (os.POSIX_SPAWN_OPEN, 1, f"{path}.log", log, 0o600),
                (os.POSIX_SPAWN_DUP2, 1, 2),
                (os.POSIX_SPAWN_DUP2, listener.fileno(), LISTENER),
            ],
            setsid=True,  # Ctrl-C in the study's terminal is for the stages
        )


def run_warm(folder: Path, words: list[str]) -> int:
    """Has the warm process run a command; returns how it ended, as `os.waitpid` says it.

    Signals that a client gets, the command gets; a client that is gone takes its command along.

    Raises:
        OSError, EOFError, ValueError: there is no warm process, or it ended before the command did.
    """
    with connect(folder) as connection:
        umask = os.umask(0)
        os.umask(umask)
        request = {"words": words, "cwd": str(Path.cwd()), "umask": umask}
        send(connection, request | {"environment": dict(os.environ)}, (0, 1, 2))
        started, descriptors = receive(connection)
        if not descriptors:
            raise ValueError(started.get("refused", "it did not start the command"))
        process = descriptors[0]
        _forward_signals(process)
        try:
            ended, _ = receive(connection)
        except (EOFError, OSError):
            _wait_for(process)  # it goes with its parent, and lets go of what it held
            raise
    sys.stderr.write(USAGE.format(**ended) + "\n")
    return ended["status"]


def _forward_signals(process: int) -> None:
    """Sends what this process is sent on to another, as long as that one lives."""

    def forward(number: int, _: object) -> None:
        with contextlib.suppress(ProcessLookupError):
            signal.pidfd_send_signal(process, number)

    for number in FORWARDED:
        signal.signal(number, forward)


def _wait_for(process: int) -> None:
    """Waits until a process that is no child of this one has ended."""
    ended = select.poll()
    ended.register(process, select.POLLIN)
    ended.poll()


def end_like(status: int) -> None:
    """Ends this process as another one ended: with its exit code, or by its signal."""
    if os.WIFSIGNALED(status):
        with contextlib.suppress(OSError):  # SIGKILL and SIGSTOP have no handler to set
            signal.signal(os.WTERMSIG(status), signal.SIG_DFL)
        os.kill(os.getpid(), os.WTERMSIG(status))
    raise SystemExit(os.waitstatus_to_exitcode(status))


def main() -> None:
    """Arguments: the folder of the warm processes, the program's name, and its own arguments."""
    folder, name, *words = sys.argv[1:]
    programs = [part for part in os.environ["PATH"].split(os.pathsep) if part != folder]
    os.environ["PATH"] = os.pathsep.join(programs)
    if words[: len(WARM[name])] == WARM[name]:
        try:
            status = run_warm(Path(folder), [name, *words])
        except (OSError, EOFError, ValueError) as error:
            sys.stderr.write(f"no warm process ({error or 'it is gone'}): {name} starts cold\n")
            sys.stderr.flush()
        else:
            end_like(status)
    os.execvp(name, [name, *words])


if __name__ == "__main__":
    main()
