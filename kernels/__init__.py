"""Triton kernels and their launchers, one file per op. Installed as ``vtok_fast.kernels``."""
