"""``stream``: encode and decode a long video chunk by chunk, with the state of the pass in the stream and not
in the model."""

from __future__ import annotations

import sys
import threading
import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

_locks: weakref.WeakKeyDictionary[nn.Module, threading.Lock] = weakref.WeakKeyDictionary()


def stream(model: nn.Module) -> Any:
    """A stream over a model, accelerated or as shipped: ``encode_chunk``, ``decode_chunk``, ``reset``,
    ``chunks``.

        stream = vtok_fast.stream(model) for start, end in stream.chunks(num_frames):
            latent = stream.encode_chunk(video[:, :, start:end])

    For the tokenizers of `vtok_fast.models` it is what their own ``stream()`` gives. For diffusers'
    ``AutoencoderKLWan``, ``AutoencoderKLCogVideoX`` and causal ``AutoencoderVidTok`` it is a `Stream`.

    Raises:
        TypeError: a model of another kind, or one that cannot stream; says why.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected an nn.Module, got {type(model).__name__}")
    if type(model).__module__.startswith("vtok_fast.models.") and hasattr(model, "stream"):
        return model.stream()
    kind = type(model).__name__
    if not type(model).__module__.startswith("diffusers.models.autoencoders.") or kind not in _STREAMS:
        why = _WHY_NOT.get(kind, "no way to carry its state from chunk to chunk is known")
        raise TypeError(f"model: {kind} cannot stream: {why}")
    return _STREAMS[kind](model)


class Stream:
    """One pass over one video; several may run on one model without disturbing each other, or the model.

    A chunk that raises leaves the stream as it was. Nothing is kept on the model, whose tiling and slicing do
    not apply here.
    """

    def __init__(self, model: nn.Module):
        self.model = model
        self.reset()

    def reset(self) -> None:
        """Forget what came before: the next chunk is the first of a video."""
        self._state: dict[str, tuple[Any, tuple[int, ...]]] = {}

    def encode_chunk(self, video: Tensor) -> Any:
        """The latents of the next frames, (B, C, T, H, W), in what the model's own ``encode`` returns.

        The first chunk has 1 + k * factor frames (CogVideoX: also k * factor), each later one a multiple of
        the model's temporal factor.

        Raises ValueError for another number of frames, and for a batch or frame size that differs from the
        chunk before.
        """
        factor, frames = self.factor, video.shape[2] if video.dim() == 5 else 0
        first = "encode" not in self._state
        if frames < 1 or frames % factor not in (self._first_frames if first else (0,)):
            rule = " or ".join(f"{'1 + ' if r else ''}k * {factor}" for r in self._first_frames)
            rule = f"{rule} in the first chunk" if first else f"a multiple of {factor} in the next chunk"
            raise ValueError(
                f"video: expected (B, C, T, H, W) with T = {rule}, got shape {tuple(video.shape)}"
            )
        return self._advance("encode", "video", video, self._encode)

    def decode_chunk(self, latent: Tensor, **options: Any) -> Tensor:
        """The frames of the next latents, (B, C, t, h, w).

        Wan takes any t. CogVideoX takes any in the first chunk and an even one later. VidTok takes any, and
        ``lookahead=``: the latents that follow these ones (their first is used), None at the end of the
        video; it interpolates frames in time, so without it each chunk's last frames differ a little, and
        with it decoding is what the library's own chunks give.

        Raises ValueError for another number, and for a batch or frame size that differs from the chunk
        before.
        """
        frames, multiple = (
            latent.shape[2] if latent.dim() == 5 else 0,
            1 if "decode" not in self._state else self._later_latents,
        )
        if frames < 1 or frames % multiple:
            raise ValueError(
                f"latent: expected (B, C, t, h, w) with t a multiple of {multiple}, got shape "
                f"{tuple(latent.shape)}"
            )
        return self._advance("decode", "latent", latent, lambda x, state: self._decode(x, state, **options))

    def chunks(self, frames: int) -> list[tuple[int, int]]:
        """[start, end) of the chunks that the model itself would take of a video of 1 + k * factor frames."""
        if frames < 1 or (frames - 1) % self.factor:
            raise ValueError(f"frames: expected 1 + k * {self.factor}, got {frames}")
        return self._plan(frames, *self._video_plan)

    def latent_chunks(self, latents: int) -> list[tuple[int, int]]:
        """[start, end) of the chunks that the model itself would take of so many latent frames."""
        if latents < 1:
            raise ValueError(f"latents: expected at least one, got {latents}")
        return self._plan(latents, *self._latent_plan)

    # What a model's stream is made of.
    factor: int
    _first_frames: tuple[int, ...] = (1,)
    _later_latents: int = 1
    _video_plan: tuple[int, int]  # frames beside a multiple in the first chunk, and in each later chunk
    _latent_plan: tuple[int, int]
    _encode: Callable[[Tensor, Any], tuple[Any, Any]]
    _decode: Callable[..., tuple[Tensor, Any]]

    @torch.no_grad()
    def _advance(
        self, direction: str, name: str, x: Tensor, run: Callable[[Tensor, Any], tuple[Any, Any]]
    ) -> Any:
        state, size = self._state.get(direction, (None, None))
        now = (x.shape[0], *x.shape[3:])
        if size is not None and size != now:
            raise ValueError(
                f"{name}: (B, H, W) is {now}, in the chunk before it was {size}; reset() starts a new video"
            )
        result, state = run(x, state)
        self._state[direction] = (state, now)
        return result

    @staticmethod
    def _plan(frames: int, first: int, size: int) -> list[tuple[int, int]]:
        first = min(first, frames)
        return [(0, first)] + [(start, min(start + size, frames)) for start in range(first, frames, size)]


class WanStream(Stream):
    """Any plan of chunks gives the same result: this model's state is the frames before each convolution, and
    nothing else."""

    factor = 4
    _video_plan, _latent_plan = (1, 4), (1, 1)

    def _encode(self, video: Tensor, state: list | None) -> tuple[Any, list]:
        model, library = self.model, sys.modules[type(self.model).__module__]
        if model.config.patch_size is not None:
            video = library.patchify(video, patch_size=model.config.patch_size)
        y, state = self._run(model.encoder, "encoder", video, state)
        return library.AutoencoderKLOutput(
            latent_dist=library.DiagonalGaussianDistribution(model.quant_conv(y))
        ), state

    def _decode(self, latent: Tensor, state: list | None) -> tuple[Tensor, list]:
        model, library = self.model, sys.modules[type(self.model).__module__]
        y, state = self._run(model.decoder, "decoder", model.post_quant_conv(latent), state, first_chunk=True)
        if model.config.patch_size is not None:
            y = library.unpatchify(y, patch_size=model.config.patch_size)
        return y.clamp(-1.0, 1.0), state

    def _run(
        self, network: nn.Module, name: str, x: Tensor, state: list | None, **first: bool
    ) -> tuple[Tensor, list]:
        """The first frame of a video goes through by itself: that is how the network sees that it is the
        first."""
        parts, cache = (
            [x],
            list(state) if state is not None else [None] * self.model._cached_conv_counts[name],
        )
        if state is None and x.shape[2] > 1:
            parts = [x[:, :, :1], x[:, :, 1:]]
        done = []
        for part in parts:
            begins = state is None and not done
            done.append(network(part, feat_cache=cache, feat_idx=[0], **(first if begins else {})))
        return torch.cat(done, 2) if len(done) > 1 else done[0], cache


class CogVideoXStream(Stream):
    """Its norms take their statistics over a chunk, so the plan matters; ``chunks`` and ``latent_chunks`` are
    the model's own."""

    def __init__(self, model: nn.Module):
        super().__init__(model)
        self.factor = int(model.config.temporal_compression_ratio)
        self._first_frames = (0, 1)
        self._later_latents = 2
        self._video_plan = (model.num_sample_frames_batch_size + 1, model.num_sample_frames_batch_size)
        self._latent_plan = (model.num_latent_frames_batch_size + 1, model.num_latent_frames_batch_size)

    def latent_chunks(self, latents: int) -> list[tuple[int, int]]:
        size = self._latent_plan[1]
        return self._plan(latents, size + latents % size if latents >= size else latents, size)

    def _encode(self, video: Tensor, state: dict | None) -> tuple[Any, dict]:
        library = sys.modules[type(self.model).__module__]
        y, state = self.model.encoder(video, conv_cache=state)
        y = y if self.model.quant_conv is None else self.model.quant_conv(y)
        return library.AutoencoderKLOutput(latent_dist=library.DiagonalGaussianDistribution(y)), state

    def _decode(self, latent: Tensor, state: dict | None) -> tuple[Tensor, dict]:
        latent = latent if self.model.post_quant_conv is None else self.model.post_quant_conv(latent)
        return self.model.decoder(latent, conv_cache=state)


class VidTokStream(Stream):
    """Its layers keep their state on themselves: it is put there for a chunk and taken away again, one chunk
    at a time.

    The first chunk's first frame is repeated in front, as the model's ``forward`` does, so that it is a
    latent of its own.
    """

    def __init__(self, model: nn.Module):
        if not model.is_causal:
            raise TypeError(
                "model: a non-causal AutoencoderVidTok cannot stream: its frames depend on later ones"
            )
        super().__init__(model)
        self.factor = model.temporal_compression_ratio
        self._video_plan = (1, model.num_sample_frames_batch_size)
        self._latent_plan = (1, model.num_latent_frames_batch_size)

    def _encode(self, video: Tensor, state: dict | None) -> tuple[Any, dict]:
        library = sys.modules[type(self.model).__module__]
        if state is None:
            video = torch.cat([video[:, :, :1].expand(-1, -1, self.factor - 1, -1, -1), video], 2)
        z, state = self._run(self.model.encoder, video, state, {})
        if self.model.regularizer == "fsq":
            return self.model.regularization(z), state
        return library.AutoencoderKLOutput(latent_dist=library.DiagonalGaussianDistribution(z)), state

    def _decode(
        self, latent: Tensor, state: dict | None, lookahead: Tensor | None = None
    ) -> tuple[Tensor, dict]:
        first, offsets = state is None, {}
        if lookahead is not None:
            latent, offsets = torch.cat([latent, lookahead[:, :, :1]], 2), self._offsets()
        y, state = self._run(self.model.decoder, latent, state, offsets)
        y = y if lookahead is None else y[:, :, : -self.factor]
        return y[:, :, self.factor - 1 :] if first else y, state

    def _offsets(self) -> dict[nn.Module, int]:
        """How many frames at the end of a chunk with lookahead belong to the next one, at each layer of the
        decoder."""
        decoder, ahead = self.model.decoder, 1
        offsets = dict.fromkeys(decoder.modules(), 1)
        for i in reversed(range(decoder.num_resolutions)):
            level = decoder.up_temporal[i]
            offsets |= dict.fromkeys(level.block.modules(), ahead)
            if i in decoder.spatial_us and i in decoder.tempo_us:
                ahead *= 2
                offsets |= dict.fromkeys(level.upsample.modules(), ahead)
        return offsets | dict.fromkeys(decoder.conv_out.modules(), ahead)

    def _run(
        self, network: nn.Module, x: Tensor, state: dict | None, offsets: dict[nn.Module, int]
    ) -> tuple[Tensor, dict]:
        layers = [m for m in network.modules() if "is_first_chunk" in m.__dict__]
        with _locks.setdefault(self.model, threading.Lock()):
            names = ("is_first_chunk", "causal_cache", "cache_offset")
            before = [(m, {name: m.__dict__[name] for name in names if name in m.__dict__}) for m in layers]
            try:
                for m in layers:
                    m.is_first_chunk, m.causal_cache = state is None, None if state is None else state[m]
                    if "cache_offset" in m.__dict__:
                        m.cache_offset = offsets.get(m, 0)
                return network(x), {m: m.causal_cache for m in layers}
            finally:
                for m, values in before:
                    m.__dict__.update(values)


_STREAMS = {
    "AutoencoderKLWan": WanStream,
    "AutoencoderKLCogVideoX": CogVideoXStream,
    "AutoencoderVidTok": VidTokStream,
}
_WHY_NOT = {
    "AutoencoderKLHunyuanVideo": "its norms and its attention see all frames of a clip",
    "AutoencoderKLHunyuanVideo15": "its attention sees all earlier frames",
    "AutoencoderKLCosmos": "its attention over time sees all earlier frames, and the library keeps none of "
    "them",
}
