"""What a process that a warm one forked does before, and when, it becomes a stage."""

import ctypes
import os
import runpy
import shutil
import signal
import sys

import numpy as np
import torch
from monai.transforms import Randomizable

from diffboost.warm_client import COUNT_DEVICES, SHELLS_OWN

PR_SET_PDEATHSIG = 1  # of linux/prctl.h
TORCH_SEED = 67280421310721  # with which old versions of torch begin


def die_with(parent: int) -> None:
    """In a forked process: a session of its own, and the end when its parent ends."""
    os.setsid()
    ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # it ended before that took hold
        os._exit(1)


def take_over(descriptors: list[int]) -> None:
    """In a forked process: the client's standard input, output and error become its own."""
    for number, descriptor in enumerate(descriptors):
        os.dup2(descriptor, number)
        os.close(descriptor)
    sys.stdout.reconfigure(line_buffering=os.isatty(1))


def become(request: dict) -> None:
    """Takes a new process's folder, variables and random states.

    Of the variables only a shell's own can differ, for the environment named the socket; those that
    libraries set when they were imported stay, as they would.

    Source: engineering choice
    """
    os.chdir(request["cwd"])
    os.umask(request["umask"])
    for name in (*SHELLS_OWN, *COUNT_DEVICES):
        os.environ.pop(name, None)
        if name in request["environment"]:
            os.environ[name] = request["environment"][name]
    sys.orig_argv = request["words"]
    np.random.seed()
    Randomizable.R = np.random.RandomState()  # MONAI's, of transforms that nobody seeded
    if torch.initial_seed() != TORCH_SEED:  # new versions of torch begin with a seed of chance
        torch.default_generator.seed()


def start_cold(request: dict) -> None:
    """Replaces this process by the command of a request, and says so."""
    name = request["words"][0]
    sys.stderr.write(f"what was imported uses CUDA, which no fork can: {name} starts cold\n")
    sys.stderr.flush()
    os.execvp(name, request["words"])


def run_stage(request: dict) -> None:
    """Runs the command of a request in this process, as `python` and its words would."""
    name, *words = request["words"]
    if name == "python":
        if not getattr(sys.flags, "safe_path", False):  # Python 3.11's -P
            sys.path[0] = os.getcwd()
        sys.argv = words[1:]
        runpy.run_module(words[1], run_name="__main__", alter_sys=True)
    else:
        program = shutil.which(name)
        sys.path[0] = os.path.dirname(program)
        sys.argv = [program, *words]
        runpy.run_path(program, run_name="__main__")
