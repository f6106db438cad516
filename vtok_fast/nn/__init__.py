"""``nn.Module`` faces of the ops. One file per op."""

from vtok_fast.nn.causal_conv3d import CausalConv3d
from vtok_fast.nn.fsq import FSQ
from vtok_fast.nn.norm_act import NormAct
from vtok_fast.nn.scope_attention import ScopeAttention

__all__ = ["FSQ", "CausalConv3d", "NormAct", "ScopeAttention"]
