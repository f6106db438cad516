"""Reading and checking the weights of a tokenizer from the file formats they come in."""

from __future__ import annotations

import json
import pickle
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor

METADATA_KEY = "vtok_fast_model"  # of our own .safetensors files: system and configuration, as JSON
VIDTOK_KEY = "vidtok_config"  # of older ones of VidTok: the configuration alone


def read_weights(path: Path) -> tuple[dict[str, Tensor], dict[str, Any] | None]:
    """The tensors of a file of any of the formats, without `loss.*`; and `system` and `config` of a file of
    our own."""
    if not path.is_file():
        raise FileNotFoundError(f"path: no checkpoint at {path}")
    stored = None
    try:
        if path.suffix == ".safetensors":
            with safe_open(path, "pt") as file:
                metadata = file.metadata() or {}
            if METADATA_KEY in metadata:
                stored = json.loads(metadata[METADATA_KEY])
            elif VIDTOK_KEY in metadata:
                stored = {"system": "vidtok", "config": json.loads(metadata[VIDTOK_KEY])}
            weights = load_file(path)
        else:
            weights = torch.load(path, map_location="cpu", weights_only=True)
            for nest in ("state_dict", "model"):
                weights = weights.get(nest, weights) if isinstance(weights, dict) else weights
    except pickle.UnpicklingError as error:
        # torch's own message advises to unpickle whatever is there.
        raise ValueError(
            f"path: {path} is damaged, or holds Python objects besides tensors, which are not loaded"
        ) from error
    except MemoryError:
        raise
    except Exception as error:  # a reader raises anything for a file of another kind, such as KeyError
        said = str(error).partition("\n")[0] if isinstance(error, (RuntimeError, SafetensorError)) else ""
        why = f" ({said})" if said else ""
        raise ValueError(f"path: {path} is truncated or not a checkpoint{why}") from error
    if not isinstance(weights, dict) or not all(isinstance(value, Tensor) for value in weights.values()):
        raise ValueError(f"path: {path} holds no state dict of tensors")
    return {key: value for key, value in weights.items() if not key.startswith("loss.")}, stored


def check_weights(path: Path, name: str, found: dict[str, Tensor], wanted: dict[str, Tensor]) -> None:
    missing = [key for key in wanted if key not in found]
    unknown = [key for key in found if key not in wanted]
    other = [
        f"{key} {tuple(found[key].shape)} instead of {tuple(wanted[key].shape)}"
        for key in wanted
        if key in found and found[key].shape != wanted[key].shape
    ]
    problems = [
        f"{len(keys)} {what}: {', '.join(keys[:4])}{', ...' if len(keys) > 4 else ''}"
        for what, keys in (("missing", missing), ("unknown", unknown), ("of another shape", other))
        if keys
    ]
    if problems:
        raise ValueError(f"path: {path} does not fit the configuration {name!r}; " + "; ".join(problems))
