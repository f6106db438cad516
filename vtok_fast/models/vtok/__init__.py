"""VTok: a key frame's tokens and one residual token per later frame."""

from vtok_fast.models.vtok.backbones import CLIPBackbone
from vtok_fast.models.vtok.config import VTokConfig
from vtok_fast.models.vtok.model import VTok

__all__ = ["CLIPBackbone", "VTok", "VTokConfig"]
