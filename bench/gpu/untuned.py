"""The headlines of the race with the guesses of the roofline: what a user gets who has tuned nothing.

It writes into a folder of its own, where there is no table: nothing in it was measured with one. Other libraries wait
for the race after tuning.
"""

from __future__ import annotations

import os
import sys

from bench.gpu.compile_ahead import compile_side_by_side
from bench.gpu.contestants import cublas, sparsekern_gpu
from bench.gpu.part import Part, main
from bench.gpu.race import headline_cases, race_cases, rehearsal_cases

COMPILING = 0.5
"""Share of the budget that compiling side by side may take."""


def run(part: Part) -> bool:
    """Run the cases that are not in the results yet; return whether all are."""
    os.environ["SPARSEKERN_AUTOTUNE"] = "0"
    compile_side_by_side(part, COMPILING, guesses=True)
    cases = rehearsal_cases()[-3:] if part.rehearsal else headline_cases()
    return race_cases(part, cases, {"sparsekern": sparsekern_gpu, "cublas": cublas})


if __name__ == "__main__":
    sys.exit(main("untuned", __doc__, run))
