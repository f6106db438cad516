"""``causal_conv3d`` against PyTorch on the convolutions of Wan 2.1, VidTok and Cosmos.

Peers: *eager*, the chain of copies and the call that the model ships (NCDHW); *folded*, PyTorch's best
arrangement: the pads of height and width left to the convolution, only the time pad concatenated, in
``channels_last_3d`` and in NCDHW, and where there is no temporal tap also as a 2D convolution over frames; on
some layers ``torch.compile`` of the first two; on a GPU also cuDNN through its own frontend, where that is
installed (cudnn_frontend.py). Their weights are in the memory format of their input. The *best* peer is the
fastest of them all on that shape.

Ours takes ``channels_last_3d`` input and the weights as the model holds them. On a CPU it is measured with
the cache of transformed weights (how much that holds stands beside it) and without, on layers scaled down; on
a GPU the layers have their real sizes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from vtok_fast import parity
from vtok_fast.bench import products
from vtok_fast.bench.cases import cudnn_frontend, layers
from vtok_fast.bench.cases.layers import Layer
from vtok_fast.bench.harness import Candidate, Settings, Trial, backend_of, dtype_name, with_compiled
from vtok_fast.bench.own import Own
from vtok_fast.dispatch import native
from vtok_fast.ops.causal_conv3d import causal_conv3d
from vtok_fast.ops.causal_conv3d.call import Geometry
from vtok_fast.reference import causal_conv3d as reference

Pads = tuple[tuple[int, int], tuple[int, int]]
CL3D = torch.channels_last_3d
PEERS = (
    "eager; folded, channels last; folded, NCDHW; conv2d, channels last (no temporal tap); torch.compile of "
    "the first two; "
    "on a GPU: cuDNN frontend"
)


@dataclass(frozen=True)
class Case:
    layer: Layer
    compile: bool = False

    @property
    def model(self) -> str:
        return self.layer.model

    def __str__(self) -> str:
        return str(self.layer)


def cases(settings: Settings) -> list[Case]:
    chosen = layers.benchmark_layers(quick=settings.quick, whole=settings.on_gpu)
    with_compile = set() if settings.quick else layers.representatives(chosen)
    return [Case(layer, layer in with_compile) for layer in chosen]


def own(wish: Own) -> Case:
    """A causal layer: as many frames in front as the kernel needs, planes padded so that stride 1 keeps their
    size."""
    wish.only("causal_conv3d", "kernel", "stride", "channels", "time_mode")
    batch, cin, *size = wish.sizes("B,C,T,H,W")
    kernel, stride = wish.triple("kernel", (3, 3, 3)), wish.triple("stride", (1, 1, 1))
    mode = wish.one_of("time_mode", ("zeros", "replicate", "cache"), "zeros")
    pads = tuple(((k - 1) // 2, k // 2) for k in kernel[1:])
    layer = Layer(
        "own",
        "cosmos" if mode == "replicate" else "pad",
        kernel,
        stride,
        cin,
        wish.channels or cin,
        tuple(size),
        max(kernel[0] - stride[0], 0),
        pads,
        "continuing" if mode == "cache" else "first",
        1,
        1.0,
        batch,
    )
    if min(layer.out_size) < 1:
        raise ValueError(
            f"shape={batch},{cin},{','.join(map(str, size))}: too small for a kernel of {kernel}"
        )
    return Case(layer, wish.compile)


# ---- eager, as the models ship -----------------------------------------------------------------------------


def eager_pad(
    x: Tensor, w: Tensor, b: Tensor, cache: Tensor | None, *, stride, front: int, pads: Pads
) -> Tensor:
    """Wan and VidTok v1.0: the cache concatenated, then one F.pad for time, height and width."""
    if cache is not None:
        x = torch.cat([cache, x], 2)
        front -= cache.shape[2]
    (top, bottom), (left, right) = pads
    return F.conv3d(F.pad(x, (left, right, top, bottom, front, 0)), w, b, stride)


def eager_cosmos(
    x: Tensor, w: Tensor, b: Tensor, cache: Tensor | None, *, stride, front: int, pads: Pads
) -> Tensor:
    """Cosmos: the first frame repeated and concatenated, then F.pad in the plane; both always, even for no
    frame and no pixel."""
    earlier = x[:, :, :1].repeat(1, 1, front, 1, 1) if cache is None else cache
    (top, bottom), (left, right) = pads
    return F.conv3d(F.pad(torch.cat([earlier, x], 2), (left, right, top, bottom)), w, b, stride)


def eager_frames(x: Tensor, w: Tensor, b: Tensor, cache: None, *, stride, front: int, pads: Pads) -> Tensor:
    """A 2D layer: frames folded into the batch by a copy, conv2d, unfolded."""
    batch, c, t, h, width = x.shape
    x = x.permute(0, 2, 1, 3, 4).reshape(batch * t, c, h, width)
    (top, bottom), (left, right) = pads
    symmetric = top == bottom and left == right
    y = F.conv2d(
        x if symmetric else F.pad(x, (left, right, top, bottom)),
        w[:, :, 0],
        b,
        stride[1:],
        (top, left) if symmetric else 0,
    )
    return y.unflatten(0, (batch, t)).permute(0, 2, 1, 3, 4)


def eager_pixels(
    x: Tensor, w: Tensor, b: Tensor, cache: Tensor | None, *, stride, front: int, pads: Pads
) -> Tensor:
    """VidTok's temporal layers: pixels folded into the batch by a copy, padded or concatenated, conv1d,
    unfolded. The cache is held folded."""
    batch, c, t, h, width = x.shape
    x = x.permute(0, 3, 4, 1, 2).reshape(batch * h * width, c, t)
    x = F.pad(x, (front, 0)) if cache is None else torch.cat([cache, x], 2)
    y = F.conv1d(x, w[..., 0, 0], b, stride[0])
    return y.reshape(batch, h, width, y.shape[1], -1).permute(0, 3, 4, 1, 2)


EAGER = {"pad": eager_pad, "cosmos": eager_cosmos, "frames": eager_frames, "pixels": eager_pixels}


# ---- PyTorch's best arrangement ----------------------------------------------------------------------------


def folded(
    x: Tensor, w: Tensor, b: Tensor, cache: Tensor | None, *, stride, front: int, pads: Pads, replicate: bool
) -> Tensor:
    if front:
        if cache is None:
            cache = x[:, :, :1].expand(-1, -1, front, -1, -1)
            cache = cache if replicate else torch.zeros_like(cache, memory_format=torch.preserve_format)
        x = torch.cat([cache, x], 2)
    (top, bottom), (left, right) = pads
    if top != bottom or left != right:
        return F.conv3d(F.pad(x, (left, right, top, bottom)), w, b, stride)
    return F.conv3d(x, w, b, stride, (0, top, left))


def frames_2d(x: Tensor, w: Tensor, b: Tensor, *, stride, pads: Pads) -> Tensor:
    """Without a temporal tap: conv2d over the frames of a channels-last video of one clip, which is a
    view."""
    x = x[0].transpose(0, 1)
    (top, bottom), (left, right) = pads
    if top != bottom or left != right:
        return F.conv2d(F.pad(x, (left, right, top, bottom)), w, b, stride[1:]).transpose(0, 1)[None]
    return F.conv2d(x, w, b, stride[1:], (top, left)).transpose(0, 1)[None]


# ---- a trial -----------------------------------------------------------------------------------------------


def build(case: Case, settings: Settings) -> Trial:
    layer, dtype = case.layer, settings.working_dtype
    torch.manual_seed(0)
    make = partial(torch.randn, device=settings.device)
    fan = layer.cin * layer.kernel[0] * layer.kernel[1] * layer.kernel[2]
    x = make(layer.batch, layer.cin, *layer.size).to(dtype)
    w = (make(layer.cout, layer.cin, *layer.kernel) / fan**0.5).to(dtype)
    b = make(layer.cout).to(dtype)
    cache = (
        make(layer.batch, layer.cin, layer.front, *layer.size[1:]).to(dtype)
        if layer.chunk == "continuing"
        else None
    )
    mode = "replicate" if layer.wrapper == "cosmos" else "zeros"
    x_last, w_last, cache_last = (
        None if t is None else t.contiguous(memory_format=CL3D) for t in (x, w, cache)
    )
    options = {"stride": layer.stride, "front": layer.front, "pads": layer.spatial_pad}
    fold = partial(folded, **options, replicate=mode == "replicate")

    eager_cache = cache
    if layer.wrapper == "pixels" and cache is not None:
        eager_cache = cache.permute(0, 3, 4, 1, 2).reshape(-1, layer.cin, layer.front)
    eager = Candidate(
        "eager", partial(EAGER[layer.wrapper], **options), "eager", inputs=(x, w, b, eager_cache)
    )
    candidates = [
        eager,
        Candidate("folded, channels last", fold, inputs=(x_last, w_last, b, cache_last)),
        Candidate("folded, NCDHW", fold, inputs=(x, w, b, cache)),
    ]
    if layer.kernel[0] == 1 and layer.batch == 1:
        w2 = w[:, :, 0].contiguous(memory_format=torch.channels_last)
        flat = partial(frames_2d, stride=layer.stride, pads=layer.spatial_pad)
        candidates.append(Candidate("conv2d, channels last", flat, inputs=(x_last, w2, b)))
    found, missing = with_compiled(candidates[:2], settings) if case.compile else ([], {})
    candidates += found

    run = partial(
        _ours, stride=layer.stride, time_pad=(layer.front, 0), spatial_pad=layer.spatial_pad, time_mode=mode
    )
    ours = Candidate("vtok_fast", run, "ours", inputs=(x_last, w, b, cache_last))
    facts = {
        "gflop": layer.gflop,
        "megabytes": layer.megabytes(x.element_size()),
        "dtype": dtype_name(dtype),
        "share": layer.share,
        "chunk": layer.chunk,
    }
    if settings.on_gpu:
        own_cudnn, why = cudnn_frontend.peer(
            x_last,
            w_last,
            b,
            cache_last,
            eager.call(),
            stride=layer.stride,
            front=layer.front,
            pads=layer.spatial_pad,
            replicate=mode == "replicate",
        )
        if own_cudnn is None:
            missing[cudnn_frontend.NAME] = why
        candidates += [ours] if own_cudnn is None else [own_cudnn, ours]
        facts |= {"algorithm": backend_of(ours.call), "cached_bytes": 0}
    else:
        bound = 64 * w.numel() * w.element_size()  # more than any algorithm can want
        warm = partial(_use_weight_cache, bound, ours.call)
        candidates += [
            Candidate("vtok_fast", run, "ours", warm, ours.inputs),
            Candidate(
                "vtok_fast, no weight cache", run, "variant", partial(_use_weight_cache, 0), ours.inputs
            ),
        ]
        warm()
        facts |= {
            "algorithm": (algorithm := _algorithm(layer, x_last, w, mode)),
            "done_gflop": layer.gflop * products.share(algorithm, *layer.out_size[1:]),
            "weight_bytes": w.numel() * w.element_size(),
            "cached_bytes": _cached_bytes(),
        }
    errors, wrong = _errors(ours.call(), eager.call(), x, w, b, cache, layer, mode, few=settings.on_gpu)
    return Trial(str(case), layer.group, candidates, facts | errors, missing, wrong)


def _ours(x: Tensor, w: Tensor, b: Tensor, cache: Tensor | None, **options) -> Tensor:
    return causal_conv3d(x, w, b, cache=cache, **options)


def _use_weight_cache(bound: int, call: Callable[[], Tensor] | None = None) -> None:
    """Sets the bound of the weight cache, empties it, and fills it by one call."""
    if (lib := native.lib()) is not None:
        lib.clear_weight_cache()
        lib.set_weight_cache(bound)
    if call is not None:
        call()


def _cached_bytes() -> int:
    return native.lib().weight_cache_stats()["bytes"] if native.lib() else 0


def _algorithm(layer: Layer, x: Tensor, w: Tensor, mode: str) -> str:
    """What the native module chooses for such a call while the weight cache is on."""
    if native.lib() is None:
        return "reference"
    out = torch.empty(1, layer.cout, *layer.out_size, memory_format=CL3D)
    (top, bottom), (left, right) = layer.spatial_pad
    geometry = Geometry(layer.stride, pad=(layer.front, 0, top, bottom, left, right), time_mode=mode)
    return native.lib().causal_conv3d_choice(
        native.arg(x), native.arg(w), native.arg(out), geometry.native(), native.threads()
    )


@torch.no_grad()
def _errors(
    result: Tensor,
    theirs: Tensor,
    x: Tensor,
    w: Tensor,
    b: Tensor,
    cache: Tensor | None,
    layer: Layer,
    mode: str,
    few: bool,
) -> tuple[dict, str | None]:
    """Relative errors against float64, ours and eager's, and whether the *close* contract holds. ``few``: of
    three frames."""
    padded = reference.padded_input(
        x, time_pad=(layer.front, 0), spatial_pad=layer.spatial_pad, time_mode=mode, cache=cache
    )
    w64, b64, (kt, _, _), step, last = (
        w.double(),
        b.double(),
        layer.kernel,
        layer.stride[0],
        layer.out_size[0] - 1,
    )
    frames = sorted({0, last // 2, last}) if few else list(range(last + 1))
    # Frame by frame: the double convolution of ATen unfolds its input, which would take gigabytes for a whole
    # video.
    exact = torch.cat(
        [F.conv3d(padded[:, :, t * step : t * step + kt].double(), w64, b64, layer.stride) for t in frames], 2
    )
    result, theirs = result[:, :, frames], theirs[:, :, frames]
    measured = parity.close(result, exact, theirs)
    own, other = (parity.relative_errors(y, exact)["whole"] for y in (result, theirs))
    return {"error": own, "eager_error": other}, None if measured.ok else f"not close: {measured}"
