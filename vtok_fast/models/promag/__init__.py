"""ProMAG: temporal compression that is grown level by level."""

from vtok_fast.models.promag.config import ProMAGConfig
from vtok_fast.models.promag.model import ProMAG

__all__ = ["ProMAG", "ProMAGConfig"]
