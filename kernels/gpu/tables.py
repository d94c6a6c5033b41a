"""Choice of a call's configuration: a measured one where there is one, else the best guess of the roofline.

:func:`run` makes the call. A configuration that does not compile or fit is replaced by the next candidate.

``SPARSEKERN_AUTOTUNE`` says how:

    offline   (default) the tables: the user's own first, then those of the package; the nearest entry, if there is
              none for just these magnitudes. Nothing is measured.
    0         the roofline only: the same choice everywhere, whatever was measured.
    1         as offline, and what is in no table is measured at its first call and added to the user's table.

A table is ``sm_90.json`` and so on: ``{"measured": {...where, when...}, "configs": {key: {...}}}``. The user's are in
``SPARSEKERN_CACHE`` (default: ``sparsekern`` under ``XDG_CACHE_HOME`` or ``~/.cache``).
"""

from __future__ import annotations

import datetime
import json
import logging
import os
import tempfile
import threading
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from sparsekern.kernels.gpu import roofline
from sparsekern.kernels.gpu.config import KINDS, Config, Problem, package_data, well_formed
from sparsekern.kernels.gpu.launch import interpreted
from torch import Tensor
from triton.compiler.errors import CompilationError
from triton.runtime.errors import OutOfResources, PTXASError

MODES = ("offline", "0", "1")

CAPTURING = "a CUDA graph is being captured"
NOT_FINITE = "the answer has an infinity or a NaN, so that none can be checked"

_NEAR = sorted((abs(t) + abs(n), t, n) for t in range(-3, 4) for n in range(-3, 4))
"""How far, in powers of two: distance, tokens, blocks. Farther than that the roofline knows better."""

NOT_RUNNING = (CompilationError, OutOfResources, PTXASError, RuntimeError)
"""What Triton raises for a configuration that does not compile (its passes: RuntimeError) or fit the device."""

OF_THE_DEVICE = (torch.OutOfMemoryError, torch.AcceleratorError)
"""RuntimeErrors that another configuration would meet, too."""

Launch = Callable[[Config], Tensor]

_chosen: dict[Problem, Config] = {}
_log = logging.getLogger("sparsekern")
_writing = threading.Lock()  # backward threads of several GPUs may measure at the same time


def run(problem: Problem, launch: Launch, exact: Callable[[], Tensor]) -> None:
    """Make a call with the configuration for its problem, or with the next candidate if that one does not run.

    Args:
        problem: what the configuration is chosen by.
        launch: makes the call with a given configuration and returns the tensor that it writes.
        exact: computes the same tensor another way, for answers to be compared with when configurations are measured.

    Raises:
        Exception: that of the chosen configuration, if no candidate compiles and fits.
    """
    config = choose(problem, launch, exact)
    try:
        launch(config)
    except OF_THE_DEVICE:
        raise
    except NOT_RUNNING as error:
        _run_another(problem, config, launch, error)


def choose(problem: Problem, launch: Launch, exact: Callable[[], Tensor]) -> Config:
    """Return the configuration for a problem; the arguments are those of :func:`run`."""
    config = _chosen.get(problem)
    if config is None:
        config = _choose(problem, launch, exact)
    return config


def forget() -> None:
    """Forget what was chosen: the next calls read the environment and the tables again."""
    _chosen.clear()
    package_data.cache_clear()


def mode() -> str:
    """Return the value of ``SPARSEKERN_AUTOTUNE``.

    Raises:
        ValueError: it is none of those above.
    """
    value = os.environ.get("SPARSEKERN_AUTOTUNE", MODES[0])
    if value not in MODES:
        raise ValueError(f"SPARSEKERN_AUTOTUNE is {value!r}; it must be one of {', '.join(MODES)}")
    return value


def cache_folder() -> Path | None:
    """Return the folder of the user's tables; None for a user without a home."""
    if given := os.environ.get("SPARSEKERN_CACHE"):
        return Path(given)
    if caches := os.environ.get("XDG_CACHE_HOME"):
        return Path(caches) / "sparsekern"
    try:
        return Path.home() / ".cache" / "sparsekern"
    except RuntimeError:
        return None


def read(problem: Problem) -> Config | None:
    """Return the configuration measured for a problem, or None."""
    for table in (_user_table(problem.arch), package_data(f"{problem.arch}.json")):
        config = _entry(table, problem, problem)
        if config is not None:
            return config
    return None


def read_near(problem: Problem) -> Config | None:
    """Return the configuration measured for the nearest magnitudes of tokens and blocks, or None."""
    for table in (_user_table(problem.arch), package_data(f"{problem.arch}.json")):
        for _, tokens, blocks in _NEAR:
            near = problem._replace(log2_tokens=problem.log2_tokens + tokens, log2_blocks=problem.log2_blocks + blocks)
            config = _entry(table, near, problem)
            if config is not None:
                return config
    return None


def write(problem: Problem, config: Config) -> None:
    """Add a measured configuration to the user's table, or warn that it cannot be."""
    folder = cache_folder()
    if folder is None:
        return
    path = folder / f"{problem.arch}.json"
    with _writing:
        table = _user_table(problem.arch) or {"measured": {}, "configs": {}}
        table["measured"] = circumstances()
        table["configs"][problem.key] = asdict(config)
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(dir=folder) as private:  # nothing is there yet: no link is followed
                unfinished = Path(private, path.name)
                unfinished.write_text(json.dumps(table, indent=1, sort_keys=True) + "\n")
                unfinished.replace(path)
        except OSError as error:
            _log.warning("%s is not written: %s. Set SPARSEKERN_CACHE to a folder that can be", path, error)


def why_not_measured() -> str | None:
    """Return why no configuration can be measured now, or None."""
    if interpreted() or not torch.cuda.is_available():
        return "there is no GPU"
    if (
        torch.distributed.is_available()
        and torch.distributed.is_initialized()
        and torch.distributed.get_world_size() > 1
    ):
        # Ranks would choose differently, or wait for each other while one of them measures inside a collective.
        return "several ranks are running; tune in one process first, all ranks read the same table"
    if torch.cuda.is_current_stream_capturing():
        return CAPTURING
    return None


def fastest(
    configs: Sequence[Config],
    launch: Launch,
    exact: Tensor,
    seconds: Callable[[Callable[[], object]], float] | None = None,
) -> Config:
    """Return the configuration whose launch takes the least time.

    One that does not compile or fit is passed over, and so is one whose answer is wrong.

    Args:
        configs: to choose from, best guess first.
        launch: makes the call with a configuration and returns the tensor that it writes.
        exact: what that tensor must be, but for rounding.
        seconds: measures a call; by default :func:`median_seconds`.

    Raises:
        RuntimeError: none of them runs and is right; from the error of the first.
    """
    best, best_time, failures = None, float("inf"), []
    for config in configs:
        try:
            off = share_off(launch(config), exact)
            if not off <= allowed(exact.dtype):
                raise ArithmeticError(f"its answer is off by {off:.2g} of the norm")
            time = (seconds or median_seconds)(lambda config=config: launch(config))  # type: ignore[misc]
        except Exception as error:  # out of shared memory or registers, or a compiler's defect: the next one may do
            level = logging.WARNING if isinstance(error, ArithmeticError) else logging.INFO
            _log.log(level, "%s does not run: %s", config, error)
            failures.append(error)
            if torch.cuda.is_available():
                torch.cuda.synchronize()  # raises if the error took the device with it: nothing measured so far counts
            continue
        if time < best_time:
            best, best_time = config, time
    if best is None:
        raise RuntimeError(f"none of {len(configs)} configurations runs") from failures[0]
    return best


def share_off(answer: Tensor, exact: Tensor) -> float:
    """Return the norm of the difference as a share of the norm; NaN if the answer has one."""
    error, norm = (torch.linalg.vector_norm(t.float()) for t in (answer.float() - exact.float(), exact))
    return float(error) if not norm else float(error / norm)


def allowed(dtype: torch.dtype) -> float:
    """Return how far two right answers of a dtype may be apart, as a share of the norm: tf32 keeps 11 bits."""
    return max(2 * torch.finfo(dtype).eps, 2**-9)


def median_seconds(run: Callable[[], object]) -> float:
    """Return the median time of a call on the GPU, caches flushed before each."""
    from triton.testing import do_bench

    return float(do_bench(run, warmup=10, rep=40, return_mode="median")) / 1e3


def circumstances() -> dict[str, str]:
    """Return what a measured figure must be told with: device, versions, date."""
    import triton

    return {
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "none",
        "torch": torch.__version__,
        "triton": triton.__version__,
        "date": datetime.datetime.now(datetime.timezone.utc).date().isoformat(),
    }


def _choose(problem: Problem, launch: Launch, exact: Callable[[], Tensor]) -> Config:
    asked = mode()
    config = None if asked == "0" else read(problem)
    if config is None and asked == "1":
        reason, wanted = why_not_measured(), None
        if reason is None and not bool((wanted := exact()).isfinite().all()):
            reason = NOT_FINITE
        if wanted is None or reason is not None:
            _log.info("%s is not tuned: %s", problem.key, reason)
            if reason in (CAPTURING, NOT_FINITE):  # not remembered: the next call may be able to
                return read_near(problem) or roofline.candidates(problem)[0]
        else:
            config = fastest(roofline.candidates(problem), launch, wanted)
            _chosen[problem] = config
            write(problem, config)
    if config is None and asked != "0":
        config = read_near(problem)
    _chosen[problem] = config or roofline.candidates(problem)[0]
    return _chosen[problem]


def _run_another(problem: Problem, config: Config, launch: Launch, error: Exception) -> None:
    """Make a call with the first other candidate that runs, say so once and remember it; else raise the error."""
    for other in roofline.candidates(problem):
        if other == config:
            continue
        try:
            launch(other)
        except OF_THE_DEVICE:
            raise
        except NOT_RUNNING:
            continue
        _chosen[problem] = other
        said = " ".join(str(error).split())[:200]
        _log.warning("%s: %s does not run (%s); from now on it is %s", problem.key, config, said, other)
        return
    raise error


def _entry(table: dict[str, Any] | None, entry: Problem, problem: Problem) -> Config | None:
    fields = (table or {}).get("configs", {}).get(entry.key)
    if fields is None:
        return None
    try:
        config: Config = KINDS[problem.kernel](**fields)
    except TypeError:  # written by another version
        return None
    return config if well_formed(config) and roofline.fits(problem, config) else None


def _user_table(arch: str) -> dict[str, Any] | None:
    folder = cache_folder()
    if folder is None:
        return None
    path = folder / f"{arch}.json"
    try:
        table = json.loads(path.read_text())
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, ValueError) as error:
        _log.warning("%s is not read: %s. Delete it to measure again", path, error)
        return None
    return table if isinstance(table, dict) and isinstance(table.get("configs"), dict) else None
