"""Measuring a model, its tiers and a machine: for `litecache bench` and `scripts/bench_*.py`."""
