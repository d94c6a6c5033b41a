"""The parts of ``bench/gpu_run.sh``; see bench/README.md."""
