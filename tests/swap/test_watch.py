"""The one pass that compares a module with an earlier look: natively and in Python alike, every kind of
change is seen, and nothing else is taken for one."""

import copy
import enum
from collections import OrderedDict

import pytest
import torch
from torch import nn

from vtok_fast.dispatch import native
from vtok_fast.swap.watch import CALLED, HOOKS, PythonWatch, Tree, look

WATCHES = {"Python": PythonWatch} | ({"native": native.lib().Watch} if native.lib() else {})


class Mode(enum.Enum):
    UP = 1
    DOWN = 2


class Layer(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3, padding="same")
        self.norm, self.none = nn.GroupNorm(2, 4), None
        self.register_module("absent", None)
        self.mode, self.eps, self.sizes, self.object, self.kept = Mode.UP, 1e-6, [1, 2], Body(), 1
        self.pair = (1, (2.5, "x"))

    def forward(self, x):
        return self.norm(self.conv(x))


class Body:
    pass


def swapped_forward(self, x):
    return x


CHANGES = {
    "a class": lambda m: setattr(m.conv, "__class__", type("Other", (nn.Conv2d,), {})),
    "its own class": lambda m: setattr(m, "__class__", type("Other", (Layer,), {})),
    "a child": lambda m: setattr(m, "conv", nn.Identity()),
    "a child that was absent": lambda m: setattr(m, "absent", nn.Identity()),
    "one more child": lambda m: setattr(m, "more", nn.Identity()),
    "a hook": lambda m: m.conv.register_forward_hook(lambda *a: None),
    "a pre-hook": lambda m: m.norm.register_forward_pre_hook(lambda *a: None),
    "a backward hook": lambda m: m.norm.register_full_backward_hook(lambda *a: None),
    "a dictionary of hooks": lambda m: m.conv.__dict__.update(_forward_hooks=OrderedDict({1: print})),
    "a dictionary of hooks by setattr": lambda m: setattr(m.conv, "_forward_pre_hooks", {1: print}),
    "a forward": lambda m: setattr(m.conv, "forward", print),
    "an enumeration": lambda m: setattr(m, "mode", Mode.DOWN),
    "a number": lambda m: setattr(m, "eps", 1e-5),
    "twice a number": lambda m: (setattr(m, "eps", 1e-5 * m.eps), setattr(m, "eps", 1e-5 * m.eps)),
    "a number of a part": lambda m: setattr(m.norm, "eps", 1e-3),
    "a pair": lambda m: setattr(m, "pair", (1, (2.5, "y"))),
    "an element of a list": lambda m: m.sizes.__setitem__(1, 3),
    "a longer list": lambda m: m.sizes.append(3),
    "another object's class": lambda m: setattr(m, "object", nn.Identity),
    "something for None": lambda m: setattr(m, "none", 1),
    "a setting of a convolution": lambda m: setattr(m.conv, "stride", (2, 2)),
    "a list of a convolution": lambda m: m.conv._reversed_padding_repeated_twice.__setitem__(0, 5),
    "a weight's class": lambda m: m.conv._parameters.__setitem__("weight", torch.ones(4, 3, 3, 3)),
    "no bias": lambda m: setattr(m.conv, "bias", None),
    "one more weight": lambda m: m.norm.register_parameter("more", nn.Parameter(torch.ones(1))),
    "a deleted attribute": lambda m: delattr(m, "pair"),
}
NO_CHANGES = {
    "nothing": lambda m: None,
    "training": lambda m: m.train(not m.training),
    "ignored": lambda m: setattr(m, "kept", 2),
    "data": lambda m: m.conv.weight.data.add_(1),
    "another weight": lambda m: setattr(m.conv, "weight", nn.Parameter(torch.ones(4, 3, 3, 3))),
    "a number of the same object": lambda m: setattr(m, "eps", m.eps),
    "a hook on itself": lambda m: m.register_forward_hook(lambda *a: None),
    "a hook that is gone": lambda m: m.conv.register_forward_hook(lambda *a: None).remove(),
    "an order of attributes and back": lambda m: (delattr(m.norm, "eps"), setattr(m.norm, "eps", 1e-5)),
}


def seen(kind, hooks=()):
    layer = Layer()
    tree = Tree([(), ("conv",), ("norm",), ("absent",)])
    node = look(layer, tree, ("forward",), frozenset((*HOOKS, "kept")))
    return layer, WATCHES[kind](node, hooks, torch.Tensor.dtype)


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("kind", WATCHES)
def test_a_change_is_seen(kind, change):
    layer, watch = seen(kind)
    for _ in range(3):
        assert watch.same(layer, torch.float32) is True
    CHANGES[change](layer)
    for _ in range(3):
        assert watch.same(layer, torch.float32) is False


@pytest.mark.parametrize("change", NO_CHANGES)
@pytest.mark.parametrize("kind", WATCHES)
def test_what_is_no_change(kind, change):
    layer, watch = seen(kind)
    NO_CHANGES[change](layer)
    same = watch.same(layer, torch.float32)
    # The keys are compared in their order: such a change is looked into, and is then none.
    assert same is (change != "an order of attributes and back")


@pytest.mark.parametrize("kind", WATCHES)
def test_dtypes(kind):
    layer, watch = seen(kind)
    assert watch.same(layer, torch.bfloat16) is None and watch.same(layer, None) is None
    layer.norm.bfloat16()
    assert watch.same(layer, torch.float32) is None
    layer.bfloat16()
    assert watch.same(layer, torch.bfloat16) is True


@pytest.mark.parametrize("name", CALLED)
@pytest.mark.parametrize("kind", WATCHES)
def test_functions_of_classes(kind, name, monkeypatch):
    """Of the class itself, and of any of its bases."""
    for owner in (nn.Conv2d, nn.modules.conv._ConvNd, nn.Module):
        layer, watch = seen(kind)
        assert watch.same(layer, torch.float32)
        shown = owner is nn.Conv2d or not any(
            name in base.__dict__ for base in nn.Conv2d.__mro__[: nn.Conv2d.__mro__.index(owner)]
        )
        with monkeypatch.context() as patch:
            patch.setattr(owner, name, lambda *a: None, raising=False)
            assert watch.same(layer, torch.float32) is not shown
        assert watch.same(layer, torch.float32)


@pytest.mark.parametrize("kind", WATCHES)
def test_one_look_serves_copies_and_hooks_of_all_modules(kind):
    hooks = ({}, {})
    layer, watch = seen(kind, hooks)
    other = copy.deepcopy(layer)
    assert watch.same(layer, torch.float32) and watch.same(other, torch.float32)
    other.conv.register_forward_hook(lambda *a: None)
    assert watch.same(layer, torch.float32) and not watch.same(other, torch.float32)
    hooks[1][0] = print
    assert watch.same(layer, torch.float32) is False


@pytest.mark.parametrize("kind", WATCHES)
def test_it_keeps_no_module_alive(kind):
    import gc
    import weakref

    layer, watch = seen(kind)
    alive = [weakref.ref(m) for m in layer.modules()] + [weakref.ref(p) for p in layer.parameters()]
    del layer
    gc.collect()
    assert not any(ref() is not None for ref in alive) and watch is not None


@pytest.mark.needs_native
@pytest.mark.parametrize("given", [(), (1,), ((), {}, None), ((), (), 3), ([], (), torch.Tensor.dtype)])
def test_bad_arguments(given):
    with pytest.raises(TypeError):
        native.lib().Watch(*given)
    layer, watch = seen("native")
    for wrong in ((), (layer,), (layer, None, None)):
        with pytest.raises(TypeError, match="expected a module and a dtype"):
            watch.same(*wrong)
    assert watch.same(3, torch.float32) is False
    with pytest.raises(TypeError):
        native.lib().Watch.__new__(native.lib().Watch).same(layer, None)
