"""The line that people paste into a program with a pipeline of diffusers."""

import pytest
import torch

import vtok_fast

pytest.importorskip("diffusers", reason="diffusers is not installed")
from diffusers import AutoencoderKLWan, DiffusionPipeline, WanPipeline


def vae():
    torch.manual_seed(0)
    return AutoencoderKLWan(
        base_dim=8, z_dim=4, dim_mult=[1, 1, 1, 1], num_res_blocks=1, temperal_downsample=[False, True, True]
    ).eval()


class Pipeline(DiffusionPipeline):
    def __init__(self, vae=None, other=None):
        super().__init__()
        self.register_modules(vae=vae, other=other)


PIPELINES = {
    "own": lambda vae: Pipeline(vae, torch.nn.Conv3d(4, 4, 3)),
    "Wan": lambda vae: WanPipeline(None, None, vae, scheduler=None),
}


@pytest.mark.needs_native
@pytest.mark.parametrize("make", PIPELINES.values(), ids=PIPELINES)
def test_the_vae_of_a_pipeline_is_accelerated(make):
    pipe = make(model := vae())
    x = torch.rand(1, 3, 5, 16, 16, generator=torch.Generator().manual_seed(0)) * 2 - 1
    with torch.no_grad():
        eager = pipe.vae.decode(pipe.vae.encode(x).latent_dist.mode()).sample
    report = vtok_fast.accelerate(pipe)
    assert pipe.vae is model and report.ok and report.swapped and report.model == "AutoencoderKLWan"
    assert f"Of the pipeline {type(pipe).__name__}, its vae was accelerated" in str(report)
    assert vtok_fast.accelerate(pipe.vae).swapped == []  # the same module, already accelerated
    with torch.no_grad():
        fast = pipe.vae.decode(pipe.vae.encode(x).latent_dist.mode()).sample
    assert (fast - eager).norm() < 1e-4 * eager.norm() and sum(report.ran().values()) > 0
    report.revert()
    assert "forward" not in pipe.vae.encoder.conv_in.__dict__
    if hasattr(pipe, "other"):
        assert "forward" not in pipe.other.__dict__


def test_a_pipeline_without_a_vae_is_refused():
    with pytest.raises(TypeError, match="the pipeline Pipeline has no vae to accelerate, got NoneType"):
        vtok_fast.accelerate(Pipeline())


def test_what_only_looks_like_a_pipeline_is_none():
    class DiffusionPipeline:
        vae = torch.nn.Conv3d(4, 4, 3)

    with pytest.raises(TypeError, match="model: expected an nn.Module, got DiffusionPipeline"):
        vtok_fast.accelerate(DiffusionPipeline())
