"""What surrounds the convolution's launches on a GPU: threads that have done nothing there yet, several
threads at once, a second device, CUDA graphs of forward and backward. Each on the Hopper kernels and on those
for every GPU."""

import threading

import pytest
import torch

from vtok_fast.dispatch import backends, native
from vtok_fast.ops.causal_conv3d import causal_conv3d, gradient, launch, sm80, sm90
from vtok_fast.ops.causal_conv3d.call import ConvBackwardCall, ConvCall, Geometry

HERE = torch.cuda.is_available()
REASON = native.why_no_cuda(torch.empty(0, device="cuda")) if HERE else "there is no GPU"
WHY_NOT_HOPPER = launch.why_not_machine(torch.empty(0, device="cuda")) if HERE else "there is no GPU"
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(REASON is not None, reason=str(REASON))]
BF16 = torch.bfloat16
LAST = torch.channels_last_3d
GEOMETRY = Geometry(pad=(2, 0, 1, 1, 1, 1))


@pytest.fixture(
    params=[
        "sm80",
        pytest.param(
            "sm90", marks=pytest.mark.skipif(WHY_NOT_HOPPER is not None, reason=str(WHY_NOT_HOPPER))
        ),
    ]
)
def backend(request):
    with backends.backend(request.param):
        yield request.param


def drawn(channels=64, outputs=64, size=(3, 16, 16), device="cuda"):
    g = torch.Generator(device=device).manual_seed(0)
    x = torch.randn(1, channels, *size, generator=g, device=device).to(BF16).contiguous(memory_format=LAST)
    weight = (torch.randn(outputs, channels, 3, 3, 3, generator=g, device=device) / 40).to(BF16)
    return x, weight.contiguous(memory_format=LAST)


def forward(backend, x, weight):
    call = ConvCall(x, weight, geometry=GEOMETRY)
    return (sm90 if backend == "sm90" else sm80).forward(call, call.empty_output())


def backward(backend, x, weight, grad):
    call = ConvBackwardCall(grad, x, weight, None, GEOMETRY, (True, True, False, False))
    return gradient.run_cuda(call, hopper=backend == "sm90")


def in_a_thread(function):
    found = []

    def run():
        try:
            result = function()
            torch.cuda.synchronize()
            found.append((result, None))
        except Exception as error:
            found.append((None, error))

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    if found[0][1] is not None:
        raise found[0][1]
    return found[0][0]


def test_the_first_call_of_a_thread(backend):
    """Plans are known and weights read in place: nothing binds a context to the thread but the launcher."""
    x, weight = drawn()
    y, grads = forward(backend, x, weight), backward(backend, x, weight, x)
    torch.cuda.synchronize()
    assert torch.equal(in_a_thread(lambda: forward(backend, x, weight)), y)
    cold = in_a_thread(lambda: backward(backend, x, weight, x))
    assert all(a is b is None or torch.equal(a, b) for a, b in zip(cold, grads))


def test_autograd_comes_first(backend):
    """In a fresh process, so that autograd's own thread is cold."""
    import subprocess
    import sys

    program = f"""
import torch
from vtok_fast.dispatch import backends
from vtok_fast.ops.causal_conv3d import causal_conv3d
last = torch.channels_last_3d
x = torch.randn(1, 64, 3, 16, 16, device="cuda").bfloat16().contiguous(memory_format=last)
w = (torch.randn(64, 64, 3, 3, 3, device="cuda") / 40).bfloat16().requires_grad_()
g = torch.randn_like(x).contiguous(memory_format=last)
with backends.backend("{backend}"):
    causal_conv3d(x, w).backward(g)
torch.cuda.synchronize()
assert w.grad.isfinite().all()
"""
    subprocess.run([sys.executable, "-c", program], check=True, timeout=120)


def test_two_threads_with_two_shapes_of_one_tile(backend):
    """Different amounts of shared memory for one kernel, a thousand times."""
    wide, narrow = drawn(64, 128, (2, 24, 24)), drawn(128, 128, (5, 9, 13))
    want = [forward(backend, *shape) for shape in (wide, narrow)]
    torch.cuda.synchronize()
    errors = []
    barrier = threading.Barrier(2)

    def rounds(shape, expected):
        try:
            stream = torch.cuda.Stream()
            with torch.cuda.stream(stream):
                for i in range(1000):
                    barrier.wait(timeout=60)
                    y = forward(backend, *shape)
                    if i % 100 == 0:
                        assert torch.equal(y, expected)
            stream.synchronize()
        except Exception as error:
            errors.append(error)
            barrier.abort()

    threads = [threading.Thread(target=rounds, args=pair) for pair in zip((wide, narrow), want)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors, errors


@pytest.mark.skipif(not HERE or torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_the_second_device(backend):
    """While the first is the current one."""
    x, weight = drawn()
    far = [t.to("cuda:1") for t in (x, weight)]
    if backend == "sm90" and (reason := launch.why_not_machine(far[0])):
        pytest.skip(reason)
    with torch.cuda.device(0):
        y = forward(backend, *far)
        grads = backward(backend, *far, far[0])
    assert y.device.index == 1 and torch.equal(y.cpu(), forward(backend, x, weight).cpu())
    same = backward(backend, x, weight, x)
    assert all(a is b is None or torch.equal(a.cpu(), b.cpu()) for a, b in zip(grads, same))
    assert torch.cuda.current_device() == 0


def test_a_graph_of_forward_and_backward(backend):
    x, weight = drawn()
    want = forward(backend, x, weight), *backward(backend, x, weight, x)[:2]
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = forward(backend, x, weight), *backward(backend, x, weight, x)[:2]
    for t in found:
        t.fill_(torch.nan)
    for _ in range(3):
        graph.replay()
    torch.cuda.synchronize()
    assert all(torch.equal(f, w) for f, w in zip(found, want))


def test_a_graph_through_autograd(backend):
    x, weight = drawn()
    leaf = weight.clone().requires_grad_()

    def step():
        return torch.autograd.grad(causal_conv3d(x, leaf, time_pad=(2, 0)).sum(), leaf)[0]

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        want = step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = step()
    graph.replay()
    torch.cuda.synchronize()
    assert torch.equal(found, want)
