"""The golden files of the official code, and that the checker would notice a difference."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

TESTS = Path(__file__).resolve().parents[1]
from support import golden  # noqa: E402

FOLDERS = [
    TESTS / "golden_data",
    Path(os.environ.get("VTOK_FAST_GOLDEN", TESTS.parents[1] / "shared" / "golden")),
]
PREFIXES = ("vidtok_", "cosmos_", "infotok_")  # of the files' names, by system
FILES = {
    path.name: path
    for folder in reversed(FOLDERS)
    for path in sorted(folder.glob("*.safetensors"))
    if path.name.startswith(PREFIXES)
}
CONV = "vidtok_causal_conv.safetensors"


@pytest.mark.parametrize(
    "name", sorted(FILES) or [pytest.param("none", marks=pytest.mark.skip("no golden files found"))]
)
def test_golden_file(name):
    checks = golden.check_file(FILES[name])
    assert {check.case for check in checks} >= set(golden.Golden.load(FILES[name]).cases)
    assert [check for check in checks if not check.passed] == []


@pytest.mark.needs_native
@pytest.mark.parametrize("algorithm", ["direct", "winograd2", "winograd4"])
@pytest.mark.parametrize(
    "name", sorted(FILES) or [pytest.param("none", marks=pytest.mark.skip("no golden files found"))]
)
def test_golden_file_accelerated(name, algorithm):
    assert [check for check in golden.check_file(FILES[name], "cpu", algorithm) if not check.passed] == []


def rewrite(source: Path, target: Path, *, key: str = "", change=None, meta: dict | None = None) -> Path:
    """A copy of a golden file with one tensor or entries of the metadata changed."""
    loaded = golden.Golden.load(source)
    tensors = load_file(source)
    if key:
        tensors[key] = change(tensors[key])
    save_file(tensors, target, {"meta": json.dumps(loaded.meta | (meta or {}))})
    return target


def test_a_difference_fails(tmp_path, capsys):
    path = rewrite(
        FILES[CONV], tmp_path / "changed.safetensors", key="out/conv03/v11/y", change=lambda y: y * (1 + 3e-5)
    )
    failed = [check for check in golden.check_file(path) if not check.passed]
    assert [(check.case, check.what) for check in failed] == [("conv03", "v11/y")]
    assert failed[0].error == pytest.approx(3e-5, rel=0.05)
    assert golden.main([str(path)]) == 1
    assert "FAIL  conv03" in capsys.readouterr().out


def test_one_wrong_index_fails(tmp_path):
    def change(indices):
        indices[0, 0, 0, 0] += 1
        return indices

    source = FILES["vidtok_v10_causal_fsq_8x4.safetensors"]
    path = rewrite(source, tmp_path / "changed.safetensors", key="out/t9/indices", change=change)
    failed = {check.what for check in golden.check_file(path) if not check.passed}
    assert failed == {"indices", "latent_from_indices"}


@pytest.mark.parametrize(
    ("source", "key", "noticed"),
    [
        ("infotok_network", "out/t9/forward_r0.5/mask", {"mask"}),
        ("infotok_vit", "out/order_masks/order_4", {"order_4"}),
        ("cosmos_predict1_dv_patch2", "out/t9/indices", {"indices"}),
    ],
)
def test_one_wrong_token_fails(tmp_path, source, key, noticed):
    def change(values):
        values.view(-1)[0] = not values.view(-1)[0] if values.dtype == torch.bool else values.view(-1)[0] + 1
        return values

    path = rewrite(FILES[f"{source}.safetensors"], tmp_path / "changed.safetensors", key=key, change=change)
    assert {check.what for check in golden.check_file(path) if not check.passed} == noticed


def test_what_a_configuration_says_and_is_not_known(tmp_path):
    """An unknown setting may change anything: such a file is not checked, rather than checked without it."""
    for name, part in (("cosmos_predict1_dv_patch2", None), ("infotok_network", "vit_config")):
        source = FILES[f"{name}.safetensors"]
        config = golden.Golden.load(source).meta["config"]
        (config[part] if part else config)["freq_weights"] = [1.0]
        path = rewrite(source, tmp_path / "unknown.safetensors", meta={"config": config})
        with pytest.raises(golden.Unsupported, match="freq_weights"):
            golden.check_file(path)


@pytest.mark.parametrize(
    "change",
    [lambda y: y[..., :-1].contiguous(), lambda y: torch.full_like(y, float("nan"))],
    ids=["other shape", "NaN"],
)
def test_shape_and_nan_fail(tmp_path, change):
    path = rewrite(FILES[CONV], tmp_path / "changed.safetensors", key="out/conv00/v10/y", change=change)
    assert [check.passed for check in golden.check_file(path) if check.case == "conv00"].count(False) == 1


def test_what_cannot_be_checked(tmp_path, capsys):
    foreign = rewrite(FILES[CONV], tmp_path / "foreign.safetensors", meta={"system": "Other tokenizer"})
    truncated = tmp_path / "truncated.safetensors"
    truncated.write_bytes(FILES[CONV].read_bytes()[:1000])
    for path, message in (
        (foreign, "system 'Other tokenizer' is unknown"),
        (truncated, "not a readable golden file"),
        (tmp_path / "absent", "not a readable golden file"),
    ):
        assert golden.main([str(path)]) == 2
        assert message in capsys.readouterr().err


def test_command_line():
    command = [sys.executable, "-m", "support.golden", str(FILES[CONV])]
    result = subprocess.run(command, capture_output=True, text=True, check=False, cwd=TESTS)
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("ok ") == len(golden.Golden.load(FILES[CONV]).cases)
    result = subprocess.run(
        [*command, "--algorithm", "direct"], capture_output=True, text=True, check=False, cwd=TESTS
    )
    assert result.returncode == 2
