"""Triton kernels and their launchers, one file per op. Installed as ``vtok_fast.kernels``."""

import contextlib

import torch


def on_device_of(tensor: torch.Tensor) -> contextlib.AbstractContextManager:
    """Makes the tensor's GPU the current one, where Triton launches; does nothing for the CPU of Triton's interpreter."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else contextlib.nullcontext()
