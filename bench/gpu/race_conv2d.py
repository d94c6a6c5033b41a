"""The comparison of the convolution: the package and cuDNN, both channels last, take turns in one process."""

from __future__ import annotations

import sys

import torch

from bench.gpu.cases_conv2d import cases, rehearsal_cases
from bench.gpu.contestants_conv2d import cudnn, sparsekern_gpu
from bench.gpu.part import Part, main, say_what_failed
from bench.gpu.race import run_case
from bench.gpu.scene_conv2d import make_scene
from sparsekern.analysis.clock import Clock, check_device


def run(part: Part) -> bool:
    """Run the cases that are not in the results yet; return whether all are."""
    clock = Clock(part.device, device_alone=True)
    torch.set_float32_matmul_precision("high")  # float32 is tf32 for everyone
    torch.backends.cudnn.allow_tf32 = True
    torch.backends.cudnn.benchmark = True
    for case in rehearsal_cases() if part.rehearsal else cases():
        if part.results.has(case.key):
            continue
        if part.over(0.0 if part.rehearsal else 5.0):
            print(f"conv2d: the budget is over before {case.key}")
            return False
        part.results.begin(case.key)
        try:
            run_case(part, clock, case, {"sparsekern": sparsekern_gpu, "cudnn": cudnn}, make_scene)
        except Exception as error:  # such as a GPU too small for the case
            print(f"conv2d: {case.key}: {say_what_failed(error)}")
            part.results.add({"key": case.key, "error": say_what_failed(error)})
            check_device(part.device)
    return True


if __name__ == "__main__":
    sys.exit(main("conv2d", __doc__, run))
