"""The workloads of the benchmark, a module per section."""
