"""Shared fixtures."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest
import tests.torchvision_operators  # noqa: F401 - before a test imports torchvision or timm
import torch
from hypothesis import HealthCheck, settings

settings.register_profile(
    "bnlab", deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
settings.load_profile("bnlab")

# A job in the background of a shell or of a CI machine inherits that signals are ignored. The tests send signals to
# themselves and to their child processes, which inherit the handlers from here.
for number in {signal.SIGINT, signal.SIGTERM, getattr(signal, "SIGHUP", signal.SIGTERM)}:
    if signal.getsignal(number) is signal.SIG_IGN:
        signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)

# The tests use one thread, also as one of two workers: the tensors are small, and on a busy machine threads that wait
# for each other take many times as long. BNLAB_TEST_THREADS and BNLAB_TEST_FLUSH_DENORMAL reproduce the rounding of
# other machines: see `make test-machines`.
if not torch.cuda.is_available():  # the kernels for GPUs run in Triton's interpreter, which this switches on at import
    os.environ.setdefault("TRITON_INTERPRET", "1")
torch.set_num_threads(int(os.environ.get("BNLAB_TEST_THREADS", "1")))
if os.environ.get("BNLAB_TEST_FLUSH_DENORMAL") == "1" and not torch.set_flush_denormal(True):
    raise pytest.UsageError("BNLAB_TEST_FLUSH_DENORMAL: this processor cannot flush denormal numbers to 0.")


DEVICE = pytest.StashKey[torch.device]()


def pytest_addoption(parser):
    parser.addoption(
        "--device", default="cpu", help="the device of the tests: cpu (the default), cuda, cuda:1, ..., or simulated"
    )


MACHINE = [
    f"{name}={os.environ[name]}"
    for name in ("BNLAB_CPU", "BNLAB_ISA", "ATEN_CPU_CAPABILITY", "BNLAB_TEST_FLUSH_DENORMAL", "BNLAB_TEST_THREADS")
    if name in os.environ
]
"""How this run rounds as another machine does."""


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item, call):
    report = yield
    if report.failed and MACHINE:
        alone = "\n".join(f"{variable} pytest -m '' '{item.nodeid}'" for variable in MACHINE)
        report.sections.append(("This run rounds as another machine does. To see which variable it is, run", alone))
    return report


class _FailuresAtOnce:
    """Prints the first line of a failure when it happens: a run that hangs or is killed has no summary."""

    def __init__(self, config):
        self._plugins = config.pluginmanager

    def pytest_runtest_logreport(self, report):
        if report.failed:
            crash = getattr(report.longrepr, "reprcrash", None)
            reason = str(crash.message if crash else report.longrepr).strip().partition("\n")[0]
            terminal = self._plugins.get_plugin("terminalreporter")
            terminal.ensure_newline()
            terminal.write_line(f"FAILED at {report.when} {report.nodeid} - {reason[:200]}")


def pytest_configure(config):
    if "BNLAB_CI" in os.environ and not hasattr(config, "workerinput"):
        config.pluginmanager.register(_FailuresAtOnce(config))
    config.stash[DEVICE] = _available(config.getoption("--device"))
    if config.stash[DEVICE].type != "cpu":
        # Convolutions and products of matrices round as on the CPU, and the same in every run.
        torch.backends.cudnn.allow_tf32 = False  # fp32_precision would keep torch.export from running
        torch.backends.cudnn.deterministic = True


def _available(name):
    """Return the device of a tensor that is made on a device of this name: cuda:0 where the name is cuda."""
    if name == "simulated":
        import tests.simulated_device  # noqa: F401 - torch knows the device from then on
    try:
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError, ImportError) as error:
        reason = str(error).partition("\n")[0]
        raise pytest.UsageError(
            f"--device: name must be a device of this torch, got {name} ({reason}). Leave it out to use the CPU."
        ) from None


def pytest_collection_modifyitems(config, items):
    device = config.stash[DEVICE]
    for item in items:
        marker = item.get_closest_marker("cpu_only")
        if marker and device.type != "cpu":
            (reason,) = marker.args
            item.add_marker(pytest.mark.skip(reason=f"only on the CPU, not on {device}: {reason}"))


@pytest.fixture(scope="session")
def device(pytestconfig) -> torch.device:
    """The device of --device. Make random numbers on the CPU and move them, so that they are the same everywhere."""
    return pytestconfig.stash[DEVICE]


@pytest.fixture(autouse=True)
def _same_numbers_every_time():
    """Start every test with the same random seed, and check that it keeps the number of threads."""
    torch.manual_seed(0)
    threads = torch.get_num_threads()
    yield
    assert torch.get_num_threads() == threads


@pytest.fixture(scope="session")
def data() -> Path:
    """The folder of real networks and data, if it is present."""
    folder = os.environ.get("BNLAB_DATA", "")
    if not folder or not Path(folder).is_dir():
        pytest.skip("real networks: BNLAB_DATA names no folder")
    return Path(folder)


@pytest.fixture(scope="session")
def stuck():
    """A CNN trained on the digits whose running statistics hardly moved. Copy the model before changing it."""
    pytest.importorskip("sklearn")
    from bnlab.lab.stuck_statistics import Config, train

    return train(Config())


@pytest.fixture(scope="session")
def settled():
    """The same network, trained with a suitable momentum. Copy the model before changing it."""
    pytest.importorskip("sklearn")
    from bnlab.lab.stuck_statistics import Config, train

    return train(Config(epochs=3, momentum=0.1))


@pytest.fixture
def bnlab_command(monkeypatch, capsys):
    """A function that runs the command line in this process and returns exit code, stdout and stderr."""
    from bnlab.cli.main import main

    # The command changes the pipes of its process, and the test process must keep its own.
    monkeypatch.setattr("bnlab.cli.main._behave_in_pipes", lambda: None)

    def run(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr("sys.argv", ["bnlab", *map(str, arguments)])
        with pytest.raises(SystemExit) as exit_:
            main()
        captured = capsys.readouterr()
        return exit_.value.code or 0, captured.out, captured.err

    return run
