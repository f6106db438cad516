"""The tokenizers, as readable PyTorch modules."""

from vtok_fast.models.vidtok import VidTok
from vtok_fast.models.vidtok_configs import VidTokConfig

__all__ = ["VidTok", "VidTokConfig"]
