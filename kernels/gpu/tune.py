"""Measuring configurations on the tensors of a real call."""

from __future__ import annotations

import datetime
import logging
from collections.abc import Callable, Sequence

import torch
from sparsekern.kernels.gpu.config import Config
from sparsekern.kernels.gpu.launch import interpreted

CAPTURING = "a CUDA graph is being captured"

_log = logging.getLogger("sparsekern")


def why_not() -> str | None:
    """Return why nothing can be measured now, or None."""
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
    launch: Callable[[Config], object],
    seconds: Callable[[Callable[[], object]], float] | None = None,
) -> Config:
    """Return the configuration whose launch takes the least time; one that does not compile or fit is passed over.

    Args:
        configs: to choose from, best guess first.
        launch: runs the call with a configuration.
        seconds: measures a call; by default :func:`median_seconds`.

    Raises:
        RuntimeError: none of them runs; from the error of the first.
    """
    best, best_time, failures = None, float("inf"), []
    for config in configs:
        try:
            time = (seconds or median_seconds)(lambda config=config: launch(config))  # type: ignore[misc]
        except Exception as error:  # out of shared memory or registers, or a compiler's defect: the next one may do
            _log.info("%s does not run: %s", config, error)
            failures.append(error)
            if torch.cuda.is_available():
                torch.cuda.synchronize()  # raises if the error took the device with it: nothing measured so far counts
            continue
        if time < best_time:
            best, best_time = config, time
    if best is None:
        raise RuntimeError(f"none of {len(configs)} configurations runs") from failures[0]
    return best


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
