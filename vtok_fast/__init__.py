"""Fast kernels for video tokenizers, with a thin PyTorch API.

Ops: ``causal_conv3d``, ``norm_act``, ``fsq_quantize``, ``fsq_decode``, ``fsq_entropy_loss``,
``scope_attention`` with ``Scope``, ``router_scores``, ``token_budget``, ``select_tokens``, ``pack_tokens``,
``unpack_tokens``. ``accelerate`` and ``accelerated`` swap them into an existing model; ``stream`` runs one
chunk by chunk. ``backend``, ``algorithm``, ``available_backends`` and ``fallbacks``: which kernel runs.
``Tokens`` and ``TokenWindows``: what a tokenizer makes of a video, and its file. ``TokenDataset`` and
``TokenLoader``: those of a corpus, in a random order. ``vtok_fast.nn``: modules.
``vtok_fast.models``: tokenizers. ``vtok_fast.parity``: how equality is measured.
"""

import importlib.util
import sys
from pathlib import Path
from typing import TYPE_CHECKING

__version__ = "0.1.0"


def _is_the_command() -> bool:
    """Whether this process is `vtok-fast` or `python -m vtok_fast...`: it answers --help, or reports a
    mistake, without waiting for torch, so the names are imported when the first one is used."""
    words = sys.orig_argv[1:]
    module = words[words.index("-m") + 1 :][:1] if "-m" in words else []
    return any(Path(word).stem == "vtok-fast" for word in words[:2]) or any(
        name.split(".")[0] == "vtok_fast" for name in module
    )


def _why_no_torch() -> str | None:
    try:
        import torch  # noqa: F401
    except ImportError as error:  # the command's doctor then still has something to say
        return str(error)
    return None


# Every other program has the ops in torch's registry after `import vtok_fast`: to load an exported model it
# needs nothing else of the package.
if TYPE_CHECKING or sys.modules.get("torch") is not None or not _is_the_command() and _why_no_torch() is None:
    from vtok_fast.api import *  # noqa: F403
    from vtok_fast.api import __all__ as __all__
else:

    def __getattr__(name: str) -> object:
        if name.startswith("__") and name != "__all__":
            raise AttributeError(f"module 'vtok_fast' has no attribute {name!r}")
        if (why := _why_no_torch()) is not None:
            raise ImportError(f"vtok_fast.{name} needs torch, which cannot be imported: {why}")
        # A submodule needs no more than itself: the package's own files ask here for those, and vtok_fast.api
        # imports the files.
        if importlib.util.find_spec(f"vtok_fast.{name}"):
            return importlib.import_module(f"vtok_fast.{name}")
        api = importlib.import_module("vtok_fast.api")
        globals().update({exported: getattr(api, exported) for exported in (*api.__all__, "__all__")})
        if name not in globals():
            raise AttributeError(f"module 'vtok_fast' has no attribute {name!r}")
        return globals()[name]

    def __dir__() -> list[str]:
        return sorted({*globals(), *__getattr__("__all__")})  # type: ignore[misc]
