"""InfoTok: as many tokens as a clip's information asks for."""

from vtok_fast.models.infotok.config import InfoTokConfig
from vtok_fast.models.infotok.model import InfoTok

__all__ = ["InfoTok", "InfoTokConfig"]
