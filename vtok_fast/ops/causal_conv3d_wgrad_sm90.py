"""The Hopper kernel of ``causal_conv3d``'s gradient of weights and bias: which calls it takes, and how a call becomes a launch."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from vtok_fast import native
from vtok_fast.ops import causal_conv3d_cuda as cuda

Choice = tuple[int, int, int]  # columns of the tile, K splits, blocks per cluster; 0: the plan's


def launch(grad: Tensor, x: Tensor, grad_weight: Tensor, grad_bias: Tensor | None, cache: Tensor | None, geometry: tuple, *,
           lib: Any = None, choice: Choice = (0, 0, 0)) -> None:
    """Writes the gradients of the weights, and of the bias where it is given. All but these are channels-last already.

    Raises:
        NotImplementedError: the kernel cannot run it; the message says why.
    """
    arg = native.arg
    cuda._launch((lib or native.lib()).causal_conv3d_wgrad_sm90, x, arg(x), arg(grad_weight), arg(cache), *geometry, False,
                 arg(grad), arg(grad_weight), arg(grad_bias), choice)
