"""Reading the weights of Cosmos tokenizers from the file formats they come in."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vtok_fast.models.common.checkpoint import read_weights

# Of patcher and quantizer: in the state dict or not, depending on the release and the file format.
CONSTANTS = ("wavelets", "_arange", "patch_size_buffer", "_levels", "_basis", "implicit_codebook")
NETWORK = "network."


def read_cosmos(path: Path) -> tuple[dict[str, Tensor], dict[str, Any] | None]:
    """The tensors of a state dict, of a released TorchScript file (.jit: the model, or its encoder or decoder
    alone), or of a folder with encoder.jit and decoder.jit; and `system` and `config` of a file of our own.

    Where keys start with "network.", as those of predict1 and InfoTok do, these are the ones that are read,
    and not the "ema." beside them.

    Raises FileNotFoundError, or ValueError for a file that is damaged or holds something else.
    """
    if path.is_dir():
        parts = [_read_jit(path / name) for name in ("encoder.jit", "decoder.jit")]
        return parts[0] | parts[1], None
    if path.suffix == ".jit":
        return _read_jit(path), None
    weights, stored = read_weights(path)
    network = {
        name.removeprefix(NETWORK): value for name, value in weights.items() if name.startswith(NETWORK)
    }
    return network or weights, stored


def _read_jit(path: Path) -> dict[str, Tensor]:
    if not path.is_file():
        raise FileNotFoundError(f"path: no checkpoint at {path}")
    try:
        with warnings.catch_warnings():
            # Of TorchScript, in which these models are released
            warnings.simplefilter("ignore", DeprecationWarning)
            return dict(torch.jit.load(path, map_location="cpu").state_dict())
    except RuntimeError as error:
        raise ValueError(f"path: {path} is truncated or no TorchScript file ({error})") from error


def fit_constants(weights: dict[str, Tensor], own: dict[str, Tensor]) -> dict[str, Tensor]:
    """`weights` with exactly the constants of the state dict `own`: files of one layout are read into models
    of the other."""
    learned = {key: value for key, value in weights.items() if key.rpartition(".")[2] not in CONSTANTS}
    return {key: value for key, value in own.items() if key.rpartition(".")[2] in CONSTANTS} | learned
