"""What the check before each swapped call costs: microseconds of the guarded method over a bare one.

    python scripts/time_guard.py benchmarks/runs/guard.json

The block's own work is left out on both sides, so that what is left can be told from noise; least of many.
"""

from __future__ import annotations

import gc
import json
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import diffusers
import torch
from torch import Tensor, nn

from vtok_fast.bench import machine
from vtok_fast.models import VidTok
from vtok_fast.swap.adapters import diffusers_cogvideox, diffusers_wan, vidtok
from vtok_fast.swap.layout import Place
from vtok_fast.swap.patch import Patch


def blocks() -> Iterator[tuple[str, Any, nn.Module, tuple]]:
    wan = diffusers.AutoencoderKLWan(base_dim=8, z_dim=4, dim_mult=[1, 1, 1, 1], num_res_blocks=1)
    small = {"latent_channels": 4, "layers_per_block": 1, "norm_num_groups": 4}
    cog = diffusers.AutoencoderKLCogVideoX(**small, block_out_channels=(8, 8, 8, 8))
    x, z = torch.randn(1, 8, 1, 2, 2), torch.randn(1, 4, 1, 2, 2)
    own = VidTok("tiny").decoder.mid.block_1
    yield "WanResidualBlock", diffusers_wan, wan.decoder.mid_block.resnets[0], (x,)
    yield "VidTok ResnetBlock", vidtok, own, (torch.randn(1, own.conv1.conv.in_channels, 1, 2, 2),)
    yield "CogVideoXResnetBlock3D", diffusers_cogvideox, cog.decoder.mid_block.resnets[0], (x, None, z)


def least(function: Callable[..., Any], args: tuple, loops: int = 500, repeats: int = 200) -> float:
    times = []
    gc.disable()
    for _ in range(repeats):
        start = time.perf_counter()
        for _ in range(loops):
            function(*args)
        times.append((time.perf_counter() - start) / loops)
    gc.enable()
    return min(times) * 1e6


def first(result: Any) -> Tensor:
    return (result[0] if isinstance(result, tuple) else result).contiguous()


@torch.no_grad()
def main(file: str) -> None:
    torch.set_num_threads(1)
    found: dict[str, Any] = {"machine": machine.describe(), "us": {}}
    for name, adapter, block, args in blocks():
        block.eval()
        swap = next(s for s in adapter.propose(block) if s.attribute == "forward")
        result = first(swap.function(block, *args))
        bare = lambda module, *args, **kwargs: result  # noqa: B023, E731
        for place in (Place.INSIDE, Place.ANYWHERE):
            patch = Patch(block, replace(swap, function=bare), place=place)
            patch.install()
            block(*args)
            spent = least(block.forward, args) - least(bare.__get__(block), args)
            patch.remove()
            found["us"][f"{name}, {place.name.lower()}"] = round(spent, 2)
    Path(file).write_text(json.dumps(found, indent=1) + "\n")
    print(json.dumps(found["us"], indent=1))


if __name__ == "__main__":
    main(sys.argv[1])
