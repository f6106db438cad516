"""Convolution over video. ``op``: the public function; ``call``, ``checks``: one checked call; ``cpu``,
``sm80``, ``sm90``: the backends; ``gradient``: which of them computes which gradient."""

from vtok_fast.ops.causal_conv3d import gradient
from vtok_fast.ops.causal_conv3d.op import causal_conv3d

__all__ = ["causal_conv3d", "gradient"]
