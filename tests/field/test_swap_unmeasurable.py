"""What accelerate() cannot measure does not end it: such a module is left alone with the reason, or swapped
and right."""

import copy
import threading
from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
import torch.nn.utils.prune
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.utils import parametrizations

import vtok_fast

pytestmark = [
    pytest.mark.needs_native,
    pytest.mark.filterwarnings("ignore:.*weight_norm:FutureWarning"),
    pytest.mark.filterwarnings("ignore:.*runs as it was before vtok_fast.accelerate:RuntimeWarning"),
]


def reasons(report):
    return " | ".join(f"{e.path}: {e.why}" for e in report.skipped)


def same_as_before(model, x, **options):
    """accelerate() gives a report, and the model's result is what it was; returns the report."""
    model.eval()
    want = model(x)
    report = vtok_fast.accelerate(model, **options)
    torch.testing.assert_close(model(x), want, rtol=1e-4, atol=1e-5)
    report.revert()
    assert torch.equal(model(x), want)
    return report


# ---- weights that are not plain ----------------------------------------------------------------------------

NORMS = {
    "weight_norm": torch.nn.utils.weight_norm,
    "spectral_norm": torch.nn.utils.spectral_norm,
    "parametrized weight_norm": parametrizations.weight_norm,
    "parametrized spectral_norm": parametrizations.spectral_norm,
    "pruned": lambda m: torch.nn.utils.prune.l1_unstructured(m, "weight", 0.5),
}


@pytest.mark.parametrize("given", (False, True), ids=("random inputs", "example"))
@pytest.mark.parametrize("trained", (False, True), ids=("new", "trained"))
@pytest.mark.parametrize("conv", (nn.Conv1d, nn.Conv2d, nn.Conv3d))
@pytest.mark.parametrize("norm", NORMS)
def test_weights_made_before_each_call(norm, conv, trained, given):
    """pytorch/pytorch #28594 and #102981, descriptinc/descript-audio-codec #81, huggingface/diffusers #10347:
    RuntimeError about graph leaves from code that copies such layers."""
    torch.manual_seed(0)
    model = nn.Sequential(NORMS[norm](conv(4, 8, 3, padding=1)), nn.SiLU(), conv(8, 4, 3, padding=1))
    x = torch.randn(2, 4, *(5,) * (model[2].weight.dim() - 2))
    if trained:
        model.train()(x).sum().backward()
    report = same_as_before(model, x, **({"example": x} if given else {}))
    assert "2" in [e.path for e in report.swapped] and "0" not in [e.path for e in report.swapped]
    assert any(e.path.startswith("0") and e.why for e in report.skipped), report


class Scaled(torch.Tensor):
    """A quantized weight: int8 values and a scale behind a tensor of the original's shape and dtype, as the
    quantization libraries keep it."""

    @staticmethod
    def __new__(cls, values, scale):
        return torch.Tensor._make_wrapper_subclass(cls, values.shape, dtype=scale.dtype, device=values.device)

    def __init__(self, values, scale):
        self.values, self.scale = values, scale

    @classmethod
    def of(cls, weight):
        scale = weight.detach().abs().amax() / 127
        return cls((weight.detach() / scale).round().to(torch.int8), scale)

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        whole = torch.utils._pytree.tree_map(
            lambda t: t.values.to(t.scale.dtype) * t.scale if isinstance(t, cls) else t, (args, kwargs or {})
        )
        if function is torch.ops.aten.detach.default:
            return args[0]
        return function(*whole[0], **whole[1])


def quantized(conv):
    conv.weight = nn.Parameter(Scaled.of(conv.weight), requires_grad=False)
    return conv


@pytest.mark.parametrize("when", ("before", "after"))
@pytest.mark.parametrize("conv", (nn.Conv2d, nn.Conv3d))
def test_quantized_weights(conv, when):
    """pytorch/ao #2286, huggingface/diffusers #9177: weights that are tensors of a class of their own."""
    torch.manual_seed(0)
    model = nn.Sequential(conv(4, 8, 3, padding=1), nn.SiLU(), conv(8, 4, 3, padding=1)).eval()
    x = torch.randn(1, 4, *(5,) * (model[2].weight.dim() - 2))
    with torch.no_grad():
        if when == "before":
            quantized(model[0])
            report = same_as_before(model, x)
            assert "weight is a Scaled, which no kernel takes" in reasons(report)
        else:
            report = vtok_fast.accelerate(model)
            model(x)
            quantized(model[0])
            got = model(x)
            assert "0" in report.bypassed
            report.revert()
            torch.testing.assert_close(got, model(x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("check", (True, False))
def test_meta(check):
    """huggingface/accelerate #3617, huggingface/diffusers #7448, kijai/ComfyUI-FluxTrainer #190: a model
    without data cannot be measured. 'unknown device type for autocast' was the error."""
    diffusers = pytest.importorskip("diffusers", reason="diffusers is not installed")
    with torch.device("meta"):
        model = nn.Sequential(nn.Conv3d(3, 4, 3, padding=1), nn.Conv2d(4, 4, 3))
        vae = diffusers.AutoencoderKLWan(base_dim=8, z_dim=4, num_res_blocks=1)
    report = vtok_fast.accelerate(model, check=check)
    assert [e.why for e in report.skipped] == ["its weights are on the meta device"] * 2
    report = vtok_fast.accelerate(vae, check=check)
    assert "weights are on the meta device" in reasons(report)
    z = torch.randn(1, 4, 2, 4, 4, device="meta")
    assert vae.decode(z).sample.is_meta


def test_moved_to_meta_afterwards():
    """As above, after accelerate()."""
    model = nn.Sequential(nn.Conv3d(3, 4, 3, padding=1))
    vtok_fast.accelerate(model)
    model(torch.randn(1, 3, 3, 8, 8))
    assert model.to("meta")(torch.randn(1, 3, 3, 8, 8, device="meta")).shape == (1, 4, 3, 8, 8)


@pytest.mark.parametrize("dtype", (torch.float8_e4m3fn, torch.float8_e5m2, torch.complex64), ids=str)
@pytest.mark.parametrize("check", (True, False))
def test_weights_in_a_dtype_without_kernels(dtype, check):
    """huggingface/diffusers #9177 (fp8 storage): NotImplementedError normal_kernel_cpu came out of
    accelerate()."""
    model = nn.Sequential(nn.Conv3d(3, 4, 3, padding=1)).to(dtype)
    report = vtok_fast.accelerate(model, check=check)
    name = str(dtype).removeprefix("torch.")
    assert {e.why for e in report.skipped} == {f"its weights are {name}, which no kernel takes"}


@pytest.mark.parametrize("convolution", (nn.Conv2d, nn.Conv3d))
def test_fake_tensors_are_not_measured(convolution):
    """Nothing runs under a fake mode, so there is nothing to time or to compare; the swap is installed."""
    with FakeTensorMode():
        model = nn.Sequential(convolution(3, 4, 3, padding=1))
        x = torch.randn(2, 3, *(8,) * (convolution(1, 1, 1).weight.dim() - 2))
        report = vtok_fast.accelerate(model, example=x)
        assert model(x).shape == (2, 4, *x.shape[2:])
    assert [entry.error for entry in report.swapped] == [None] and "Nothing was measured" in report.notes[0]
    report.revert()
    assert "forward" not in vars(model[0])


def test_lazy_weights():
    """Weights that have no shape yet."""
    model = nn.Sequential(nn.LazyConv3d(4, 3), nn.Conv3d(4, 4, 1))
    report = vtok_fast.accelerate(model)
    assert [e.path for e in report.swapped] == ["1"] and model(torch.randn(1, 2, 4, 4, 4)).shape[1] == 4


# ---- modules that cast by hand -----------------------------------------------------------------------------


class CastConv(nn.Conv3d):
    """Weights kept in half, cast to whatever comes in."""

    def forward(self, x):
        return F.conv3d(x, self.weight.to(x.dtype), self.bias.to(x.dtype), padding=1)


class WideConv(nn.Conv3d):
    """Computes in float32, returns what came in."""

    def forward(self, x):
        return super().forward(x.float()).to(x.dtype)


class CastInside(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv3d(4, 4, 3, padding=1)

    def forward(self, x):
        return F.conv3d(x, self.conv.weight.to(x), self.conv.bias.to(x), padding=1)


@pytest.mark.parametrize("x_dtype", (torch.float32, torch.bfloat16, torch.float16, torch.float64), ids=str)
@pytest.mark.parametrize(
    "kind,w_dtype",
    [("wide", torch.float32)]  # which does not run in another one
    + [(k, d) for k in ("cast", "inside") for d in (torch.float32, torch.bfloat16, torch.float16)],
    ids=str,
)
def test_weights_cast_by_hand(kind, w_dtype, x_dtype):
    """deepbeepmeep/Wan2GP #71, pkuliyi2015/multidiffusion-upscaler-for-automatic1111 #359,
    huggingface/diffusers
    #12501: 'Input type and bias type should be the same' from a module whose forward takes any dtype."""
    torch.manual_seed(0)
    module = {
        "cast": lambda: CastConv(4, 4, 3),
        "wide": lambda: WideConv(4, 4, 3, padding=1),
        "inside": CastInside,
    }[kind]()
    model, x = nn.Sequential(module).to(w_dtype).eval(), torch.randn(1, 4, 3, 8, 8).to(x_dtype)
    with torch.no_grad():
        want = model(x)
        vtok_fast.accelerate(model)
        got = model(x)
    assert got.dtype == want.dtype
    eps = max(torch.finfo(d).eps for d in (x_dtype, w_dtype, torch.float32))
    # The floor of the contract close, in the coarsest of the types.
    assert (got.double() - want.double()).norm() <= 16 * eps * want.double().norm()


# ---- outputs and models of any kind ------------------------------------------------------------------------


class Body(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv3d(3, 4, 3, padding=1)


@dataclass
class Sample:
    sample: torch.Tensor
    extra: str = "text"


class Slots:
    __slots__ = ("sample",)

    def __init__(self, sample):
        self.sample = sample


class Distribution:
    def __init__(self, y):
        self.mean, self.std, self.me = y, y.exp(), self  # refers to itself


OUTPUTS = {
    "dataclass": lambda y: Sample(y),
    "slots": lambda y: Slots(y),
    "object": lambda y: Distribution(y),
    "dataclass of an object": lambda y: Sample(Distribution(y)),
    "dict": lambda y: {"a": {"b": [y]}},
    "dict of other keys": lambda y: {str(y.dtype): y},
    "list": lambda y: [y, None, 3],
    "None": lambda y: None,
    "a number": lambda y: float(y.double().sum()),
    "text": lambda y: "done",
    "generator": lambda y: (v for v in (y,)),
}


@pytest.mark.parametrize("output", OUTPUTS)
def test_outputs_of_any_class(output):
    """openvinotoolkit/openvino #37551, huggingface/diffusers #560, sgl-project/sglang #15393: 'max() arg is
    an empty sequence' for a plain dataclass. What holds tensors is compared, else there is a note."""

    class Model(Body):
        def forward(self, x):
            return OUTPUTS[output](self.conv(x))

    torch.manual_seed(0)
    report = vtok_fast.accelerate(Model().eval(), example=torch.randn(1, 3, 3, 8, 8))
    assert [e.path for e in report.swapped] == ["conv"]
    if output in ("dict of other keys", "None", "a number", "text", "generator"):
        assert report.end_to_end is None and "not measured end to end" in report.notes[0]
        assert report.notes[0] in str(report) and report.to_dict()["notes"] == report.notes
    else:
        assert 0 < report.end_to_end.error <= report.end_to_end.bound


LAYOUTS = {
    "sparse": lambda y: y.flatten(1).to_sparse(),
    "sparse CSR": lambda y: y.flatten(1).to_sparse_csr(),
    "nested": lambda y: torch.nested.nested_tensor([y[0, 0], y[0, 1, :1]]),
    "a dictionary with a sparse one": lambda y: {"dense": y, "sparse": y.to_sparse()},
}


@pytest.mark.filterwarnings("ignore:.*(Sparse CSR|nested tensors).*:UserWarning")
@pytest.mark.parametrize("inside", (False, True), ids=("of the model", "between its parts"))
@pytest.mark.parametrize("layout", LAYOUTS)
def test_results_that_are_not_strided(layout, inside):
    class Model(Body):
        def forward(self, x):
            y = LAYOUTS[layout](self.conv(x))
            if not inside:
                return y
            y = y["sparse"] if isinstance(y, dict) else y
            return torch.nested.to_padded_tensor(y, 0.0) if y.is_nested else y.to_dense()

    torch.manual_seed(0)
    report = vtok_fast.accelerate(Model().eval(), example=torch.randn(1, 3, 3, 8, 8))
    assert [e.path for e in report.swapped] in (
        ["conv"],
        [""],
    )  # with what is around it, where that is nothing
    assert inside or report.end_to_end is None and "not measured end to end" in " ".join(report.notes)


def test_complex_results_are_measured_as_pairs_of_numbers():
    class Model(Body):
        def forward(self, x):
            return torch.fft.fftn(self.conv(x), dim=(3, 4)).conj()

    torch.manual_seed(0)
    report = vtok_fast.accelerate(Model().eval(), example=torch.randn(1, 3, 3, 8, 8))
    assert 0 < report.end_to_end.error <= report.end_to_end.bound and not report.end_to_end.why

    class Rounded(Model):  # what is wrong is taken out
        def forward(self, x):
            y = super().forward(x)
            return y if "forward" not in vars(self.conv) else y * (1 + 1e-3j)

    report = vtok_fast.accelerate(Rounded().eval(), example=torch.randn(1, 3, 3, 8, 8))
    assert not report.ok and not report.swapped and not report.end_to_end.why


def test_a_layer_whose_output_cannot_be_compared_is_left_alone():
    class Told(nn.Conv3d):
        def forward(self, x):
            return {"y": super().forward(x)}

    report = vtok_fast.accelerate(nn.Sequential(Told(3, 4, 3)))
    assert not report.swapped and report.skipped[0].why


class Upcasting(Body):
    def forward(self, x):
        return self.conv(x.to(torch.float32))


class Locked(Body):
    def __init__(self):
        super().__init__()
        self.lock = threading.Lock()

    def forward(self, x):
        with self.lock:
            return self.conv(x)


class WithGraph(Body):
    def forward(self, x):
        return self.conv(x) + self.last

    def __init__(self):
        super().__init__()
        self.last = nn.Parameter(torch.ones(1)) * 2  # not a leaf: cannot be copied


class Refusing(Body):
    def forward(self, x):
        if x.dtype == torch.float64:
            raise NotImplementedError("no double precision here")
        return self.conv(x)


class ByNumpy(Body):
    def forward(self, x):
        return torch.from_numpy(self.conv(x).detach().float().numpy())


@pytest.mark.parametrize("kind", (Upcasting, Locked, WithGraph, Refusing, ByNumpy))
def test_models_without_a_copy_or_without_float64(kind):
    """huggingface/diffusers #12501 and #13316 (casts by hand), descriptinc/descript-audio-codec #81 (copies):
    what is raised is only what the model itself raises on the example."""
    torch.manual_seed(0)
    model, x = kind().eval(), torch.randn(1, 3, 3, 8, 8)
    report = same_as_before(model, x, example=x)
    assert [e.path for e in report.swapped] == ["conv"]
    if kind is not ByNumpy:
        assert report.end_to_end is None and "a float64 copy of the model raised" in report.notes[0]


def test_what_the_model_raises_is_raised():
    class Broken(Body):
        def forward(self, x):
            raise KeyError("of the model")

    model = Broken()
    with pytest.raises(KeyError, match="of the model"):
        vtok_fast.accelerate(model, example=torch.randn(1))
    assert "forward" not in model.conv.__dict__


def test_modules_that_no_adapter_expects():
    """Classes that have a known base or a known shape and then something else."""

    class NoInit(nn.Conv3d):
        def __init__(self):
            nn.Module.__init__(self)

    class Raising(nn.Conv2d):
        @property
        def weight(self):
            raise RuntimeError("not now")

        @weight.setter
        def weight(self, value):
            pass

    class Uncopied(nn.Conv2d):
        def __deepcopy__(self, memo):
            raise TypeError("never copied")

    model = nn.ModuleList([NoInit(), Uncopied(3, 4, 3), nn.Conv2d(3, 4, 3), nn.Identity()])
    report = vtok_fast.accelerate(model)
    assert [e.path for e in report.swapped] == ["2"], report
    scripted = torch.jit.script(nn.Sequential(nn.Conv2d(3, 4, 3)))
    assert not vtok_fast.accelerate(scripted).swapped


def test_a_family_of_shared_and_empty_modules():
    conv = nn.Conv3d(3, 3, 1)
    model = nn.Sequential(conv, conv, nn.Sequential(), nn.ModuleDict({"again": conv}))
    report = vtok_fast.accelerate(model)
    assert [e.path for e in report.swapped] == ["0"]
    report.revert()
    assert "forward" not in conv.__dict__


@pytest.mark.parametrize(
    "conv,shape",
    [
        (nn.Conv1d(3, 4, 3), (0, 3, 8)),
        (nn.Conv2d(3, 4, 3, padding=1), (0, 3, 8, 8)),
        (nn.Conv3d(3, 4, 3, padding=1), (0, 3, 4, 8, 8)),
    ],
    ids=str,
)
def test_empty_batches(conv, shape):
    """pytorch/pytorch #12013, #38115, #19599: a batch of nothing has a result and zero gradients."""
    model, x = nn.Sequential(conv), torch.zeros(shape, requires_grad=True)
    want = model(x).shape
    vtok_fast.accelerate(model)
    y = model(x)
    y.sum().backward()
    assert y.shape == want and conv.weight.grad.abs().sum() == 0 and x.grad.shape == x.shape


def test_sharded_weights():
    """Weights in shards are whole only while they are used: they cannot be measured, and a model that is
    accelerated first is right."""
    import torch.distributed as dist

    if not dist.is_available():
        pytest.skip("this torch has no torch.distributed")
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Replicate, distribute_tensor
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=1)
    try:
        mesh = init_device_mesh("cpu", (1,))
        model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 1))
        early = copy.deepcopy(model)
        vtok_fast.accelerate(early)
        for net in (model, early):
            for name in ("weight", "bias"):
                whole = getattr(net[0], name).detach()
                setattr(net[0], name, nn.Parameter(distribute_tensor(whole, mesh, [Replicate()])))
        report = vtok_fast.accelerate(model)
        assert [e.path for e in report.swapped] == ["1"] and "sharded (DTensor)" in reasons(report)
        x = distribute_tensor(torch.randn(1, 3, 8, 8), mesh, [Replicate()])
        torch.testing.assert_close(early[0](x).full_tensor(), model[0](x).full_tensor())
    finally:
        dist.destroy_process_group()
