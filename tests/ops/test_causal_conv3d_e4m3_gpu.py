"""The Hopper convolution with operands of e4m3 on a GPU that has it, against float64 on the same operands."""

import copy

import pytest
import torch

import vtok_fast
from vtok_fast import parity
from vtok_fast.models import VidTok
from vtok_fast.ops.causal_conv3d import causal_conv3d, e4m3, launch, op
from vtok_fast.ops.causal_conv3d.call import ConvCall, Geometry
from vtok_fast.reference import e4m3 as reference

REASON = (
    launch.why_not_machine(torch.empty(0, device="cuda")) if torch.cuda.is_available() else "there is no GPU"
)
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(REASON is not None, reason=str(REASON))]
LAST = torch.channels_last_3d


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("kernel", [(3, 3, 3), (1, 3, 3)], ids=str)
@pytest.mark.parametrize(
    "channels, outputs, size",
    [(128, 128, (5, 64, 64)), (512, 512, (3, 32, 32)), (80, 104, (3, 17, 23))],
    ids=str,
)
def test_layers(channels, outputs, size, kernel, dtype):
    """A step of 32 products keeps 13 bits below the largest of what it adds, as others have measured, and no
    sum on the way is larger than the last, on average: so the relative error is at most 2^-13 for each step,
    and half an eps of the output's dtype."""
    g = torch.Generator(device="cuda").manual_seed(0)
    x, weight = (
        torch.randn(shape, generator=g, device="cuda").to(dtype)
        for shape in ((1, channels, *size), (outputs, channels, *kernel))
    )
    call = ConvCall(
        x.contiguous(memory_format=LAST), weight, geometry=Geometry(pad=(kernel[0] - 1, 0, 1, 1, 1, 1))
    )
    scale = e4m3.Scales().of(call)
    y = e4m3.forward(call, scale)
    wide = call._replace(
        x=reference.rounded(x.double(), scale),
        weight=reference.rounded(weight.double(), reference.scale_of_weight(weight)),
    )
    steps = kernel[0] * 9 * -(-channels // 32)
    bound = steps * 2.0**-13 + torch.finfo(dtype).eps / 2
    errors = parity.relative_errors(y, op.run_reference(wide))
    assert max(errors.values()) <= bound, errors


def test_a_graph_replays_with_new_values():
    x = torch.randn(1, 64, 3, 32, 32, device="cuda", dtype=torch.bfloat16).contiguous(memory_format=LAST)
    weight = torch.randn(64, 64, 3, 3, 3, device="cuda", dtype=torch.bfloat16)

    def run():
        with e4m3.Scales() as scales:
            y = causal_conv3d(x, weight)
        assert scales.ran
        return y

    run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = run()
    x.mul_(100)
    graph.replay()
    assert torch.equal(y, run())


@torch.no_grad()
def test_a_model():
    model = VidTok("tiny").eval().cuda().bfloat16()
    video = torch.rand(1, 3, 5, 64, 64, device="cuda", dtype=torch.bfloat16) * 2 - 1
    eager = copy.deepcopy(model)(video)
    report = vtok_fast.accelerate(model, example=video, contract="fast")
    assert any(e.contract == "fast" for e in report.swapped) and report.psnr is not None, report
    assert type(model(video)) is type(eager)
