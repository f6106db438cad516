"""What every benchmark file gets: the options, one test per case, the timing of a trial, and where its result goes."""

from __future__ import annotations

import pytest
import torch

from benchmarks import harness, machine, report
from benchmarks.harness import Settings


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("vtok-fast benchmarks")
    group.addoption("--quick", action="store_true", help="few, small cases and few rounds: whether everything runs")
    group.addoption("--full", action="store_true", help="also the measurements that take minutes: memory at 17x256x256")
    group.addoption("--seconds", type=float, help="measure each case for at least so long")
    group.addoption("--threads", type=int, help="torch.set_num_threads")
    group.addoption("--results", help="a JSON file to add the results to")


def pytest_configure(config: pytest.Config) -> None:
    option = config.option
    if option.threads:
        torch.set_num_threads(option.threads)
    config.settings = Settings.of(quick=option.quick, full=option.full, seconds=option.seconds)
    config.sections = {}


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "case" in metafunc.fixturenames:
        metafunc.parametrize("case", metafunc.module.cases(metafunc.config.settings), ids=str)


@pytest.fixture
def keep(request):
    """``keep(section, record)`` adds a result to those of this run, and to the file, which is complete after every case."""
    config = request.config

    def add(section: str, record: dict) -> None:
        if section not in config.sections:
            config.sections[section] = machine.state() | {"quick": config.settings.quick, "cases": []}
        config.sections[section]["cases"].append(record)
        with config.pluginmanager.getplugin("capturemanager").global_and_fixture_disabled():
            terminal = config.pluginmanager.getplugin("terminalreporter")
            terminal.ensure_newline()
            terminal.write_line(report.line(section, record))
        if config.option.results:
            report.save(config.option.results, machine.describe(), config.sections)

    return add


@pytest.fixture
def run_trial(request, benchmark, keep):
    """``run_trial(case)``: builds the module's trial, times it, keeps the result, and fails where ours is wrong."""
    module, settings = request.module, request.config.settings

    def run(case) -> None:
        with torch.no_grad():
            trial = module.build(case, settings)
            record = harness.measure(trial, settings)
            # pytest-benchmark's own record, for --benchmark-save and --benchmark-compare; ratios never come from it.
            benchmark.pedantic(trial.ours.call, setup=trial.ours.prepare, rounds=3)
        benchmark.extra_info.update(record)
        keep(module.__name__.rpartition(".")[2], record)
        assert trial.wrong is None, trial.wrong

    return run


def pytest_terminal_summary(terminalreporter, config: pytest.Config) -> None:
    if config.sections:
        report.show({"machine": machine.describe(), "sections": config.sections})
        if config.option.results:
            terminalreporter.write_line(f"written to {config.option.results}")
