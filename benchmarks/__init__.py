"""The benchmarks under pytest-benchmark (test_cases.py), what was measured (results/, LOG.md), what is
predicted (predictions/), and the writer of docs/models.md. The command that measures is ``vtok-fast bench``.
"""
