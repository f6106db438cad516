"""What test_cases.py gets: the options, one test per case, the timing of a trial, where its result goes."""

from __future__ import annotations

import pytest
import torch

from vtok_fast.bench import ceilings, harness, machine, report
from vtok_fast.bench import run as runner
from vtok_fast.bench.harness import Settings
from vtok_fast.bench.sections import SECTIONS
from vtok_fast.bench.sections import section as module_of
from vtok_fast.commands.options import default_device


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("vtok-fast benchmarks")
    group.addoption(
        "--quick", action="store_true", help="few, small cases and few rounds: whether everything runs"
    )
    group.addoption(
        "--full", action="store_true", help="also the measurements that take minutes: memory at 17x256x256"
    )
    group.addoption("--seconds", type=float, help="measure each case for at least so long")
    group.addoption("--threads", type=int, help="torch.set_num_threads")
    group.addoption("--device", help="cpu, cuda or cuda:1; default: a GPU where there is one")
    group.addoption("--results", help="a JSON file to add the results to")


def pytest_configure(config: pytest.Config) -> None:
    option = config.option
    if option.threads:
        torch.set_num_threads(option.threads)
    config.settings = Settings.of(
        quick=option.quick,
        full=option.full,
        seconds=option.seconds,
        device=option.device or default_device(),
    )
    config.sections = {}
    if config.settings.device == "cpu":
        harness.pin_allocator()


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "case" in metafunc.fixturenames:
        settings = metafunc.config.settings
        pairs = [(name, case) for name in SECTIONS for case in module_of(name).cases(settings)]
        metafunc.parametrize("section, case", pairs, ids=[f"{name} {case}" for name, case in pairs])


@pytest.fixture(scope="session")
def limits(pytestconfig):
    """The machine's ceilings, measured before anything else."""
    runner.prepare(pytestconfig.settings)
    return ceilings.measure(pytestconfig.settings)


@pytest.fixture
def keep(request, limits):
    """``keep(section, record)`` adds a result to those of this run, and to the file, which is complete after
    every case."""
    config = request.config

    def add(section: str, record: dict) -> None:
        if section not in config.sections:
            config.sections[section] = runner.new_section(config.settings, limits)
        config.sections[section]["cases"].append(record)
        with config.pluginmanager.getplugin("capturemanager").global_and_fixture_disabled():
            terminal = config.pluginmanager.getplugin("terminalreporter")
            terminal.ensure_newline()
            terminal.write_line(report.line(section, record))
        if config.option.results:
            report.save(config.option.results, machine.describe(config.settings.device), config.sections)

    return add


@pytest.fixture
def run_trial(request, benchmark, keep, limits):
    """``run_trial(section, case)``: builds the section's trial, times it, keeps the result, and fails where
    ours is wrong. A case of memory measures that instead."""
    settings = request.config.settings

    def run(section, case) -> None:
        module = module_of(section)
        if getattr(case, "memory", False):
            keep("memory", {"case": str(case), "variants": module.memory(case)})
            return
        with torch.no_grad():
            try:
                trial = module.build(case, settings)
            except harness.Missing as error:
                pytest.skip(str(error))
            record = harness.measure(trial, settings, limits)
            # pytest-benchmark's own record, for --benchmark-save and --benchmark-compare; ratios never come
            # from it.
            benchmark.pedantic(_finished(trial.ours.call, settings), setup=trial.ours.prepare, rounds=3)
        if settings.on_gpu:
            record["clocks"] = machine.clocks(settings.device)
        benchmark.extra_info.update(record)
        keep(section, record)
        assert trial.wrong is None, trial.wrong

    return run


def _finished(call, settings: Settings):
    """The call, waiting for the GPU."""
    return call if not settings.on_gpu else lambda: (call(), torch.cuda.synchronize(settings.device))


def pytest_terminal_summary(terminalreporter, config: pytest.Config) -> None:
    if config.sections:
        report.show({"machine": machine.describe(config.settings.device), "sections": config.sections})
        if config.option.results:
            terminalreporter.write_line(f"written to {config.option.results}")
