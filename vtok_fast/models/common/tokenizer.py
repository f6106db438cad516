"""What the tokenizers share beyond their layers: the configuration by name, checked videos and tokens, and
files."""

from __future__ import annotations

import json
import math
import os
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from vtok_fast.io.files import write_atomically
from vtok_fast.io.tokens import Tokens
from vtok_fast.models.common.checkpoint import METADATA_KEY, check_weights, read_weights
from vtok_fast.models.common.checks import check_finite, check_video

if TYPE_CHECKING:
    from typing_extensions import Self


class Reconstruction(NamedTuple):
    """`video` like the input, `codes` (B, z, t, h, w) the latent behind the regularizer, `indices` (B, t, h,
    w) int32 (fsq only), `loss` the regularizer's training loss, a scalar."""

    video: Tensor
    codes: Tensor
    indices: Tensor | None
    loss: Tensor


@dataclass(frozen=True)
class Config:
    """The base of the systems' configurations: frozen, JSON values only, with named ones in `presets`."""

    presets: ClassVar[dict[str, dict[str, Any]]] = {}

    name: str = field(default="custom", compare=False, kw_only=True)

    def to_dict(self) -> dict[str, Any]:
        """As JSON can hold it: tuples become lists."""
        return {key: _lists(value) for key, value in asdict(self).items()}

    @classmethod
    def get(cls, config: str | Config | dict[str, Any]) -> Self:
        """A configuration from its name in `presets`, from a dict of its fields, or as it is.

        Raises ValueError for an unknown name or field, or an impossible structure.
        """
        if isinstance(config, cls):
            return config
        if isinstance(config, str):
            if config not in cls.presets:
                raise ValueError(f"config={config!r}: expected one of {', '.join(cls.presets)}")
            return cls(name=config, **cls.presets[config])
        unknown = sorted(set(config) - {f.name for f in fields(cls)})
        if unknown:
            raise ValueError(f"config: unknown entries {', '.join(unknown)}")
        return cls(**config)

    def set_tuples(self, *names: str) -> None:
        """Make lists, as they come from JSON, the tuples that they were."""
        for name in names:
            object.__setattr__(self, name, _tuples(getattr(self, name)))

    def need_one_of(self, name: str, *allowed: Any) -> None:
        if getattr(self, name) not in allowed:
            raise ValueError(
                f"{name}={getattr(self, name)!r}: expected one of {', '.join(map(str, allowed))}"
            )

    def need_at_least(self, least: int, *names: str) -> None:
        for name in names:
            if not isinstance(getattr(self, name), int) or getattr(self, name) < least:
                raise ValueError(f"{name}={getattr(self, name)!r} must be an int of at least {least}")


def _lists(value: Any) -> Any:
    return [_lists(v) for v in value] if isinstance(value, (tuple, list)) else value


def _tuples(value: Any) -> Any:
    return tuple(_tuples(v) for v in value) if isinstance(value, (tuple, list)) else value


class Tokenizer(nn.Module):
    """The base of the systems: `encode(video) -> Tokens`, `decode(tokens) -> video`, `num_tokens`, `save`,
    `from_checkpoint`.

    A subclass sets `system` and `Config`, and defines `encode`, `decode` and `token_grid`; a system with a
    codebook has `codebook_size`, one without has `latent_channels`. Its configuration has in_channels,
    spatial_factor, causal and time_downsample_factor, by which videos are checked.
    """

    system: ClassVar[str]
    Config: ClassVar[type[Config]]

    def __init__(self, config: str | Config | dict[str, Any] | None = None, **fields: Any):
        super().__init__()
        if config is not None and fields:
            raise ValueError(
                f"config={config!r}: give a configuration or its fields ({', '.join(fields)}), not both"
            )
        self.config = self.Config.get(fields if config is None else config)

    def token_grid(self, frames: int, height: int, width: int) -> tuple[int, int, int]:
        """The last three dimensions of the tokens of a video of that size."""
        raise NotImplementedError

    def num_tokens(self, frames: int, height: int, width: int) -> int:
        """Tokens of one video of that size.

        Args:
            frames: of the video, before any that the model adds to fill up.
            height, width: in pixels, multiples of the model's spatial factor, which is not checked here.
        """
        return math.prod(self.token_grid(frames, height, width))

    @property
    def window(self) -> tuple[int, int]:
        """(frames, shared frames) of the windows in which a video file of any length is tokenized."""
        return 16 + self.config.causal, 0

    # Files

    def own_state(self) -> dict[str, Tensor]:
        """The state dict, without parts that the caller brings."""
        return self.state_dict()

    def save(self, path: str | os.PathLike) -> None:
        """Write the parameters and the configuration as safetensors; the file appears under its name once it
        is complete.

        Raises OSError if it cannot be written.
        """
        state = {key: value.detach().cpu().contiguous() for key, value in self.own_state().items()}
        metadata = {METADATA_KEY: json.dumps({"system": self.system, "config": self.config.to_dict()})}
        write_atomically(path, lambda temporary: save_file(state, temporary, metadata))

    @classmethod
    def read_checkpoint(cls, path: Path) -> tuple[dict[str, Tensor], dict[str, Any] | None]:
        """The tensors of a file, and what `save` stored beside them; a system with file formats of its own
        overrides it."""
        return read_weights(path)

    def fit_weights(self, weights: dict[str, Tensor]) -> dict[str, Tensor]:
        """The tensors of a file under this model's keys; a system whose releases differ in their keys
        overrides it."""
        return weights

    @classmethod
    def from_checkpoint(
        cls,
        path: str | os.PathLike,
        config: str | Config | dict[str, Any] | None = None,
        *,
        dtype: torch.dtype = torch.float32,
        **parts: Any,
    ) -> Self:
        """Load a file that `save` wrote, or a state dict (.pt, .ckpt, .safetensors) of the same keys.

        Args:
            config: a name, a configuration or a dict of its fields; may be left out for a file that `save`
                wrote. Beside such a file it must be the same model; how that one works where a call says
                nothing else (InfoTok's rate and router) comes from the file, unless a configuration or a dict
                says it.
            dtype: of the parameters.
            parts: modules that the constructor takes.

        Raises FileNotFoundError; ValueError for a file that is truncated, of another system or configuration,
        needs a config, or does not fit it.
        """
        path = Path(path)
        weights, stored = cls.read_checkpoint(path)
        if stored is not None and stored["system"] != cls.system:
            raise ValueError(f"path: {path} holds a {stored['system']!r} model, not {cls.system!r}")
        if config is None and stored is None:
            raise ValueError(f"config: {path} does not say what model it holds, name one")
        config = (
            cls.Config.get(config)
            if stored is None
            else cls._agreed(path, cls.Config.get(stored["config"]), config)
        )
        with torch.device("meta"):
            model = cls(config, **parts)
        for module in model.modules():
            if hasattr(module, "set_constants"):  # what is in no checkpoint
                module.set_constants(torch.device("cpu"))
        weights = model.fit_weights(weights)
        check_weights(path, config.name, weights, model.own_state())
        model.load_state_dict(
            {key: value.to(dtype) if value.is_floating_point() else value for key, value in weights.items()},
            strict=False,
            assign=True,
        )
        return model

    @classmethod
    def _agreed(cls, path: Path, stored: Any, given: str | Config | dict[str, Any] | None) -> Any:
        """The configuration of a file that holds one, where the caller names one too."""
        if given is None:
            return stored
        config = cls.Config.get(given)
        if config != stored:
            keys = [
                f.name
                for f in fields(config)
                if f.compare and getattr(config, f.name) != getattr(stored, f.name)
            ]
            one, other = (", ".join(f"{key}={getattr(c, key)!r}" for key in keys) for c in (stored, config))
            raise ValueError(
                f"config: {path} holds {cls.system}/{stored.name} with {one}; {cls.system}/{config.name}, "
                f"which was "
                f"asked for, has {other}"
            )
        if isinstance(given, cls.Config):
            return config
        said = {"name", *(given if isinstance(given, dict) else ())}
        free = [f.name for f in fields(config) if not f.compare and f.name not in said]
        return replace(config, **{key: getattr(stored, key) for key in free})

    # Checks

    @property
    def parameter(self) -> Tensor:
        """One of the model's own parameters: its dtype and device."""
        return next(iter(self.parameters()))

    def check_video(self, video: Tensor) -> None:
        """Raises TypeError or ValueError unless the model can encode video (B, C, T, H, W)."""
        check_video(video, self.config, self.parameter)

    def make_tokens(
        self, video: Tensor, *, indices: Tensor | None = None, latents: Tensor | None = None
    ) -> Tokens:
        """What `encode` returns for that video."""
        return Tokens(
            model=f"{self.system}/{self.config.name}",
            config=self.config.to_dict(),
            video_shape=tuple(video.shape[2:]),
            dtype=video.dtype,
            indices=indices,
            latents=latents,
        )

    def check_tokens(self, tokens: Tokens) -> Tensor:
        """The indices or latents of tokens, on the model's device, latents in its dtype.

        Raises TypeError if `tokens` is not a `Tokens`, ValueError if they come from another model or do not
        fit their own description.
        """
        if not isinstance(tokens, Tokens):
            raise TypeError(f"tokens must be Tokens, not {type(tokens).__name__}")
        if tokens.model.partition("/")[0] != self.system or self.Config.get(tokens.config) != self.config:
            raise ValueError(
                f"tokens come from a {tokens.model!r} model, this one is '{self.system}/{self.config.name}'"
            )
        expected = self.token_grid(*tokens.video_shape)
        if tokens.grid != expected:
            raise ValueError(
                f"tokens have {tokens.grid} positions, a video of {tokens.video_shape} has {expected}"
            )
        parameter = self.parameter
        size = self.codebook_size if hasattr(self, "codebook_size") else None
        if (tokens.indices is None) != (size is None):
            raise ValueError(
                f"tokens hold {'latents' if tokens.indices is None else 'indices'}, which this model does "
                f"not make"
            )
        if size is not None:
            if tokens.indices.numel() and not 0 <= tokens.indices.min() <= tokens.indices.max() < size:
                raise ValueError(
                    f"tokens.indices lie in [{tokens.indices.min()}, {tokens.indices.max()}], the codebook "
                    f"has "
                    f"{size} entries"
                )
            return tokens.indices.to(parameter.device)
        if tokens.latents.shape[1] != self.latent_channels:
            raise ValueError(
                f"tokens.latents have {tokens.latents.shape[1]} channels, the model has "
                f"{self.latent_channels}"
            )
        check_finite("tokens.latents", tokens.latents)
        return tokens.latents.to(parameter.device, parameter.dtype)
