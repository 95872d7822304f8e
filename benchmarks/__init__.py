"""Benchmarks at real sizes, run by `make bench` and `make bench-memory`; results are kept in `benchmarks/results`."""
