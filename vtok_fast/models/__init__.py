"""The tokenizers, as readable PyTorch modules: a folder for each system, and common/ for what they share.

In each folder config.py has the configuration and its presets, model.py the tokenizer itself, and the other
files its parts. A system is imported when it is first asked for: some bring in half of PyTorch's compiler,
which costs more than the rest of a short run.
"""

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
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
SYSTEMS = {
    name.lower(): name for name in __all__ if not name.endswith("Config")
}  # the folders, and the classes of the tokenizers


def __getattr__(name: str) -> object:
    if name in SYSTEMS:
        return importlib.import_module(f"{__name__}.{name}")
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    folder = importlib.import_module(f"{__name__}.{name.removesuffix('Config').lower()}")
    globals()[name] = getattr(folder, name)
    return globals()[name]


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__, *SYSTEMS})
