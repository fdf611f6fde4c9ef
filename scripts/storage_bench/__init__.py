"""The parts of `scripts/bench_storage.py`, one idea a file."""
