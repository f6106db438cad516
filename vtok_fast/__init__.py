"""Fast kernels for video tokenizers, behind a thin PyTorch API."""

from vtok_fast.backends import BackendError, algorithm, available_backends, backend
from vtok_fast.ops.causal_conv3d import causal_conv3d

__all__ = ["BackendError", "algorithm", "available_backends", "backend", "causal_conv3d"]
__version__ = "0.1.0"
