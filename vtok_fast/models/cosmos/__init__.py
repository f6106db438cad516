"""Cosmos: wavelet patches, factorized causal convolutions, FSQ or continuous latents."""

from vtok_fast.models.cosmos.config import CosmosConfig
from vtok_fast.models.cosmos.model import Cosmos

__all__ = ["Cosmos", "CosmosConfig"]
