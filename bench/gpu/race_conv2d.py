"""The comparison of the convolution: the package and cuDNN, both channels last, take turns in one process."""

from __future__ import annotations

import sys

import torch

from bench.gpu.cases_conv2d import cases, rehearsal_cases
from bench.gpu.contestants_conv2d import cudnn, sparsekern_gpu
from bench.gpu.part import Part, main
from bench.gpu.race import race_cases
from bench.gpu.scene_conv2d import make_scene


def run(part: Part) -> bool:
    """Run the cases that are not in the results yet; return whether all are."""
    torch.backends.cudnn.allow_tf32 = True
    torch.backends.cudnn.benchmark = True
    chosen = rehearsal_cases() if part.rehearsal else cases()
    return race_cases(part, chosen, {"sparsekern": sparsekern_gpu, "cudnn": cudnn}, make_scene)


if __name__ == "__main__":
    sys.exit(main("conv2d", __doc__, run))
