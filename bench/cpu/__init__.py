"""The parts of :mod:`bench.race`, the comparison on a CPU; see bench/README.md."""
