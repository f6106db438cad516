"""The list of models: every one of them runs in the benchmark, and its page says what is so."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks import models_page
from vtok_fast.bench import harness, report
from vtok_fast.bench.cases import models

pytestmark = pytest.mark.needs_native
TINY = harness.Settings(quick=True, min_rounds=1, min_seconds=0.0, max_seconds=0.0)


def available(name):
    try:
        return models.MODELS[name].make(small=True)
    except ImportError as error:
        pytest.skip(str(error))


@pytest.mark.parametrize("case", models.cases(TINY), ids=str)
def test_a_trial_runs_and_is_right(case):
    available(case.model)
    with torch.no_grad():
        record = harness.measure(models.build(case, TINY), TINY)
    assert record["wrong"] is None and record["facts"]["swapped"] > 0
    assert report.ratio(record, "eager")["median"] > 0 and models.VARIANTS[2] in record["ratios"]
    json.dumps(record)


@pytest.mark.parametrize("name", models.MODELS)
def test_the_page_is_what_is_swapped(name):
    """Else: python -m benchmarks.models_page"""
    available(name)
    with torch.no_grad():
        text = models_page.section(name, models.MODELS[name])
    assert text in models_page.PAGE.read_text()
    assert "failed their contract" not in text


def test_measured_results_get_a_table():
    spread = {"median": 2.5, "q1": 2.0, "q3": 3.0}
    case = {
        "case": "Wan 2.1 9x64x64",
        "group": "Wan 2.1",
        "eager": "eager",
        "ours": "vtok_fast",
        "facts": {"difference": 1e-6},
        "ratios": {"vtok_fast": {"eager": spread}, "vtok_fast, no weight cache": {"eager": spread}},
    }
    memory = {
        "case": "Wan 2.1 9x128x128 memory",
        "variants": {
            "eager": {"peak": 10},
            "vtok_fast": {"peak": 6},
            "vtok_fast, no weight cache": {"peak": 5},
        },
    }
    state = {"threads": 2, "torch": "2.13", "commit": "abc"}
    results = {
        "machine": {"cpu": "some CPU"},
        "sections": {"models": state | {"cases": [case]}, "memory": {"cases": [memory]}},
    }
    table = models_page.measured(results)
    assert "| Wan 2.1 9x64x64 | 2.50 (2.00 to 3.00) | 2.50 (2.00 to 3.00) | 0.60 | 0.50 | 1.0e-06 |" in table


@pytest.mark.volatile
@pytest.mark.skipif(sys.platform != "linux", reason="peak memory is read from /proc")
@pytest.mark.slow
def test_peak_memory_is_measured_in_a_process_of_its_own():
    available("CogVideoX")
    case = models.Case("CogVideoX", (9, 32, 32), memory=True, small=True)
    result = models.measure_memory(case, "vtok_fast")
    assert result["peak"] > 0 and result["seconds"] > 0 and result["model"] > 0


def test_a_library_that_is_not_there_is_named(monkeypatch):
    model = models.Model("diffusers_of_the_future", "AutoencoderKLNext")
    assert models_page.section("Next", model).endswith(
        "Not looked at: No module named 'diffusers_of_the_future'.\n"
    )
    done = subprocess.run(
        [sys.executable, "-m", "vtok_fast.bench.cases.models", "{}"],
        capture_output=True,
        text=True,
        cwd=Path(__file__).resolve().parents[2],
    )
    assert done.returncode
