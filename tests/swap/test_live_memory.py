"""The memory that a report gives: tensors made by a call, at their highest."""

import pytest
import torch
import torch.nn.functional as F

from vtok_fast.swap.live_memory import peak_bytes

MIB = 2**20
pytestmark = pytest.mark.volatile
X = torch.zeros(1024, 256)  # 1 MiB


@pytest.mark.parametrize(
    "function, mebibytes",
    [
        (lambda x: x + 1, 1),
        (lambda x: x.relu_(), 0),
        (lambda x: x.view(-1), 0),
        (lambda x: (x + 1).mul(2).add(3), 2),
        (lambda x: [x.clone() for _ in range(4)], 4),
        (lambda x: x.t().contiguous(), 1),
        (lambda x: F.silu(x + 1, inplace=True), 1),
    ],
)
def test_what_lives_at_the_same_time_counts(function, mebibytes):
    with torch.no_grad():
        assert peak_bytes(function, X.clone()) == mebibytes * MIB


def test_what_autograd_keeps_counts():
    assert peak_bytes(lambda x: x.exp().exp().exp(), X.clone().requires_grad_()) == 3 * MIB


def test_an_exception_passes():
    with pytest.raises(ZeroDivisionError):
        peak_bytes(lambda x: x / (1 // 0), X)
    assert peak_bytes(lambda x: x + 1, X) == MIB
