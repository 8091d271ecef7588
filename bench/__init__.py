"""Benchmarks: `python -m bench`, `python -m bench.demo`. Not part of the wheel."""
