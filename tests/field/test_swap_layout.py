"""The memory layout of results: code behind a swapped layer that looks at strides finds what PyTorch
gives."""

import copy
import itertools

import pytest
import torch
from support.layouts import strides_of
from torch import nn

import vtok_fast
from vtok_fast import parity
from vtok_fast.models import VidTok
from vtok_fast.swap.layout import is_channels_last

pytestmark = [
    pytest.mark.needs_native,
    pytest.mark.filterwarnings("ignore:.*runs as it was before vtok_fast.accelerate:RuntimeWarning"),
]
LAST = {4: torch.channels_last, 5: torch.channels_last_3d}


class Padded(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv3d(3, 8, 3)

    def forward(self, x):
        return self.conv(nn.functional.pad(x, (1, 1, 1, 1, 2, 0), "replicate"))


LAYERS = {
    "Conv1d": lambda: nn.Conv1d(3, 8, 3, padding=1),
    "Conv2d": lambda: nn.Conv2d(3, 8, 3, padding=1),
    "Conv2d strided": lambda: nn.Conv2d(3, 8, 3, stride=2, padding=1),
    "Conv2d of one channel": lambda: nn.Conv2d(3, 1, 3, padding=1),
    "Conv3d": lambda: nn.Conv3d(3, 8, 3, padding=1),
    "Conv3d 1x1": lambda: nn.Conv3d(3, 8, 1),
    "pad and convolve": Padded,
}


class Head(nn.Module):
    """A stack and what may follow it in anybody's code."""

    def __init__(self, layer, read):
        super().__init__()
        self.layer, self.read = layer, read

    def forward(self, x):
        return self.read(self.layer(x))


READS = {
    "view(B, -1)": lambda h: h.view(h.shape[0], -1),
    "view of groups": lambda h: h.view(h.shape[0], -1, h.shape[1], *h.shape[2:]),
    "flat view": lambda h: h.view(-1),
    "view after an activation": lambda h: nn.functional.silu(h).view(h.shape[0], -1),
    "view of a slice": lambda h: h[:1].view(-1),
    "as_strided": lambda h: h.as_strided((h.shape[0], h[0].numel()), (h[0].numel(), 1)),
    "numpy in place": lambda h: torch.from_numpy(h.detach().numpy().reshape(h.shape[0], -1)),
    "bits": lambda h: h.view(torch.int32).view(h.shape[0], -1).view(torch.float32),
    "resize_": lambda h: h.clone(memory_format=torch.preserve_format).detach().resize_(h.numel()),
    "strides": lambda h: torch.tensor([s for n, s in zip(h.shape, h.stride()) if n > 1]),
}


def sizes(layer):
    dims = next(p.dim() for p in layer.parameters())
    return (2, 3, *(4, 8, 8)[5 - dims :])


@pytest.mark.parametrize("read", READS)
@pytest.mark.parametrize("layer", LAYERS)
def test_code_that_looks_at_strides(layer, read):
    """eladhoffer/convNet.pytorch #22, facebookresearch/SparseConvNet #220, mit-han-lab/temporal-shift-module
    #235, NVIDIA/apex #1284: 'view size is not compatible'. PyTorch's rule: contiguous results for contiguous
    inputs."""
    torch.manual_seed(0)
    model = Head(LAYERS[layer](), READS[read]).eval()
    x = torch.randn(sizes(model.layer))
    with torch.no_grad():
        want = model(x)
        report = vtok_fast.accelerate(model, example=x)
        assert report.swapped and not any("raised" in e.why for e in report.skipped)
        torch.testing.assert_close(model(x), want, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "given", ("contiguous", "channels-last", "permuted", "slice", "slice of channels-last")
)
@pytest.mark.parametrize("weights", ("contiguous", "channels-last"))
@pytest.mark.parametrize("layer", [name for name in LAYERS if name != "Conv1d"])
def test_the_layout_is_pytorchs(layer, weights, given):
    """As above, and for models that are moved to channels-last, which keep it."""
    torch.manual_seed(0)
    net = nn.Sequential(LAYERS[layer]())
    shape = sizes(net)
    if weights == "channels-last":
        net = net.to(memory_format=LAST[len(shape)])
    x = torch.randn(shape)
    if "channels-last" in given:
        x = x.to(memory_format=LAST[len(shape)])
    if given == "permuted":
        x = torch.randn(*shape[:-2], shape[-1], shape[-2]).transpose(-1, -2)
    if "slice" in given:
        x = torch.cat([x, x], -1).to(memory_format=torch.preserve_format)[..., 1:-1]
    with torch.no_grad():
        want = net(x)
        vtok_fast.accelerate(net)
        got = net(x)
    assert strides_of(got) == strides_of(want)
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)


def test_the_rule_is_that_of_pytorch():
    """is_channels_last against PyTorch's own reading, for every order of axes and sizes of 1, 2 and 3."""
    from torch._prims_common import suggest_memory_format

    for dims in (4, 5):
        for shape in itertools.product((1, 2, 3), repeat=dims):
            for order in (
                itertools.permutations(range(dims)) if dims == 4 else [(0, 2, 3, 4, 1), (0, 1, 2, 3, 4)]
            ):
                x = torch.empty([shape[i] for i in order]).permute(*map(order.index, range(dims)))
                want = suggest_memory_format(x) == LAST[dims]
                assert is_channels_last(x) == want, (x.shape, x.stride())


@pytest.mark.parametrize("size", (64, 256))
def test_a_norm_behind_a_convolution_is_as_exact_as_before(size):
    """kijai/ComfyUI-WanVideoWrapper #1339 and #1372 (hunting differences in an autoencoder). PyTorch's
    GroupNorm is less exact on channels-last inputs, the more so the larger they are; within the model's own
    layout the error stays that of the model."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(8, 32, 3, padding=1), nn.GroupNorm(4, 32), nn.SiLU()).eval()
    with torch.no_grad():
        model[0].bias.add_(1.0)
        x = torch.randn(1, 8, size, size)
        ref64, eager = copy.deepcopy(model).double()(x.double()), model(x)
        vtok_fast.accelerate(model)
        fast = model(x)
    error = [parity.relative_errors(y, ref64)["whole"] for y in (fast, eager)]
    assert error[0] <= max(4 * error[1], parity.floor(torch.float32)), error


def results_of(model, x):
    encoded = model.encode(x).latent_dist.mode()
    return encoded, model.decode(encoded).sample


@pytest.mark.parametrize("kind", ("Wan", "CogVideoX", "HunyuanVideo", "Cosmos"))
def test_latents_and_videos_of_autoencoders_can_be_viewed(kind):
    """As above: results of whole models, whose inside stays channels-last."""
    diffusers = pytest.importorskip("diffusers", reason="diffusers is not installed")
    torch.manual_seed(0)
    small = {
        "Wan": lambda: diffusers.AutoencoderKLWan(base_dim=8, z_dim=4, num_res_blocks=1),
        "CogVideoX": lambda: diffusers.AutoencoderKLCogVideoX(
            latent_channels=4, layers_per_block=1, norm_num_groups=4, block_out_channels=(8, 8, 8, 8)
        ),
        "HunyuanVideo": lambda: diffusers.AutoencoderKLHunyuanVideo(
            latent_channels=4, layers_per_block=1, norm_num_groups=4, block_out_channels=(8, 8, 8, 8)
        ),
        "Cosmos": lambda: diffusers.AutoencoderKLCosmos(
            latent_channels=4,
            encoder_block_out_channels=(8, 16),
            decode_block_out_channels=(8, 16),
            num_layers=1,
            attention_resolutions=(8,),
            resolution=32,
            patch_size=2,
            spatial_compression_ratio=4,
            temporal_compression_ratio=4,
        ),
    }
    model, x = small[kind]().eval(), torch.randn(1, 3, 5, 32, 32)
    with torch.no_grad():
        want = results_of(model, x)
        report = vtok_fast.accelerate(model, check=False)
        got = results_of(model, x)
        for y, w in zip(got, want):
            assert y.stride() == w.stride()
            if w.is_contiguous():
                y.view(-1)
        for part, given in ((model.encoder, x), (model.decoder, got[0])):
            y = part(given)
            assert not is_channels_last(y[0] if isinstance(y, tuple) else y)
    assert report.swapped


def test_latents_of_vidtok_can_be_viewed():
    torch.manual_seed(0)
    model, x = VidTok("tiny").eval(), torch.rand(1, 3, 5, 32, 32) * 2 - 1
    with torch.no_grad():
        plain = model.encoder(x), model.decoder(torch.randn(1, 6, 2, 4, 4))
        vtok_fast.accelerate(model, check=False)
        z, y = model.encoder(x), model.decoder(torch.randn(1, 6, 2, 4, 4))
    assert z.stride() == plain[0].stride() and y.stride() == plain[1].stride()
    assert z.is_contiguous() and z.view(z.shape[0], -1).shape[0] == 1


def test_what_a_hook_takes_out_of_a_network_can_be_viewed():
    """A probe on a block of a network, added afterwards, sees the layout that the block gives without
    accelerate()."""
    diffusers = pytest.importorskip("diffusers", reason="diffusers is not installed")
    torch.manual_seed(0)
    model = diffusers.AutoencoderKLWan(base_dim=8, z_dim=4, num_res_blocks=1).eval()
    features = []
    vtok_fast.accelerate(model, check=False)
    for block in model.decoder.up_blocks[0].resnets:
        block.register_forward_hook(lambda m, a, y: features.append(y.view(y.shape[0], -1)))
        block.conv1.register_forward_hook(lambda m, a, y: features.append(y.view(y.shape[0], -1)))
    with torch.no_grad():
        model.decode(torch.randn(1, 4, 2, 4, 4))
    assert len(features) >= 4


class ByView(nn.Module):
    """Somebody's layer in a network, which needs contiguous videos."""

    def __init__(self, base):
        super().__init__()
        self.base = base

    def forward(self, x, *args, **kwargs):
        return self.base(x.view(-1).view(x.shape), *args, **kwargs)


@pytest.mark.parametrize("order", ("before", "after"))
def test_foreign_layers_inside_a_network_get_pytorchs_layout(order):
    diffusers = pytest.importorskip("diffusers", reason="diffusers is not installed")
    torch.manual_seed(0)
    model = diffusers.AutoencoderKLWan(base_dim=8, z_dim=4, num_res_blocks=1).eval()
    z = torch.randn(1, 4, 2, 4, 4)
    with torch.no_grad():
        want = model.decode(z).sample
        if order == "after":
            vtok_fast.accelerate(model, check=False)
            model.decode(z)
        for resnet in model.decoder.up_blocks[0].resnets:
            resnet.conv1 = ByView(resnet.conv1)
        if order == "before":
            model.decoder.mid_block.resnets[0] = ByView(model.decoder.mid_block.resnets[0])
            vtok_fast.accelerate(model, check=False)
        torch.testing.assert_close(model.decode(z).sample, want, rtol=1e-3, atol=1e-4)


def test_training_and_compiling_keep_the_layout():
    torch.manual_seed(0)
    model = Head(
        nn.Sequential(nn.Conv3d(3, 8, 3, padding=1), nn.SiLU(), nn.Conv3d(8, 8, 3, padding=1)),
        READS["view(B, -1)"],
    )
    x = torch.randn(2, 3, 4, 8, 8)
    model(x).sum().backward()
    want = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    vtok_fast.accelerate(model)
    y = torch.compile(model, backend="aot_eager", fullgraph=True)(x)
    y.sum().backward()
    for p, grad in zip(model.parameters(), want):
        assert (p.grad - grad).norm() <= 1e-4 * grad.norm()


BLIND = {
    "activation": nn.functional.silu,
    "arithmetic": lambda h: h * 2 + 1,
    "padding": lambda h: nn.functional.pad(h, (1, 1)),
    "concatenation": lambda h: torch.cat([h, h], 2),
    "RMS norm": lambda h: h * torch.rsqrt(h.pow(2).mean(1, keepdim=True) + 1e-6),
    "channels last": lambda h: (h.movedim(1, -1) * 2).movedim(-1, 1),
    "frames": lambda h: torch.cat([h[:, :, :1], h[:, :, 1:]], 2),
    "upsampling": lambda h: nn.functional.interpolate(h, scale_factor=2.0, mode="nearest"),
}
READING = {
    "view": lambda h: h.view(-1).view(h.shape),
    "view of a result": lambda h: nn.functional.silu(h)[:1].view(-1).view(h.shape),
    "numpy": lambda h: torch.from_numpy(h.detach().numpy()),
    "dlpack": lambda h: torch.from_dlpack(h.detach()),
    "strides": lambda h: h + (0 if h.stride(1) == h[0, 0].numel() else 1),
    "is_contiguous": lambda h: h if h.is_contiguous() else -h,
    "an address": lambda h: h + float(h.data_ptr() == 0),
    "GroupNorm": lambda h: nn.functional.group_norm(h, 4),
    "attention": lambda h: nn.functional.scaled_dot_product_attention(h, h, h),
    "an operator of somebody else": lambda h: torch.ops.aten.clone.default(h),
}


class Between(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.first, self.second, self.function = nn.Conv3d(3, 16, 3, padding=1), nn.Conv3d(16, 4, 1), function

    def forward(self, x):
        return self.second(self.function(self.first(x)))


@pytest.mark.parametrize("example", (True, False), ids=("example", "no example"))
@pytest.mark.parametrize("what", [*BLIND, *READING])
def test_what_an_example_shows_to_be_blind_to_strides_stays_channels_last(what, example):
    """Between two layers of a model that no adapter knows, a result stays channels-last only where the
    example met nothing that may look at strides."""
    torch.manual_seed(0)
    model, x = Between((BLIND | READING)[what]).eval(), torch.randn(1, 3, 4, 8, 8)
    with torch.no_grad():
        want = model(x)
        report = vtok_fast.accelerate(model, **({"example": x} if example else {}))
        handed_on = []
        handle = model.second.register_forward_pre_hook(
            lambda m, args: handed_on.append(is_channels_last(args[0]))
        )
        got = model(x)
        handle.remove()
    assert {e.path for e in report.swapped} == {"first", "second"} and not report.notes
    assert handed_on == [example and what in BLIND]
    assert got.stride() == want.stride()
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)


class Choosing(nn.Module):
    """Two layers, between which the code may look at strides, or not."""

    def __init__(self, choose):
        super().__init__()
        self.first, self.second = nn.Conv3d(3, 16, 3, padding=1), nn.Conv3d(16, 4, 1)
        self.choose, self.flag = choose, False

    def forward(self, x, flag=False):
        h = torch.nn.functional.silu(self.first(x))
        return self.second(self.choose(self, x, h, flag))


def read(h):
    return h.view(h.shape[0], -1).view(h.shape)


CHOICES = {
    "an argument": (lambda m, x, h, flag: read(h) if flag else h, {"flag": True}),
    "a flag": (lambda m, x, h, flag: read(h) if m.flag else h, {}),
    "training": (lambda m, x, h, flag: read(h) if m.training else h, {}),
    "the size": (lambda m, x, h, flag: read(h) if x.shape[2] > 4 else h, {}),
    "a value": (lambda m, x, h, flag: read(h) if bool((x > 3).any()) else h, {}),
    "a loop": (lambda m, x, h, flag: repeated(h, x.shape[2] - 4), {}),
    "an exception": (lambda m, x, h, flag: attempt(m, h), {}),
    "a table": (lambda m, x, h, flag: {False: id, True: read}[flag](h) if flag else h, {"flag": True}),
    "a helper": (lambda m, x, h, flag: helper(h, flag), {"flag": True}),
    "a gradient": (lambda m, x, h, flag: read(h) if h.requires_grad else h, {}),
}


def attempt(model, h):
    try:
        return model.missing
    except AttributeError:
        return read(h) if model.flag else h


def repeated(h, times):
    for _ in range(times):
        h = read(h)
    return h


def helper(h, flag):
    return read(h) if flag else h


@pytest.mark.parametrize("what", CHOICES)
def test_a_branch_that_the_example_did_not_take(what):
    """What another call does with a result no example can show. So only code without branches is followed."""
    torch.manual_seed(0)
    choose, options = CHOICES[what]
    model, x = Choosing(choose).eval(), torch.randn(1, 3, 4, 8, 8)
    plain = copy.deepcopy(model)
    report = vtok_fast.accelerate(model, example=x)
    assert len(report.swapped) == 2
    longer = torch.randn(1, 3, 6, 8, 8)
    longer[0, 0, 0, 0, 0] = 4
    for m in (model, plain):
        m.flag = True
        m.train()
    for given in (x, longer):
        got, want = model(given, **options), plain(given, **options)
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)
        assert got.stride() == want.stride()


@pytest.mark.parametrize("between", ("activation", "arithmetic", "padding", "concatenation"))
@pytest.mark.parametrize("order", ("contiguous first", "channels-last first"))
def test_the_layout_is_that_of_each_call(between, order):
    """An example of one layout, then calls of both, by turns."""
    torch.manual_seed(0)
    model = Between(BLIND[between]).eval()
    plain, x = copy.deepcopy(model), torch.randn(1, 3, 4, 8, 8)
    last = x.to(memory_format=torch.channels_last_3d)
    with torch.no_grad():
        vtok_fast.accelerate(model, example=x if order == "contiguous first" else last)
        for given in (x, last, x, last):
            got, want = model(given), plain(given)
            assert strides_of(got) == strides_of(want)
            torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)


def test_errors_of_layers_in_a_row_add_in_quadrature_and_a_less_exact_layer_is_still_found():
    """kijai/ComfyUI-WanVideoWrapper #1339, as above: the convolution before a norm has no part in what that
    loses on channels-last inputs, so the bound for the whole does not grow with it."""
    torch.manual_seed(0)
    ref64 = torch.randn(64, 64, dtype=torch.float64)
    unit = torch.randn(64, 64, dtype=torch.float64)
    unit *= ref64.norm() / unit.norm()
    eager, inside = (ref64 + 1e-6 * unit).float(), 4e-6
    rounding = parity.relative_errors(ref64.float(), ref64)["whole"]  # of the float32 result itself
    allowed = 2 * (1e-6**2 + inside**2) ** 0.5
    for factor, ok in ((0.95, True), (1.05, False)):
        y = (ref64 + factor * allowed * unit).float()
        measured = parity.close(y, ref64, eager, inside=inside)
        assert measured.ok == ok and abs(measured.bound - allowed) <= 2 * rounding
    assert not parity.close((ref64 + 4e-6 * unit).float(), ref64, eager).ok
