"""What a long-running program meets: many threads at once, a fork after use, memory that runs out in the
middle of an op."""

import multiprocessing
import subprocess
import sys
import textwrap
import threading

import pytest
import torch

import vtok_fast
from vtok_fast import Scope

pytestmark = pytest.mark.volatile
HANGS = 1800  # seconds after which a process is held to hang: what takes one or two, on the busiest machine
LINUX = pytest.mark.skipif(sys.platform != "linux", reason="needs Linux")


def calls(seed: int) -> list[torch.Tensor]:
    """Something of every op, large enough for more than one thread."""
    g = torch.Generator().manual_seed(seed)
    x, weight = torch.randn(1, 16, 4, 24, 24, generator=g), torch.randn(16, 16, 3, 3, 3, generator=g) / 20
    q = torch.randn(1, 2, 48, 16, generator=g)
    scores = torch.rand(2, 400, generator=g)
    keep = vtok_fast.select_tokens(scores, vtok_fast.token_budget(scores, 0.4))
    packed = vtok_fast.pack_tokens(torch.randn(2, 8, 400, generator=g), keep)
    return [
        vtok_fast.causal_conv3d(x, weight, time_mode="replicate", activation="silu"),
        vtok_fast.causal_conv3d(x, weight[..., :1, :1]),
        vtok_fast.norm_act(x, kind="group", groups=4),
        vtok_fast.norm_act(x, activation="silu"),
        vtok_fast.fsq_quantize(x, (3,) * 16).indices,
        vtok_fast.scope_attention(q, q, q, Scope.block_causal(4, 12)),
        packed.values,
        vtok_fast.unpack_tokens(packed),
    ]


def same(a: list[torch.Tensor], b: list[torch.Tensor]) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


@pytest.fixture
def two_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def test_threads_that_call_ops_at_once_do_not_disturb_each_other(two_threads):
    expected, found, errors = {seed: calls(seed) for seed in range(8)}, {}, []

    def work(seed: int) -> None:
        try:
            torch.set_num_threads(2)  # a setting of each thread, where OpenMP keeps it so
            results = [calls(seed) for _ in range(4)]
            found[seed] = all(same(r, expected[seed]) for r in results)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in expected]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors and found == dict.fromkeys(expected, True)


def test_results_do_not_depend_on_the_number_of_threads():
    """Other tests run on one thread. Here are as many as share the work, and more than there is work for."""
    assert torch.get_num_threads() == 1
    expected = calls(0)
    for threads in (2, 3, 16):
        torch.set_num_threads(threads)
        for i, (found, one) in enumerate(zip(calls(0), expected, strict=True)):
            torch.testing.assert_close(found, one, msg=lambda text: f"call {i}, {threads} threads: {text}")
            assert i not in (4, 6, 7) or torch.equal(found, one), (i, threads)  # indices, and rows that move


def native_calls(seed: int) -> list[torch.Tensor]:
    """Of every native kernel, so small that torch's own operations do not start threads: those hang in a
    child by themselves."""
    g = torch.Generator().manual_seed(seed)
    x, weight = torch.randn(1, 8, 3, 24, 24, generator=g), torch.randn(8, 8, 3, 3, 3, generator=g) / 20
    keep = torch.rand(2, 400, generator=g) < 0.5
    packed = vtok_fast.pack_tokens(torch.randn(2, 8, 400, generator=g), keep)
    return [
        vtok_fast.causal_conv3d(x, weight, backend="cpu"),
        vtok_fast.causal_conv3d(x, weight[:, :, :, :1, :1], backend="cpu"),
        vtok_fast.norm_act(x, kind="group", groups=4, backend="cpu"),
        vtok_fast.fsq_quantize(x, (3,) * 8, backend="cpu").indices,
        packed.values,
        vtok_fast.unpack_tokens(packed),
    ]


def _child(queue, expected) -> None:
    queue.put(same(native_calls(3), expected))


@LINUX
@pytest.mark.needs_native
@pytest.mark.filterwarnings("ignore:.*fork.*")
def test_a_child_forked_after_use_computes_the_same(two_threads):
    expected = native_calls(3)
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    child = context.Process(target=_child, args=(queue, expected))
    child.start()
    child.join(HANGS)
    hung = child.is_alive()
    if hung:
        child.kill()
    assert not hung, "the child waits for threads that only its parent has"
    assert child.exitcode == 0 and queue.get(timeout=HANGS)
    assert same(native_calls(3), expected)  # nor does the parent notice


OUT_OF_MEMORY = textwrap.dedent("""
    import gc, resource, sys
    import torch, vtok_fast
    from vtok_fast.dispatch import native
    from vtok_fast.ops.causal_conv3d.call import Geometry

    torch.set_num_threads(int(sys.argv[2]))
    x = torch.randn(1, 256, 2, 12, 12).contiguous(memory_format=torch.channels_last_3d)
    w = torch.randn(256, 256, 3, 3, 3)
    small, smaller = torch.randn(1, 8, 2, 9, 9), torch.randn(8, 8, 3, 3, 3)
    before = vtok_fast.causal_conv3d(small, smaller), vtok_fast.norm_act(small)
    out = torch.empty(1, 256, 2, 12, 12, memory_format=torch.channels_last_3d)

    def field(name):
        with open("/proc/self/status") as status:
            return next(int(line.split()[1]) for line in status if line.startswith(name))

    geometry = Geometry(pad=(2, 0, 1, 1, 1, 1)).native()

    def conv():
        a = native.arg
        algorithm = {"winograd": 4, "direct": 1}[sys.argv[1]]
        native.lib().causal_conv3d(
            a(x), a(w), None, None, None, a(out), geometry, None, False, algorithm, native.threads()
        )

    resource.setrlimit(resource.RLIMIT_AS, (field("VmSize") * 1024 + (1 << 20), resource.RLIM_INFINITY))
    failed, resident = 0, []
    for i in range(60):
        try:
            conv()
        except MemoryError:
            failed += 1
        gc.collect()
        resident.append(field("RssAnon") + field("VmSwap"))  # of files, the system takes pages back at will
    resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    assert failed == 60, f"{failed} of 60 calls failed"
    assert resident[-1] - resident[9] < 1024, f"grown from {resident[9]} to {resident[-1]} KiB"
    after = vtok_fast.causal_conv3d(small, smaller), vtok_fast.norm_act(small)
    assert all(torch.equal(a, b) for a, b in zip(before, after))
    conv()
    want = vtok_fast.causal_conv3d(x, w, backend="reference")
    truth = vtok_fast.causal_conv3d(x.double(), w.double(), backend="reference")
    assert vtok_fast.parity.close(out, truth, want).ok
    print("survived")
""")


@LINUX
@pytest.mark.needs_native
@pytest.mark.parametrize(
    "algorithm,threads",
    [
        ("winograd", 2),
        *(
            pytest.param(*case, marks=pytest.mark.slow)
            for case in (("winograd", 1), ("direct", 1), ("direct", 2))
        ),
    ],
)
def test_memory_that_runs_out_in_an_op_is_an_error_and_no_leak(algorithm, threads):
    result = subprocess.run(
        [sys.executable, "-c", OUT_OF_MEMORY, algorithm, str(threads)],
        capture_output=True,
        text=True,
        timeout=HANGS,
    )
    assert result.returncode == 0 and "survived" in result.stdout, result.stderr[-2000:]
