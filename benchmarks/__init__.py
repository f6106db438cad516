"""The benchmarks of vtok_fast.bench under pytest-benchmark, and their results. ``python -m benchmarks
--help``."""
