"""ProMAG: temporal compression that is grown level by level."""

from vtok_fast.models.promag.model import ProMAG

__all__ = ["ProMAG"]
