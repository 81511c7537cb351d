"""Damages and attacks on every kind of input, and what the stage that reads it makes of them.

    python benchmarks/reliability/fuzz_inputs.py --cases 2000 --seed 0

A case takes a valid input, damages one file of it, and lets the stage read it. It passes if the
file is rejected with a reason, or refused with an error that names it, or accepted with the meaning
unchanged. Where a format has no checksum or a person writes it, a change that is not hostile may
also be taken for what it now says; these are counted apart ("says something else"). It fails if
something crashes, takes longer than the limit or more memory, raises an error that names nothing,
writes outside the output folder, runs planted code, or is accepted with another meaning. The last
line is JSON.
"""

import argparse
import collections
import fnmatch
import json
import logging
import multiprocessing
import resource
import shutil
import signal
import sys
import tempfile
import time
import traceback
import warnings
from pathlib import Path

import numpy as np
import torch
from fuzz_kinds import KINDS, Kind, told

from diffboost.data.addresses import address_seed

CASE_SECONDS = 60  # on a busy machine a whole prepare has taken 20
CASE_MEMORY = 3 << 30  # bytes above what the program takes before
BATCH = 100  # cases of a worker process, so that a crash is noticed
CLEAR_ERRORS = (
    ValueError, OSError, FileNotFoundError, FileExistsError, PermissionError, IsADirectoryError,
    NotADirectoryError,
)  # fmt: skip
PASSED = ("rejected with a reason", "clear error", "same meaning", "says something else")


class TooLongError(Exception):
    """The case takes longer than its limit."""


def _too_long(number: int, frame: object) -> None:
    raise TooLongError


def snapshot(*folders: Path) -> dict[str, tuple]:
    """Every path below some folders with its kind, size and time of change."""
    found = {}
    for folder in folders:
        for path in [folder, *folder.rglob("*")]:
            state = path.lstat()
            size = 0 if path.is_dir() else state.st_size
            changed = 0 if path.is_dir() else state.st_mtime_ns
            found[str(path)] = (state.st_mode, size, changed)
    return found


def kind_of(number: int) -> Kind:
    """The kind of a case, by the kinds' weights in turn."""
    turns = [kind for turn in range(4) for kind in KINDS if kind.weight > turn]
    return turns[number % len(turns)]


def run_case(number: int, seed: int, scratch: Path) -> dict:
    """Makes one case, lets it be read and judges what happened."""
    kind, rng = kind_of(number), np.random.RandomState(address_seed(seed, "fuzz", number))
    template = scratch / "templates" / f"{KINDS.index(kind):02d}"
    case = scratch / "case"
    folder, output, sentinel = (case / name for name in ("input", "output", "sentinel"))
    shutil.rmtree(case, ignore_errors=True)
    shutil.copytree(template / "input", folder)
    output.mkdir()
    sentinel.mkdir()
    (sentinel / "secret.png").write_text("secret")
    pattern = list(kind.files)[rng.randint(len(kind.files))]
    files = sorted(path for path in folder.glob(pattern) if path.is_file())
    path = files[rng.randint(len(files))]
    damage = kind.files[pattern][rng.randint(len(kind.files[pattern]))]
    facts = {"case": number, "kind": kind.name, "damage": damage.name}
    facts["file"] = str(path.relative_to(folder))
    try:
        damage.change(path, rng, sentinel)
    except Exception as error:  # the damage does not fit this file, e.g. an empty one
        return facts | {"outcome": "not done", "said": repr(error)[:200]}
    if damage.hostile:
        (folder / "hostile").touch()
    before = snapshot(folder, sentinel, case)
    outside = {name for name in before if not name.startswith(str(output))}
    outcome, said = judge(
        kind, folder, output, path, damage, json.loads((template / "told").read_text())
    )
    after = {
        n: s for n, s in snapshot(folder, sentinel, case).items() if not n.startswith(str(output))
    }
    changed = [name for name in {*after, *outside} if after.get(name) != before.get(name)]
    if (sentinel / "executed").exists():
        outcome = "PLANTED CODE RAN"
    elif changed or Path("/tmp/planted_by_fuzz").exists():
        outcome, said = "WROTE OUTSIDE", f"{changed[:3]} {said}"
    return facts | {"outcome": outcome, "said": said}


def judge(kind: Kind, folder: Path, output: Path, path: Path, damage, expected: dict) -> tuple:
    """What came of a damaged input: the outcome, and what was said."""
    signal.alarm(CASE_SECONDS)
    try:
        good, rejected = kind.read(folder, output)
        good = {name: told(value) for name, value in good.items()}
    except TooLongError:
        return "TOOK TOO LONG", ""
    except CLEAR_ERRORS as error:
        signal.alarm(0)
        text = str(error)
        named = path.name in text or str(folder) in text or str(output) in text
        if type(error) in CLEAR_ERRORS and named:
            return "clear error", text[:300]
        return "RAW ERROR", f"{type(error).__name__}: {text[:300]} {_where(error)}"
    except BaseException as error:
        signal.alarm(0)
        return "RAW ERROR", f"{type(error).__name__}: {str(error)[:300]} {_where(error)}"
    finally:
        signal.alarm(0)
    others = {name: value for name, value in good.items() if expected.get(name) != value}
    missing = [name for name in expected if name not in good]
    if rejected and not others and all(reason for _, reason in rejected):
        return "rejected with a reason", str(rejected[0])[:300]
    if not others and not missing:
        return "same meaning", ""
    free = any(fnmatch.fnmatch(str(path.relative_to(folder)), each) for each in kind.free)
    if damage.rewritten or (free and not damage.hostile):
        return "says something else", ""
    return "ACCEPTED IN SILENCE", f"changed {sorted(others)[:3]}, missing {missing[:3]}"


def _where(error: BaseException) -> str:
    """The last lines of our own that an error came through."""
    frames = [f for f in traceback.extract_tb(error.__traceback__) if "diffboost" in f.filename]
    return "; ".join(f"{Path(f.filename).name}:{f.lineno}" for f in frames[-2:])


def work(numbers: list[int], seed: int, scratch: Path, record: Path) -> None:
    """Runs cases in this process, a line of JSON each."""
    signal.signal(signal.SIGALRM, _too_long)
    now = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (now + CASE_MEMORY, now + CASE_MEMORY))
    with record.open("a") as file:
        for number in numbers:
            file.write(json.dumps({"begun": number}) + "\n")
            file.flush()
            start = time.monotonic()
            facts = run_case(number, seed, scratch)
            file.write(json.dumps(facts | {"seconds": round(time.monotonic() - start, 3)}) + "\n")
            file.flush()


def run_all(numbers: list[int], seed: int, scratch: Path) -> list[dict]:
    """All cases, in worker processes; a case in which one dies is a crash."""
    record = scratch / "record.jsonl"
    results: list[dict] = []
    while numbers:
        record.write_text("")
        arguments = (numbers[:BATCH], seed, scratch, record)
        worker = multiprocessing.get_context("fork").Process(target=work, args=arguments)
        worker.start()
        worker.join(BATCH * CASE_SECONDS)
        if worker.is_alive():
            worker.kill()
            worker.join()
        lines = [json.loads(line) for line in record.read_text().splitlines()]
        done = [line for line in lines if "outcome" in line]
        results += done
        begun = [line["begun"] for line in lines if "begun" in line]
        if len(begun) > len(done):
            name = kind_of(begun[-1]).name
            outcome = {"outcome": "CRASH", "said": f"exit code {worker.exitcode}", "seconds": 0.0}
            results.append({"case": begun[-1], "kind": name, "damage": "", "file": ""} | outcome)
        elif not begun:
            raise RuntimeError(f"the worker ended before its first case: {worker.exitcode}")
        numbers = [number for number in numbers if number not in set(begun)]
        sys.stdout.write(f"{len(results)} cases\n")
        sys.stdout.flush()
    return results


def make_templates(scratch: Path, only: str | None) -> None:
    """A valid input of every kind, and what is understood of it."""
    for number, kind in enumerate(KINDS):
        if only and only not in kind.name:
            continue
        template = scratch / "templates" / f"{number:02d}"
        (template / "input").mkdir(parents=True)
        (template / "output").mkdir()
        kind.make(template / "input")
        good, rejected = kind.read(template / "input", template / "output")
        if rejected:
            raise RuntimeError(f"{kind.name}: the valid input is rejected: {rejected}")
        meaning = {name: told(value) for name, value in good.items()}
        (template / "told").write_text(json.dumps(meaning))


def main() -> None:
    """Runs the cases, writes what failed, prints JSON."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--cases", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--first", type=int, default=0, help="number of the first case")
    parser.add_argument("--only", help="kinds whose name holds this")
    parser.add_argument("--record", type=Path, help="a file for every case's result, JSON lines")
    options = parser.parse_args()
    logging.disable(logging.CRITICAL)
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    scratch = Path(tempfile.mkdtemp(prefix="fuzz_"))
    start = time.monotonic()
    try:
        make_templates(scratch, options.only)
        numbers = range(options.first, options.first + options.cases)
        chosen = [n for n in numbers if not options.only or options.only in kind_of(n).name]
        results = run_all(chosen, options.seed, scratch)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    if options.record:
        options.record.write_text("".join(json.dumps(each) + "\n" for each in results))
    results = [each for each in results if each["outcome"] != "not done"]
    failed = [each for each in results if each["outcome"] not in PASSED]
    for each in failed:
        sys.stdout.write(f"{each}\n")
    outcomes = collections.defaultdict(collections.Counter)
    for each in results:
        outcomes[each["kind"]][each["outcome"]] += 1
    summary = {
        "name": "fuzz_inputs",
        "passed": len(results) - len(failed),
        "of": len(results),
        "outcomes": dict(collections.Counter(each["outcome"] for each in results)),
        "kinds": {name: dict(counts) for name, counts in sorted(outcomes.items())},
        "longest_seconds": max((each["seconds"] for each in results), default=0),
        "seconds": round(time.monotonic() - start, 1),
    }
    sys.stdout.write(json.dumps(summary) + "\n")


if __name__ == "__main__":
    main()
