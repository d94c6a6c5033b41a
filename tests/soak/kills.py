"""Kills training runs at random instants with SIGKILL, resumes them, and compares every bit with a run left alone.

``python -m tests.soak.kills --kills 200``. Three kinds of death:

* at a random time;
* at a random call that writes: before it, after it, or with the file cut short in the middle of it;
* at a random time, after which a bit of the newest checkpoint is flipped, as a bad disk does.

A run is the command line's own, in a process forked from one that has imported everything. It may die several times
before it is let through. Compared are all weights of all checkpoints, metrics and results, but for what is time.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, NoReturn

import numpy
import safetensors.torch
import torch

import sparsekern.lab.run
from sparsekern.cli.main import application
from sparsekern.files.atomic_files import is_private
from sparsekern.lab.store import CONFIG, LOCK, METRICS, RESULTS
from sparsekern.training import METHODS

TIMES = {
    "ms_per_step",
    "update_seconds",
    "extra_seconds",
    "seconds",
    "environment",
    "time_sparse_over_dense",
    "at_equal_time",
    "tokens_per_second",
    "total_seconds",
}
"""What of rows and results is time, and differs from run to run."""

RUN = ["--width=64", "--block-size=16", "--sparsity=0.5", "--epochs=2", "--batch-size=20", "--seeds=2", "--device=cpu"]
RUN += ["--data=data.npz", "--update-every=2", "--save-every=2", "--quiet", "--json"]

CROP = "--augment=crop"

VARIANTS = {
    "gpt": ["--recipe=gpt-nano", "--data=data.txt", "--depth=1", "--context=8", "--batch-size=400"],
    **{name: [f"--method={name}", CROP] for name in METHODS},
    "agent": ["--method=rigl", CROP, "--agent"],
    "agent-gradients": ["--method=gse", CROP, "--agent", "--agent-estimate=gradients", "--agent-every=2"],
}
"""What is killed, by name."""

WRITES = ("fsync", "rename", "replace", "mkdir", "rmdir", "unlink")
"""Calls of the module os at which a run can die; a file that is written whole is one more."""


def write_data(base: Path) -> None:
    """Write a data set of 6 batches of images, and a text."""
    drawn = numpy.random.default_rng(0)
    labels = {"train_labels": numpy.arange(120) % 4, "test_labels": numpy.arange(40) % 4}
    images = {
        f"{part}_images": drawn.integers(0, 256, (count, 6, 6), "uint8")
        for part, count in (("train", 120), ("test", 40))
    }
    numpy.savez(base / "data.npz", **images, **labels)
    (base / "data.txt").write_bytes(bytes(drawn.integers(97, 123, 4000, "uint8")))


class Death:
    """Counts the calls that write, and kills the process at the one of number ``at``; never if that is negative."""

    def __init__(self, at: int, drawn: random.Random) -> None:
        self.at, self.count, self.drawn = at, 0, drawn

    def watch(self) -> None:
        """Put itself before every such call of this process."""
        for name in WRITES:
            setattr(os, name, self.deadly(getattr(os, name), None))
        torch.save = self.deadly(torch.save, lambda *a, **k: a[1])
        safetensors.torch.save_file = self.deadly(safetensors.torch.save_file, lambda *a, **k: a[1])
        Path.write_text = self.deadly(Path.write_text, lambda *a, **k: a[0])  # type: ignore[method-assign]
        module = sparsekern.lab.run
        module.append_row = self.deadly(module.append_row, lambda *a, **k: a[0])  # type: ignore[attr-defined]

    def deadly(self, call: Callable[..., Any], written: Callable[..., Any] | None) -> Callable[..., Any]:
        """Return the call; at its turn it dies before, after, or with half a file (``written`` returns which)."""

        def counted(*args: Any, **kwargs: Any) -> Any:
            self.count += 1
            if self.count != self.at:
                return call(*args, **kwargs)
            how = self.drawn.choice(["before", "after"] if written is None else ["before", "torn", "torn", "after"])
            if how != "before":
                call(*args, **kwargs)
            if how == "torn":
                path = written(*args, **kwargs)
                os.truncate(path, self.drawn.randrange(os.path.getsize(path)))
            os.kill(os.getpid(), signal.SIGKILL)

        return counted


def run(folder: Path, options: list[str], log: Path, at: int = -1, seed: int = 0) -> NoReturn:
    """Be a process that trains: a new run, or the resumed one."""
    death = Death(at, random.Random(seed))
    code = 1
    try:
        handle = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(handle, 1)
        os.dup2(handle, 2)
        # drawing takes longer than the training; that it is drawn anew is all that matters
        sparsekern.lab.run.draw_summary = lambda path, *_: Path.write_bytes(path, b"picture")  # type: ignore
        os.chdir(log.parent)
        death.watch()
        where = ["--resume", str(folder)] if (folder / CONFIG).is_file() else ["--out", str(folder)]
        failed = application()(["train", *RUN, *options, *where], standalone_mode=False)  # its exit code
        (log.parent / "count").write_bytes(str(death.count).encode())
        (log.parent / "modules").write_bytes("\n".join(sys.modules).encode())
        code = failed or 0
    except BaseException as error:  # whatever it is, the parent shows it
        print(f"{type(error).__name__}: {error}", flush=True)
        import traceback

        traceback.print_exc()
        sys.stderr.flush()
    finally:
        os._exit(code)


def spawn(*args: Any, **kwargs: Any) -> int:
    """Start a process that trains; returns its number."""
    sys.stdout.flush()
    child = os.fork()
    if child == 0:
        run(*args, **kwargs)
    return child


def ended(child: int) -> bool:
    """Wait for a process; return whether it was killed. Any other end than success is an error."""
    status = os.waitpid(child, 0)[1]
    if os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL:
        return True
    if status != 0:
        raise RuntimeError(f"a run ended with status {status}, neither killed nor done")
    return False


def import_all(base: Path, options: list[str], log: Path) -> None:
    """Import what a run imports while it goes on, by looking at one: the others then spend their time on training."""
    if ended(spawn(base / "imports", options, log)):
        raise RuntimeError("the run that is to be left alone was killed")
    for name in (base / "modules").read_text().split("\n"):
        with suppress(Exception):  # some are made while others are imported, and cannot be by themselves
            importlib.import_module(name)


def without_times(content: Any) -> Any:
    """Return plain values without what is time."""
    if isinstance(content, dict):
        return {key: without_times(value) for key, value in content.items() if key not in TIMES}
    return [without_times(item) for item in content] if isinstance(content, list) else content


def outcome(folder: Path) -> dict[str, Any]:
    """Return all that must be the same whatever happened to a run."""
    names = {path.relative_to(folder).as_posix(): path for path in folder.rglob("*.safetensors")}
    found: dict[str, Any] = {name: path.read_bytes() for name, path in names.items() if "damaged-" not in name}
    found["metrics"] = [without_times(json.loads(line)) for line in (folder / METRICS).read_text().splitlines()]
    found["results"] = without_times(json.loads((folder / RESULTS).read_text()))
    # A lock and an empty private folder stay of a process that is killed after it has written the results.
    names = (path.name for path in folder.iterdir())
    found["files"] = sorted(name for name in names if name != LOCK and not is_private(name))
    return found


def flip(folder: Path, drawn: random.Random) -> bool:
    """Flip a bit in the newest checkpoint of some seed that has an older one; return whether there was one."""
    seeds = [sorted(seed.glob("step-*")) for seed in (folder / "checkpoints").glob("seed-*")]
    newest = [found[-1] for found in seeds if len(found) > 1]
    if not newest:
        return False
    path = drawn.choice(sorted(drawn.choice(sorted(newest)).iterdir()))
    content = bytearray(path.read_bytes())
    content[drawn.randrange(len(content))] ^= 1 << drawn.randrange(8)
    path.write_bytes(content)
    return True


def soak(kills: int, seed: int, base: Path) -> Counter[str]:
    """Kill ``kills`` runs, as many of each variant; returns what was counted. An error ends it."""
    drawn, counted = random.Random(seed), Counter()
    write_data(base)
    log = base / "log"
    import_all(base, [], log)
    for number, (name, options) in enumerate(VARIANTS.items()):
        quota, trial = kills // len(VARIANTS) + (number < kills % len(VARIANTS)), 0
        if not quota:
            continue
        reference = base / f"{name}-straight"
        began = time.perf_counter()
        if ended(spawn(reference, options, log)):
            raise RuntimeError("the run that is to be left alone was killed")
        seconds, calls = time.perf_counter() - began, int((base / "count").read_text())
        expected = outcome(reference)
        before = counted["kills"]
        while counted["kills"] - before < quota:
            folder, trial = base / f"{name}-{trial}", trial + 1
            for _ in range(min(drawn.randint(1, 6), quota - (counted["kills"] - before))):
                kind = drawn.choice(["at a time", "at a write", "at a write", "then damaged"])
                if kind == "at a write":
                    killed = ended(spawn(folder, options, log, drawn.randint(1, calls), drawn.random()))
                else:
                    child = spawn(folder, options, log)
                    time.sleep(drawn.uniform(0, seconds))
                    os.kill(child, signal.SIGKILL)
                    killed = ended(child)
                if not killed:
                    break  # it was done before
                counted["kills"] += 1
                counted[f"kills of {name}"] += 1
                counted["kills " + ("at a write" if kind == "at a write" else "at a time")] += 1
                unfinished = not (folder / RESULTS).is_file()  # a finished run is only read
                if kind == "then damaged" and unfinished and flip(folder, drawn):
                    counted["damaged checkpoints"] += 1
            if not (folder / RESULTS).is_file() and ended(spawn(folder, options, log)):
                raise RuntimeError("a run was killed by somebody else")
            counted["runs compared"] += 1
            found = outcome(folder)
            if found != expected:
                differing = [key for key in expected.keys() | found.keys() if expected.get(key) != found.get(key)]
                raise RuntimeError(f"{folder} differs from {reference} in {', '.join(sorted(differing))}")
            shutil.rmtree(folder)
        print(f"{name}: {counted['kills'] - before} kills, no difference", flush=True)
    return counted


def main() -> None:
    """Read the options, kill, and print the counts."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    torch.set_num_threads(1)
    began = time.perf_counter()
    base = Path(tempfile.mkdtemp(prefix="sparsekern kills "))
    try:
        counted = soak(options.kills, options.seed, base)
    except BaseException:
        print(f"what is left of it: {base}", file=sys.stderr)
        raise
    shutil.rmtree(base)
    for what, count in counted.items():
        print(f"{count:6}  {what}")
    print(f"     0  differences; {time.perf_counter() - began:.0f} s")


if __name__ == "__main__":
    main()
