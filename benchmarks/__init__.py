"""Benchmarks: each op beside its strongest peers, in one run. ``python -m benchmarks --help``."""
