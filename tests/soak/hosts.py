"""Two hosts that train one run lose one of them in several ways; measures when the other ends, and lets the run finish.

``python -m tests.soak.hosts``, as root: hosts are network namespaces. The finished run must have the blocks of one that
a single process trained without a break.
"""

from __future__ import annotations

import os
import signal
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from safetensors.torch import load_file

from sparsekern.lab import Config, Observer, start
from sparsekern.lab.store import METRICS, RESULTS
from tests.hosts import Hosts, hosts_or_reason

TIMEOUT = 10
"""Seconds of ``--timeout``."""

OPTIONS = ["--width=32", "--block-size=8", "--sparsity=0.5", "--epochs=40", "--batch-size=400", "--seeds=1"]
OPTIONS += ["--update-every=2", "--device=cpu", "--no-dense"]
CONFIG = Config(
    width=32, block_size=8, sparsity=0.5, epochs=40, batch_size=400, seeds=1, update_every=2, device="cpu", dense=False
)

CASES: dict[str, tuple[int, Callable[[Hosts], None]]] = {
    "the second host vanishes": (0, lambda hosts: hosts.vanish(1)),
    "the first host, with the store, vanishes": (1, lambda hosts: hosts.vanish(0)),
    "a rank falls silent": (0, lambda hosts: os.kill(hosts.processes(1)[-1], signal.SIGSTOP)),
    "a rank is killed": (0, lambda hosts: os.kill(hosts.processes(1)[-1], signal.SIGKILL)),
}
"""What happens, and the host that must end."""


def wait_for(ready: Callable[[], bool], seconds: float = 300) -> None:
    deadline = time.monotonic() + seconds
    while not ready():
        assert time.monotonic() < deadline, "it takes too long"
        time.sleep(0.05)


def lose(hosts: Hosts, case: str, folder: Path) -> str:
    """Train until the first epoch is done, lose a host or rank, and finish the run; return what was seen."""
    run = folder / "run"
    arguments = ["train", *OPTIONS, "--save-every=1", f"--out={run}", f"--timeout={TIMEOUT}"]
    started = [hosts.torchrun(host, arguments, folder / f"{host}.log") for host in (0, 1)]
    wait_for(lambda: (run / METRICS).is_file() and bool((run / METRICS).read_text()))
    survivor, happens = CASES[case]
    happens(hosts)
    began = time.monotonic()
    wait_for(lambda: "error: rank" in (folder / f"{survivor}.log").read_text())
    told = time.monotonic() - began
    assert started[survivor].wait(180) == 1
    ended = time.monotonic() - began
    for host in (0, 1):
        hosts.kill(host)
    hosts.come_back(1 - survivor)
    log = (folder / f"{survivor}.log").read_text().splitlines()
    said = next(line for line in log if line.startswith("error: rank"))
    arguments = ["train", f"--resume={run}", f"--timeout={TIMEOUT}"]
    assert [p.wait(600) for p in [hosts.torchrun(h, arguments, folder / f"again-{h}.log") for h in (0, 1)]] == [0, 0]
    assert (run / RESULTS).is_file()
    return f"rank {survivor} ended after {told:.1f} s, torchrun after {ended:.1f} s: {said.partition('. ')[0]}"


def places(run: Path) -> dict[str, list[int]]:
    """Return the index of all layers in the last checkpoint of a run, by the names of its tensors."""
    newest = max((run / "checkpoints" / "seed-0").glob("step-*"))
    state = load_file(newest / "sparse.safetensors")
    return {name: tensor.tolist() for name, tensor in state.items() if not tensor.is_floating_point()}


def main() -> None:
    """Run all cases."""
    hosts, reason = hosts_or_reason()
    if hosts is None:
        print(reason)
        return
    with hosts, tempfile.TemporaryDirectory() as folder:
        start(CONFIG, Path(folder, "one"), Observer())
        for number, case in enumerate(CASES):
            made = Path(folder, str(number))
            made.mkdir()
            said = lose(hosts, case, made)
            assert places(made / "run") == places(Path(folder, "one")), case
            print(f"{case}: {said}; resumed on both, the same blocks at the end", flush=True)


if __name__ == "__main__":
    main()
