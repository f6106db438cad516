"""The oldest Triton that is promised: every kernel compiles with it (slow, it must be there), and calls only
what it has (always)."""

from __future__ import annotations

import ast
import inspect
import json
import os
import re
import subprocess
import sys
from importlib import metadata

import pytest

pytest.importorskip("triton")

from support.triton_every import every  # noqa: E402
from support.triton_harness import ROOT  # noqa: E402

OLDEST = {"torch": "2.6", "triton": "3.2.0"}  # the Triton that this torch comes with
OLDEST_TRITON = ROOT / ".venv" / f".triton-{OLDEST['triton']}"  # put there by `make oldest-triton`
# What the kernels use of triton.language, as the oldest one has it: the parameters of functions, "*" before
# one that takes any number of values; types have None.
HAS = {
    "abs": "x",
    "arange": "start end",
    "atomic_or": "pointer val mask sem scope",
    "cdiv": "x div",
    "constexpr": None,
    "cumsum": "input axis reverse",
    "div_rn": "x y",
    "dot": "input other acc input_precision allow_tf32 max_num_imprecise_acc out_dtype",
    "exp": "x",
    "exp2": "x",
    "floor": "x",
    "full": "shape value dtype",
    "histogram": "input num_bins",
    "inline_asm_elementwise": "asm constraints args dtype is_pure pack",
    "load": "pointer mask other boundary_check padding_option cache_modifier eviction_policy volatile",
    "log2": "x",
    "max": "input axis return_indices return_indices_tie_break_left keep_dims",
    "maximum": "x y propagate_nan",
    "minimum": "x y propagate_nan",
    "num_programs": "axis",
    "program_id": "axis",
    "range": "arg1 arg2 step num_stages loop_unroll_factor",
    "reshape": "input *shape can_reorder",
    "rsqrt": "x",
    "sqrt_rn": "x",
    "static_range": "arg1 arg2 step",
    "store": "pointer value mask boundary_check cache_modifier eviction_policy",
    "sum": "input axis keep_dims",
    "trans": "input *dims",
    "where": "condition x y",
    "zeros": "shape dtype",
    "zeros_like": "input",
} | dict.fromkeys(("bfloat16", "float16", "float32", "float64", "int32", "int64", "uint32", "uint8"))


def too_new(source: str) -> list[str]:
    """What a kernel's source uses of ``tl`` that the oldest Triton lacks."""
    tree = ast.parse(source)

    def name_of(node: ast.AST) -> str | None:
        direct = isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name)
        return node.attr if direct and node.value.id == "tl" else None

    found = [f"tl.{name}" for node in ast.walk(tree) if (name := name_of(node)) and name not in HAS]
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call) or not HAS.get(name := name_of(node.func)):
            continue
        known = HAS[name].split()
        any_number = any(parameter.startswith("*") for parameter in known)
        found += [f"tl.{name}({k.arg}=)" for k in node.keywords if k.arg and k.arg not in known]
        found += [f"tl.{name} of {len(node.args)}"] * (len(node.args) > len(known) and not any_number)
    return found


def test_kernels_call_what_the_oldest_triton_has():
    for path in sorted((ROOT / "kernels").glob("*.py")):
        assert not too_new(path.read_text()), path.name


@pytest.mark.parametrize(
    "code, why",
    (
        ("tl.histogram(x, 256, mask=m)", "tl.histogram(mask=)"),
        ("tl.histogram(x, 256, m)", "tl.histogram of 3"),
        ("tl.make_tensor_descriptor(x, [1], [1], [1])", "tl.make_tensor_descriptor"),
        ("tl.range(0, n, warp_specialize=True)", "tl.range(warp_specialize=)"),
    ),
)
def test_what_is_newer_is_found(code, why):
    assert too_new(code) == [why]


def test_the_promise_is_what_is_tested():
    project, pinned = (ROOT / name for name in ("pyproject.toml", "requirements-dev.txt"))
    assert f'"torch>={OLDEST["torch"]}"' in project.read_text()
    newest = re.search(r"^triton==([\d.]+)", pinned.read_text(), re.M)[1]
    assert metadata.version("triton") == newest
    assert f"triton=={OLDEST['triton']}" in (ROOT / "Makefile").read_text()
    assert "test-all: setup oldest-triton" in (ROOT / "Makefile").read_text()


def with_oldest(*command: str) -> str:
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join(map(str, (OLDEST_TRITON, ROOT, ROOT / "tests"))),
        "OMP_NUM_THREADS": "1",
    }
    done = subprocess.run([sys.executable, *command], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@pytest.mark.slow
@pytest.mark.skipif(not OLDEST_TRITON.is_dir(), reason="make oldest-triton fetches it")
def test_every_kernel_compiles_with_the_oldest_triton():
    """That of the oldest torch that is promised; the other tests have the newest."""
    said = with_oldest(str(ROOT / "tests" / "support" / "triton_every.py"), "90").splitlines()
    assert len(said) == len(every(90)) and all(f"Triton {OLDEST['triton']}" in line for line in said)


def parameters(functions: list[str]) -> dict[str, str]:
    """As `HAS` has them, of the Triton that is imported."""
    import triton.language as tl

    found = {}
    for name in functions:
        function = getattr(tl, name)
        of = inspect.signature(getattr(function, "fn", function)).parameters.values()
        stars = {p.name: "*" * (p.kind is p.VAR_POSITIONAL) for p in of if not p.name.startswith("_")}
        found[name] = " ".join(star + name for name, star in stars.items())
    return found


@pytest.mark.slow
@pytest.mark.skipif(not OLDEST_TRITON.is_dir(), reason="make oldest-triton fetches it")
def test_that_is_what_it_has():
    functions = [name for name, known in HAS.items() if known]
    code = "import json\nfrom ops.test_triton_oldest import parameters\nprint(json.dumps(parameters({})))"
    assert json.loads(with_oldest("-c", code.format(functions))) == {name: HAS[name] for name in functions}
    import_them = f"import triton.language as tl\n[getattr(tl, name) for name in {list(HAS)}]"
    with_oldest("-c", import_them)
