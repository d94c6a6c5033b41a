"""The parts of ``python -m bench.gpu_code``: rows, launches, what the compiler made of them, rules."""
