"""`vtok_fast.models` imports a system when it is asked for, and no other."""

from __future__ import annotations

import subprocess
import sys

import pytest

from vtok_fast import models

PROGRAM = """
import sys
import torch
from vtok_fast.commands.load_model import load_model
from vtok_fast.swap import accelerate
model = load_model("vidtok/tiny")
accelerate(model, check=False)
model.encode(torch.zeros(1, 3, 17, 32, 32))
print(*sys.modules)
"""


def test_the_packaged_model_needs_no_compiler():
    """torch._dynamo, with sympy and the rest of it, takes as long to import as all of torch before it."""
    done = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, check=True)
    loaded = set(done.stdout.split())
    assert "vtok_fast.models.vidtok.model" in loaded
    assert not loaded & {"torch._dynamo", "sympy", "triton", "torchvision", "vtok_fast.models.tivtok"}


def test_every_name_is_there():
    for name in models.__all__:
        assert getattr(models, name).__module__.startswith("vtok_fast.models.")
    assert set(models.SYSTEMS) == {getattr(models, name).system for name in models.SYSTEMS.values()}
    for folder, name in models.SYSTEMS.items():
        assert getattr(getattr(models, folder), name) is getattr(models, name)
    assert {*models.__all__, *models.SYSTEMS} <= set(dir(models))
    with pytest.raises(AttributeError, match="no attribute 'Nobody'"):
        _ = models.Nobody
