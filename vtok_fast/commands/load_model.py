"""Tokenizers by name, with their weights, and what tells one from another."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path
from typing import Any

from torch import nn

from vtok_fast import models
from vtok_fast.io.files import raw

PACKAGED = {
    "vidtok/tiny": Path(__file__).resolve().parents[1] / "models" / "weights" / "vidtok_tiny.safetensors"
}


def systems() -> dict[str, type[nn.Module]]:
    """The tokenizers by the first part of their models' names."""
    return {system: getattr(models, kind) for system, kind in models.SYSTEMS.items()}


def load_model(
    name: str, checkpoint: str | os.PathLike | None = None, config: dict[str, Any] | None = None
) -> nn.Module:
    """The model called `name`, as in "vidtok/fsq_causal_488_32768", in evaluation mode.

    Args:
        checkpoint: its weights; may be left out for the models whose weights the package has ("vidtok/tiny").
        config: the configuration, where it is not the one that `name` names.

    Raises ValueError for an unknown name or without weights; else what the model's `from_checkpoint` raises.
    """
    system, _, configuration = name.partition("/")
    if system not in models.SYSTEMS:
        raise ValueError(
            f"model={name!r}: the tokenizers are {', '.join(sorted(models.SYSTEMS))}; give one as in "
            "vidtok/tiny"
        )
    if checkpoint is None and name not in PACKAGED:
        raise ValueError(
            f"checkpoint: {name} needs one; the package has weights of {', '.join(PACKAGED)} alone"
        )
    chosen = config if config is not None else configuration or None
    kind = getattr(models, models.SYSTEMS[system])  # no other system is imported
    return kind.from_checkpoint(PACKAGED[name] if checkpoint is None else checkpoint, chosen).eval()


def fingerprint(model: nn.Module) -> str:
    """A digest of a model's weights, the same on every device and for an accelerated model; of another dtype
    it is another one."""
    digest = hashlib.sha256()
    for name, value in sorted(model.state_dict().items()):
        digest.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
        digest.update(raw(value.detach().cpu().contiguous()))
    return digest.hexdigest()


def description(model: nn.Module, weights: str) -> dict[str, Any]:
    """What makes a part of one run unfit for another."""
    dtype = str(next(model.parameters()).dtype).removeprefix("torch.")
    return {"system": model.system, "config": model.config.to_dict(), "weights": weights, "dtype": dtype}
