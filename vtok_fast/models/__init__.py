"""The tokenizers, as readable PyTorch modules: a folder for each system, and common/ for what they share.

In each folder config.py has the configuration and its presets, model.py the tokenizer itself, and the other
files its parts.
"""

from vtok_fast.models.cosmos import Cosmos, CosmosConfig
from vtok_fast.models.infotok import InfoTok, InfoTokConfig
from vtok_fast.models.promag import ProMAG, ProMAGConfig
from vtok_fast.models.tivtok import TivTok, TivTokConfig
from vtok_fast.models.vidtok import VidTok, VidTokConfig
from vtok_fast.models.vtok import VTok, VTokConfig

__all__ = [
    "Cosmos",
    "CosmosConfig",
    "InfoTok",
    "InfoTokConfig",
    "ProMAG",
    "ProMAGConfig",
    "TivTok",
    "TivTokConfig",
    "VTok",
    "VTokConfig",
    "VidTok",
    "VidTokConfig",
]
