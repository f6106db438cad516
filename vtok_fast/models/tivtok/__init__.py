"""TivTok: tokens of the whole clip beside tokens of each slice."""

from vtok_fast.models.tivtok.config import TivTokConfig
from vtok_fast.models.tivtok.model import TivTok

__all__ = ["TivTok", "TivTokConfig"]
