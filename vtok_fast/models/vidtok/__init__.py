"""VidTok: a causal 3D autoencoder with FSQ or KL."""

from vtok_fast.models.vidtok.config import VidTokConfig
from vtok_fast.models.vidtok.model import VidTok

__all__ = ["VidTok", "VidTokConfig"]
