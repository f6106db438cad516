"""The general rule, for any library: torch's own convolutions, and modules that pad their input and then
convolve it.

Such a module holds one convolution (or is one, with a ``forward`` of its own) and no other parameters. What
it pads is not guessed
from names: a small copy of it is run with kernels of a single one on inputs whose every element is its own
address, which shows for each place of the padded input where it comes from. If one rule explains all of it,
also for a single frame, and the op then gives the module's results for random weights, the module is swapped;
else it is named with the reason.
"""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Callable, Sequence
from operator import itemgetter
from typing import Any

import torch
from torch import Tensor, nn

from vtok_fast.dispatch.backends import Reason
from vtok_fast.reference import causal_conv3d as reference
from vtok_fast.swap.adapters.layers import Answer
from vtok_fast.swap.adapters.padding import MODES, Rule, exact, virtual
from vtok_fast.swap.guard import why_weights
from vtok_fast.swap.patch import Skip, Swap, described

_PLAIN = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
FILLS = ("zeros", "replicate", "reflect")
_SIMPLE = (bool, int, float, str, tuple, list, type(None))
_KERNEL_LIMIT = 343  # taps; each is one small run


def propose(module: nn.Module) -> Answer:
    kind = type(module)
    if kind in _PLAIN:
        return _propose_plain(module)
    conv = _only_conv(module)
    if conv is None:
        return None
    if why := why_weights(conv, sharded=True):
        return Skip(why)
    rule = find_rule(module, conv)
    if isinstance(rule, str):
        return Skip(f"pads or convolves in a way of its own: {rule}")
    as_found = Settings(module, conv)
    copies_for_nothing = not any(
        map(any, rule.pads)
    )  # only there can copies be saved without touching the convolution
    return [
        Swap(
            f"conv with virtual padding {rule.pads}",
            _forward(virtual, rule, as_found),
            sample=lambda m: _sample(_only_conv(m)),
            contiguous=True,
            exact=_forward(exact, rule, as_found) if copies_for_nothing else None,
        )
    ]


# ---- torch's own -------------------------------------------------------------------------------------------


def _propose_plain(module: nn.Module) -> list[Swap] | Skip:
    if why := _why_not_plain(module):
        return Skip(why)
    frames = ", frame by frame" if type(module) is nn.Conv2d else ""
    return [Swap(f"conv with virtual padding{frames}", plain_forward, sample=_sample, contiguous=True)]


def _why_not_plain(conv: nn.Module) -> Reason:
    if conv.padding_mode not in MODES:
        return f"padding_mode {conv.padding_mode!r} has no kernel"
    if conv.padding == "same" and max(conv.stride) > 1:
        return "padding 'same' with a stride"
    if "_conv_forward" in conv.__dict__:
        return "its _conv_forward was replaced"
    return None


def plain_forward(conv: nn.Module, input: Tensor) -> Tensor | Skip:
    """``forward`` of ``nn.Conv1d``, ``2d`` or ``3d`` by ``causal_conv3d``, with or without a batch
    dimension."""
    if why := _why_not_plain(conv):
        return Skip(why)
    missing = conv.weight.dim() - input.dim()
    if missing == 1:
        return virtual(conv, input.unsqueeze(0), own_rule(conv)).squeeze(0)
    return Skip(f"its input has {input.dim()} axes") if missing else virtual(conv, input, own_rule(conv))


def own_rule(conv: nn.Module) -> Rule:
    """The rule of a convolution's own ``padding`` and ``padding_mode``."""
    mode = MODES[conv.padding_mode]
    if isinstance(conv.padding, str):
        spans = [d * (k - 1) for d, k in zip(conv.dilation, conv.kernel_size)]
        return Rule(
            tuple((0, 0) if conv.padding == "valid" else (s // 2, s - s // 2) for s in spans), mode, mode
        )
    return Rule(tuple((p, p) for p in conv.padding), mode, mode)


def _sample(conv: nn.Module) -> tuple[Tensor]:
    reach = _reach(conv)
    size = [max(n, r) for n, r in zip((4, 10, 14)[-len(reach) :], reach)]
    batch = 1 if len(size) == 3 else 3
    return (torch.randn(batch, conv.in_channels, *size, dtype=conv.weight.dtype, device=conv.weight.device),)


def _reach(conv: nn.Module) -> list[int]:
    return [d * (k - 1) + 1 for d, k in zip(conv.dilation, conv.kernel_size)]


# ---- modules that pad and convolve -------------------------------------------------------------------------


def _forward(run: Callable[..., Tensor], rule: Rule, as_found: Settings) -> Callable[..., Any]:
    def forward(module: nn.Module, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        if args or kwargs:
            return Skip(f"it was called with {', '.join(kwargs) or 'more arguments'}")
        conv = module if isinstance(module, _PLAIN) else next(iter(module._modules.values()))
        if x.dim() != conv.weight.dim():
            return Skip(f"its input has {x.dim()} axes")
        if not as_found.are_those_of(module, conv):
            return Skip("its settings were changed since")
        return run(conv, x, rule)

    return forward


def _only_conv(module: nn.Module) -> nn.Module | None:
    """The convolution that a module consists of: itself, or its only child; None where there is more to
    it."""
    children = [m for m in module._modules.values() if m is not None]
    if isinstance(module, _PLAIN):
        conv = module if not children else None
    elif (
        len(children) == 1
        and isinstance(children[0], _PLAIN)
        and not module._parameters
        and not module._buffers
    ):
        conv = children[0] if not children[0]._modules else None
    else:
        conv = None
    if conv is None or set(conv._parameters) != {"weight", "bias"} or conv._buffers or conv.weight is None:
        return None
    return conv


class Settings:
    """The plain values among the attributes of modules, each of which their classes may read at each call."""

    def __init__(self, *modules: nn.Module):
        self._values = _plain_values(modules)
        self._fast = [self._reader(m) for m in modules]

    @staticmethod
    def _reader(module: nn.Module) -> tuple[Callable[[dict], Any], Any, int]:
        names = [name for name, value in module.__dict__.items() if _is_setting(name, value)]
        get = itemgetter(*names) if names else lambda attributes: None
        return get, copy.deepcopy(get(module.__dict__)), Settings._size(module)

    @staticmethod
    def _size(module: nn.Module) -> int:
        return len(module.__dict__) - ("forward" in module.__dict__)

    def are_those_of(self, *modules: nn.Module) -> bool:
        """Whether these modules, or copies of them, have the values still."""
        if torch.compiler.is_dynamo_compiling():
            return _plain_values(modules) == self._values
        try:
            return all(
                get(m.__dict__) == values and self._size(m) == size
                for m, (get, values, size) in zip(modules, self._fast)
            )
        except KeyError:
            return False


def _plain_values(modules: Sequence[nn.Module]) -> dict[tuple[int, str], Any]:
    return {
        (i, name): tuple(value) if isinstance(value, list) else value
        for i, m in enumerate(modules)
        for name, value in m.__dict__.items()
        if _is_setting(name, value)
    }


def _is_setting(name: str, value: Any) -> bool:
    return name not in ("training", "_is_full_backward_hook") and isinstance(value, _SIMPLE)


def find_rule(module: nn.Module, conv: nn.Module) -> Rule | str:
    """The padding rule of a module around its only convolution, found by running small copies of it; or why
    there is none."""
    if math.prod(conv.kernel_size) > _KERNEL_LIMIT:
        return f"its kernel has more than {_KERNEL_LIMIT} taps"
    for hooks in ("_forward_hooks", "_forward_pre_hooks"):
        if conv is not module and getattr(conv, hooks):
            return "its convolution has hooks"
    try:
        with torch.random.fork_rng(devices=[]), torch.no_grad():
            torch.manual_seed(0)
            return _search(module, conv)
    except Exception as error:  # foreign code on inputs that it may not be made for
        return f"running a small copy raised {described(error)}"


def _search(module: nn.Module, conv: nn.Module) -> Rule | str:
    reach = _reach(conv)
    # Large enough that a reflection does not show the middle again; two, because a stride can leave the last
    # pad unread.
    sizes = [tuple(2 * r + extra + i for i, r in enumerate(reach)) for extra in (1, 2)]
    seen = [_read_padded(module, conv, size) for size in sizes]
    if any(v is None for v in seen):
        return "it does more than to pad and convolve"
    pads = []
    for axis in range(len(reach)):
        spans = []
        for size, values in zip(sizes, seen):
            center = tuple(n // 2 for n in size)
            place = (values == _addresses(size)[center]).nonzero()
            if len(place) != 1:
                return "an element inside is not seen exactly once"
            front = int(place[0, axis]) - center[axis]
            spans.append((front, max(values.shape[axis] - front - size[axis], 0)))
        if spans[0][0] != spans[1][0] or spans[0][0] < 0:
            return "the padding in front depends on the size, or crops"
        pads.append((spans[0][0], max(back for _, back in spans)))
    rules = [
        Rule(tuple(pads), *modes)
        for modes in itertools.product(FILLS if len(pads) == 3 else ("zeros",), FILLS)
    ]
    rule = next(
        (r for r in rules if all(_explains(r, size, values) for size, values in zip(sizes, seen))), None
    )
    if rule is None:
        return "no single padding mode per axis explains it"
    return _why_not(module, conv, rule, sizes) or rule


def _addresses(size: Sequence[int]) -> Tensor:
    return torch.arange(1.0, math.prod(size) + 1, dtype=torch.float64).view(size)


def _read_padded(module: nn.Module, conv: nn.Module, size: Sequence[int]) -> Tensor | None:
    """The padded input that a module's convolution sees: the address of each element, 0 where a zero was
    put."""
    padded = None
    for tap in itertools.product(*map(range, conv.kernel_size)):
        weight = torch.zeros(1, 1, *conv.kernel_size, dtype=torch.float64)
        weight[(0, 0, *tap)] = 1
        y = _run(_small(module, conv, weight, None), _addresses(size)[None, None])
        if y is None:
            return None
        y = y[0, 0]
        if padded is None:
            padded = y.new_zeros([r + s * (n - 1) for r, s, n in zip(_reach(conv), conv.stride, y.shape)])
        places = [torch.arange(n) * s + t * d for n, s, t, d in zip(y.shape, conv.stride, tap, conv.dilation)]
        padded[torch.meshgrid(*places, indexing="ij")] = y
    return padded


def _small(module: nn.Module, conv: nn.Module, weight: Tensor, bias: Tensor | None) -> nn.Module:
    """A copy of a module whose convolution has this small weight in place of its own; without hooks."""
    memo: dict[int, Any] = {id(conv.weight): nn.Parameter(weight)}
    if conv.bias is not None:
        memo[id(conv.bias)] = nn.Parameter(
            torch.zeros(weight.shape[0], dtype=weight.dtype) if bias is None else bias
        )
    small = copy.deepcopy(module, memo)
    for m in small.modules():
        m._forward_hooks.clear()
        m._forward_pre_hooks.clear()
        m.__dict__.pop("forward", None)
    inner = _only_conv(small)
    inner.in_channels, inner.out_channels, inner.groups = weight.shape[1], weight.shape[0], 1
    return small


def _run(small: nn.Module, x: Tensor) -> Tensor | None:
    """What a small copy gives, if that is a tensor and the copy stays as it is; else None."""
    before = [dict(m.__dict__) for m in small.modules()]
    y = small(x)
    after = [m.__dict__ for m in small.modules()]
    same = all(b.keys() == a.keys() and all(b[k] is a[k] for k in b) for b, a in zip(before, after))
    return y if same and isinstance(y, Tensor) and y.dim() == x.dim() and y.dtype == x.dtype else None


def _explains(rule: Rule, size: Sequence[int], seen: Tensor) -> bool:
    filled = 3 - len(size)
    pads = ((0, 0),) * filled + rule.pads
    lengths, modes = (1,) * filled + tuple(size), (rule.time_mode, rule.mode, rule.mode)
    if any(mode == "reflect" and max(pad) >= n for mode, pad, n in zip(modes, pads, lengths)):
        return False
    x = _addresses(size)[(None, None) + (None,) * filled]
    expected = reference.padded_input(
        x, time_pad=pads[0], spatial_pad=pads[1:], time_mode=rule.time_mode, spatial_mode=rule.mode
    )
    expected = expected[0, 0].view(expected.shape[2 + filled :])
    return torch.equal(expected[tuple(slice(n) for n in seen.shape)], seen)


def _why_not(module: nn.Module, conv: nn.Module, rule: Rule, sizes: Sequence[Sequence[int]]) -> Reason:
    """Compares the module with the op on random weights and inputs, training and not, one frame included;
    None if they agree."""
    weight = torch.randn(2, 2, *conv.kernel_size, dtype=torch.float64)
    bias = torch.randn(2, dtype=torch.float64) if conv.bias is not None else None
    for size, training in itertools.product((*sizes, (1, *sizes[0][1:])), (False, True)):
        small = _small(module, conv, weight, bias).train(training)
        x = torch.randn(2, 2, *size, dtype=torch.float64)
        try:
            expected = _run(small, x)
        except RuntimeError:
            expected = None  # too small an input for it
        try:
            y = virtual(_only_conv(small), x, rule)
        except ValueError:
            y = None
        equal = (
            y is expected is None
            or y is not None
            and expected is not None
            and y.shape == expected.shape
            and torch.allclose(y, expected, 1e-10, 1e-10)
        )
        if not equal:
            return f"an input of size {tuple(size)} does not follow the rule that others show"
    return None
