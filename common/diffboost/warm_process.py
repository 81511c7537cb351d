"""The warm process of a study: has imported what the stages import, and forks one for each.

A stage is the same `monai.bundle` module with the same words, environment, folder and open files as
one that starts cold; only the imports are done. A warm process serves one environment: what a
library reads when it is imported (threads, devices, caches) is what the stage's own would be. It
stays single-threaded in Python, touches no CUDA, draws no random number, and ends with the study.

    python -m diffboost.warm_process FOLDER     (its socket is open under the number 3)
"""

import contextlib
import fcntl
import gc
import os
import pkgutil
import selectors
import shutil
import signal
import socket
import struct
import sys
import threading
import time
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path

import torch

import diffboost
from diffboost.warm_client import LISTENER, WARM, receive, send
from diffboost.warm_stage import become, die_with, run_stage, start_cold, take_over

PATIENCE = 5  # seconds that a client has for its request
LOOK_AGAIN = 0.5  # seconds between two looks whether the study still runs
LATER = ("monai.bundle",)  # what stages import besides the package


@dataclass
class Stage:
    """A running stage: its process, and the client that waits for it."""

    pid: int
    process: int  # a pidfd
    connection: socket.socket
    has_client: bool = True
    started: float = field(default_factory=time.monotonic)


def import_stages() -> None:
    """Imports every module of the package, and with them all that a stage would import."""
    for module in pkgutil.walk_packages(diffboost.__path__, "diffboost."):
        import_module(module.name)
    for name in LATER:
        import_module(name)
    gc.collect()
    gc.freeze()  # a stage's collections need not walk, and copy, what was imported


class WarmProcess:
    """Forks a stage for every request that comes in.

    Args:
        folder: of the study's warm processes; its file `study` is locked while the study runs.
        listener: the socket.

    Source: engineering choice (issue 6, "Start-up").
    """

    def __init__(self, folder: Path, listener: socket.socket) -> None:
        self.folder = folder
        self.listener = listener
        self.stages: list[Stage] = []
        self.selector = selectors.DefaultSelector()
        self.selector.register(listener, selectors.EVENT_READ)

    def serve(self) -> dict | None:
        """Serves until the study ends; in a forked process it returns what that has to run."""
        with (self.folder / "study").open() as lock:
            while not _is_free(lock):
                for key, _ in self.selector.select(LOOK_AGAIN):
                    if key.fileobj is self.listener:
                        request = self._accept()
                        if request is not None:
                            return request
                    elif key.fileobj == key.data.process:
                        self._report(key.data)
                    elif key.data.has_client:  # it is gone: its stage goes too
                        self._kill(key.data)
        for stage in self.stages:
            if stage.has_client:
                self._kill(stage)
        return None

    def _accept(self) -> dict | None:
        """Reads a request and forks; the request in the new process, None in this one."""
        connection, _ = self.listener.accept()
        descriptors = []
        try:
            connection.settimeout(PATIENCE)
            refuse_other_user(connection)
            request, descriptors = receive(connection)
            check_request(request, descriptors)
            if threading.active_count() > 1:
                raise ValueError("something that was imported started a thread")
        except (OSError, EOFError, ValueError) as error:
            self._refuse(connection, descriptors, error)
            return None
        return self._fork(connection, request, descriptors)

    def _refuse(self, connection: socket.socket, descriptors: list[int], error: Exception) -> None:
        """Tells the client why, if it still listens, and goes on."""
        sys.stderr.write(f"refused: {error}\n")
        sys.stderr.flush()
        try:
            send(connection, {"refused": str(error)})
        except OSError as lost:
            sys.stderr.write(f"its client is gone: {lost}\n")
        close_all(connection, *descriptors)

    def _fork(
        self, connection: socket.socket, request: dict, descriptors: list[int]
    ) -> dict | None:
        """A new process that becomes the stage, watched by this one."""
        sys.stdout.flush()
        sys.stderr.flush()
        parent = os.getpid()
        pid = os.fork()
        if pid == 0:
            die_with(parent)
            take_over(descriptors)
            self.selector.close()
            close_all(self.listener, connection)
            for stage in self.stages:
                close_all(stage.connection, stage.process)
            return request
        close_all(*descriptors)
        stage = Stage(pid, os.pidfd_open(pid), connection)
        self.stages.append(stage)
        self.selector.register(stage.process, selectors.EVENT_READ, stage)
        self.selector.register(connection, selectors.EVENT_READ, stage)
        try:
            send(connection, {}, (stage.process,))
        except OSError:  # the client is gone
            self._kill(stage)
        return None

    def _report(self, stage: Stage) -> None:
        """Tells a client how its stage ended, and what it took."""
        _, status, usage = os.wait4(stage.pid, 0)
        ended = {"status": status, "seconds": time.monotonic() - stage.started}
        ended |= {"cpu_seconds": usage.ru_utime + usage.ru_stime}
        ended |= {"peak_mib": usage.ru_maxrss / 1024}
        try:
            send(stage.connection, ended)
        except OSError as lost:
            sys.stderr.write(f"a client is gone: {lost}\n")
        if stage.has_client:
            self.selector.unregister(stage.connection)
        self.selector.unregister(stage.process)
        self.stages.remove(stage)
        stage.has_client = False
        close_all(stage.connection, stage.process)

    def _kill(self, stage: Stage) -> None:
        """Kills the stage, and what it started, of a client that is gone."""
        stage.has_client = False
        self.selector.unregister(stage.connection)
        with contextlib.suppress(ProcessLookupError):  # before its setsid; or it just ended
            os.kill(stage.pid, signal.SIGKILL)
            os.killpg(stage.pid, signal.SIGKILL)


def _is_free(lock) -> bool:
    """Whether the study let go of its lock: it ended, however it did."""
    try:
        fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def close_all(*opened: socket.socket | int) -> None:
    """Closes sockets and numbers of open files."""
    for one in opened:
        os.close(one) if isinstance(one, int) else one.close()


def refuse_other_user(connection: socket.socket) -> None:
    """Raises where the other side of a connection is not this user.

    Raises:
        PermissionError: names both.
    """
    size = struct.calcsize("3i")
    credentials = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, size)
    user = struct.unpack("3i", credentials)[1]
    if user != os.getuid():
        raise PermissionError(f"user {user} asks; this is a process of user {os.getuid()}")


def check_request(request: dict, descriptors: list[int]) -> None:
    """Raises where a request is not a command that a warm process runs.

    Raises:
        ValueError: names the key, its value and what is needed.
    """
    needed = {"words": list, "cwd": str, "environment": dict, "umask": int}
    for key, kind in needed.items():
        if not isinstance(request.get(key), kind):
            raise ValueError(f"{key}: {request.get(key)!r}; a {kind.__name__} is needed")
    texts = [*request["words"], *request["environment"], *request["environment"].values()]
    if not all(isinstance(text, str) for text in texts):
        raise ValueError("words and environment: texts are needed")
    name, *words = request["words"] or [""]
    if name not in WARM or words[: len(WARM[name])] != WARM[name]:
        raise ValueError(f"words: {request['words'][:3]}; {WARM} are run")
    if len(descriptors) != 3:
        raise ValueError(f"{len(descriptors)} open files; 3 are needed")


def main() -> None:
    """Serves; a process that it forked goes on here as the stage."""
    folder = Path(sys.argv[1])
    listener = socket.socket(fileno=LISTENER)
    listener.set_inheritable(False)
    import_stages()
    has_cuda = torch.cuda.is_available()
    request = WarmProcess(folder, listener).serve()
    if request is None:
        shutil.rmtree(folder, ignore_errors=True)
        return
    become(request)
    if has_cuda and torch.cuda._is_in_bad_fork():
        start_cold(request)
    run_stage(request)


if __name__ == "__main__":
    main()
