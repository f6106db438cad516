"""The tokenizers, as readable PyTorch modules."""

from vtok_fast.models.cosmos import Cosmos
from vtok_fast.models.cosmos.config import CosmosConfig
from vtok_fast.models.infotok import InfoTok
from vtok_fast.models.infotok.config import InfoTokConfig
from vtok_fast.models.promag import ProMAG
from vtok_fast.models.promag.config import ProMAGConfig
from vtok_fast.models.tivtok import TivTok
from vtok_fast.models.tivtok.config import TivTokConfig
from vtok_fast.models.vidtok import VidTok
from vtok_fast.models.vidtok.config import VidTokConfig
from vtok_fast.models.vtok import VTok
from vtok_fast.models.vtok.config import VTokConfig

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
