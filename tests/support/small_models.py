"""Models of several libraries, small, with random weights, by name. Needs diffusers."""

from __future__ import annotations

import diffusers

from vtok_fast.models import Cosmos, ProMAG, VidTok

SMALL = {
    "latent_channels": 4,
    "layers_per_block": 1,
    "norm_num_groups": 4,
    "block_out_channels": (8, 8, 8, 8),
}
MAKERS = {
    "Wan": lambda: diffusers.AutoencoderKLWan(
        base_dim=8,
        z_dim=4,
        dim_mult=[1, 1, 1, 1],
        num_res_blocks=1,
        latents_mean=[0.0] * 4,
        latents_std=[1.0] * 4,
    ),
    "CogVideoX": lambda: diffusers.AutoencoderKLCogVideoX(**SMALL),
    "HunyuanVideo": lambda: diffusers.AutoencoderKLHunyuanVideo(**SMALL),
    "diffusers' VidTok": lambda: diffusers.AutoencoderVidTok(
        ch=32, ch_mult=[1, 1], z_channels=4, num_res_blocks=1
    ),
    "VidTok": lambda: VidTok("tiny"),
    "Cosmos": lambda: Cosmos("tiny"),
    "ProMAG": lambda: ProMAG("tiny"),
}
