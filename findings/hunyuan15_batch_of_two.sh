#!/usr/bin/env bash
# The VAE of HunyuanVideo 1.5 in diffusers decodes one video at a time.
#
# One would guess: a batch of two latents decodes to two videos, as with the VAE of the first HunyuanVideo.
# What happens: "output with shape [2, 1, 8, 8] doesn't match the broadcast shape [2, 2, 8, 8]". The mask of
# the attention has no dimension for heads, so its batch meets the single head; a batch of one broadcasts.
# enable_slicing() hides it.
#
# Seen with: diffusers 0.42.1, torch 2.13.0 (CPU). Source: huggingface/diffusers pull request #13133, open.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"
python3 -m venv venv
venv/bin/pip install -q --disable-pip-version-check 'torch==2.13.0' 'numpy==2.4.2' 'diffusers==0.42.1'
venv/bin/python - <<'PY'
import torch
from diffusers import AutoencoderKLHunyuanVideo15

torch.manual_seed(0)
torch.set_num_threads(1)
sizes = {"latent_channels": 4, "block_out_channels": (16, 16, 32, 32, 32), "layers_per_block": 1}
model = AutoencoderKLHunyuanVideo15(**sizes)
z = torch.randn(2, 4, 2, 2, 2)
with torch.no_grad():
    print("one video:", tuple(model.decode(z[:1]).sample.shape))
    try:
        model.decode(z)
        raise SystemExit("two videos decode: the behavior has changed")
    except RuntimeError as error:
        print("two videos:", str(error).splitlines()[0])
    model.enable_slicing()
    print("two videos, sliced:", tuple(model.decode(z).sample.shape))
PY
