"""The convolutions of real models, from ``layers.json``: as they are for a GPU, scaled to what a CPU computes
in a moment."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, replace
from pathlib import Path

FILE = Path(__file__).with_name("layers.json")
GFLOP = 24.0  # of one call, at most
QUICK_GFLOP = 3.0


@dataclass(frozen=True)
class Layer:
    """A convolution as a model calls it. ``size`` is (T, H, W) of its input before padding; ``front`` the
    frames it puts before that; ``wrapper`` how the model does so; ``chunk`` whether they are ``first`` (there
    are no earlier frames) or ``continuing`` (they are given), or ``whole`` where a layer has no temporal
    taps; ``share`` its largest share of a stage's FLOPs."""

    model: str
    wrapper: str
    kernel: tuple[int, int, int]
    stride: tuple[int, int, int]
    cin: int
    cout: int
    size: tuple[int, int, int]
    front: int
    spatial_pad: tuple[tuple[int, int], tuple[int, int]]
    chunk: str
    calls: int
    share: float
    batch: int = 1

    @property
    def group(self) -> str:
        """``3x3 planes`` at stride 1 in the plane, or ``rest``."""
        return "3x3 planes" if self.kernel[1:] == (3, 3) and self.stride[1:] == (1, 1) else "rest"

    @property
    def out_size(self) -> tuple[int, ...]:
        pads = (self.front, *map(sum, self.spatial_pad))
        return tuple((n + p - k) // s + 1 for n, p, k, s in zip(self.size, pads, self.kernel, self.stride))

    @property
    def gflop(self) -> float:
        """2 per multiply-accumulate, padding counted as data."""
        product = 2e-9 * self.batch * self.cin * self.cout
        for n in (*self.kernel, *self.out_size):
            product *= n
        return product

    def megabytes(self, element_size: int) -> float:
        """Input, earlier frames and weights read once, the output written once."""
        t, h, w = self.size
        earlier = self.front if self.chunk == "continuing" else 0
        elements = self.batch * (self.cin * (t + earlier) * h * w + self.cout * math.prod(self.out_size))
        return (elements + self.cin * self.cout * math.prod(self.kernel)) * element_size / 1e6

    def __str__(self) -> str:
        stride = "" if self.stride == (1, 1, 1) else f"/{''.join(map(str, self.stride))}"
        size = "x".join(map(str, self.size if self.batch == 1 else (self.batch, *self.size)))
        kernel = "".join(map(str, self.kernel))
        return f"{self.model} {self.cin}-{self.cout} {kernel}{stride} {size} {self.chunk}"


def load() -> list[Layer]:
    """All layers at their real sizes, each chunk kind on its own."""
    result = []
    for entry in json.loads(FILE.read_text())["layers"]:
        entry["spatial_pad"] = tuple(map(tuple, entry["spatial_pad"]))
        stages, chunks = entry.pop("stages"), entry.pop("chunks")
        common = {k: tuple(v) if isinstance(v, list) else v for k, v in entry.items()}
        result += [
            Layer(
                **common,
                chunk=chunk,
                calls=sum(s["count"] for s in stages.values()),
                share=max(s["share"] for s in stages.values()),
            )
            for chunk in chunks
        ]
    return result


def scaled(layer: Layer, gflop: float = GFLOP) -> Layer:
    """The same layer on a smaller video. Channels and kernel stay; planes shrink to no less than 32 a side,
    then frames to no fewer than 4 (a chunk of a streamed video), then planes to no less than 8."""
    for least_side, least_frames in ((32, layer.size[0]), (32, 4), (8, 4)):
        frames, *plane = layer.size
        step = 4 * max(layer.stride)
        while layer.gflop > gflop and min(plane) - step >= least_side:
            plane = [n - step for n in plane]
            layer = replace(layer, size=(frames, *plane))
        while layer.gflop > gflop and frames - layer.stride[0] >= least_frames:
            frames -= layer.stride[0]
            layer = replace(layer, size=(frames, *plane))
    return layer


def benchmark_layers(*, quick: bool = False, whole: bool = False) -> list[Layer]:
    """The scaled layers (``whole``: at their real sizes), equal ones of a family of models merged. ``quick``:
    of each family and group the one with the largest share."""
    merged: dict[Layer, Layer] = {}
    for layer in load():
        small = layer if whole and not quick else scaled(layer, QUICK_GFLOP if quick else GFLOP)
        small = replace(small, model=small.model.split("-")[0])
        key = replace(small, calls=0, share=0.0)
        known = merged.get(key)
        merged[key] = (
            small
            if known is None
            else replace(small, calls=known.calls + small.calls, share=max(known.share, small.share))
        )
    layers = sorted(merged.values(), key=lambda x: (x.model, x.group, -x.share))
    if not quick:
        return layers
    return [
        x
        for i, x in enumerate(layers)
        if i == 0 or (x.model, x.group) != (layers[i - 1].model, layers[i - 1].group)
    ]


def representatives(layers: list[Layer]) -> set[Layer]:
    """Of each model and group the layer with the largest share: those that are also measured under
    ``torch.compile``."""
    best: dict[tuple[str, str], Layer] = {}
    for layer in layers:
        key = layer.model, layer.group
        if key not in best or layer.share > best[key].share:
            best[key] = layer
    return set(best.values())
