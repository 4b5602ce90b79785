import random
import signal
import sys
import threading

import pytest

from bnlab.uninterrupted import SignalsHeld, finishes, import_whole, restores


@finishes
def restore(steps, *, failing=False):
    for step in range(3):
        signal.raise_signal(signal.SIGINT)
        steps.append(step)
    if failing:
        raise OSError


def test_a_marked_function_finishes_before_the_interrupt():
    steps = []
    with pytest.raises(KeyboardInterrupt), SignalsHeld():
        steps.append(restore(steps))
    assert steps == [0, 1, 2]


def test_the_interrupt_comes_behind_an_error_too():
    steps = []
    with pytest.raises(KeyboardInterrupt) as caught, SignalsHeld():
        restore(steps, failing=True)
    assert steps == [0, 1, 2]
    assert isinstance(caught.value.__context__, (OSError, KeyboardInterrupt))


def test_other_code_is_interrupted_at_once():
    with SignalsHeld(), pytest.raises(KeyboardInterrupt):
        signal.raise_signal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        restore([])  # outside of the block nothing waits


def test_a_function_that_calls_another_marked_one_finishes_too():
    steps = []

    @finishes
    def outer():
        restore(steps)
        steps.append("outer")

    with pytest.raises(KeyboardInterrupt), SignalsHeld():
        outer()
    assert steps == [0, 1, 2, "outer"]


def test_handlers_are_those_of_before_when_the_block_ends():
    before = signal.getsignal(signal.SIGINT)
    with SignalsHeld():
        with SignalsHeld():
            pass
        assert signal.getsignal(signal.SIGINT) is not before
    assert signal.getsignal(signal.SIGINT) is before


def test_a_handler_that_is_set_in_the_block_stays(request):
    before = signal.getsignal(signal.SIGALRM)
    request.addfinalizer(lambda: signal.signal(signal.SIGALRM, before))
    signal.signal(signal.SIGALRM, lambda *_: None)

    def other(*_):
        pass

    with SignalsHeld():
        signal.signal(signal.SIGALRM, other)
    assert signal.getsignal(signal.SIGALRM) is other


def test_a_signal_that_is_ignored_stays_ignored(request):
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    request.addfinalizer(lambda: signal.signal(signal.SIGINT, before))
    steps = []
    with SignalsHeld():
        restore(steps)
        assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    assert steps == [0, 1, 2]
    assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN


def test_other_threads_need_no_protection():
    seen = []

    def work():
        with SignalsHeld():
            seen.append(signal.getsignal(signal.SIGINT))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == [signal.default_int_handler]


class _Restores:
    def __init__(self):
        self.value = 0

    def __enter__(self):
        self.signals = SignalsHeld()
        try:
            self.signals.__enter__()
            self.value = 1
        except BaseException:
            self.__exit__(None, None, None)
            raise

    @finishes
    def __exit__(self, *error):
        self.value = 0
        for _ in range(5):
            self.value = self.value + 0
        self.signals.__exit__(*error)


def test_no_moment_is_left_in_which_an_interrupt_prevents_the_restoration(request):
    """Real timers interrupt at random instructions, among them those between the block and the restoration."""

    def interrupt(*_):
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGALRM, interrupt)
    request.addfinalizer(lambda: signal.signal(signal.SIGALRM, before))
    request.addfinalizer(lambda: signal.setitimer(signal.ITIMER_REAL, 0))
    interrupted = 0
    for attempt in range(400):
        restoring = _Restores()
        try:
            try:
                signal.setitimer(signal.ITIMER_REAL, 1e-6 + attempt % 40 * 1e-6)
                with restoring:
                    for _ in range(attempt % 50):
                        pass
            finally:
                signal.setitimer(signal.ITIMER_REAL, 0)
        except KeyboardInterrupt:
            interrupted += 1
        assert restoring.value == 0
    assert interrupted > 100
    assert signal.getsignal(signal.SIGALRM) is interrupt


def test_an_import_finishes_before_the_interrupt_and_draws_no_random_numbers(tmp_path, monkeypatch):
    lines = ["import random, signal", "random.random()", "signal.raise_signal(signal.SIGINT)", "value = 3"]
    (tmp_path / "interrupted_module.py").write_text("\n".join(lines))
    monkeypatch.syspath_prepend(tmp_path)
    before = random.getstate()
    with pytest.raises(KeyboardInterrupt):
        import_whole("interrupted_module")
    assert sys.modules.pop("interrupted_module").value == 3
    assert random.getstate() == before


def test_a_context_that_restores_is_interrupted_before_inside_or_behind_it():
    steps = []

    @restores
    def changed(where):
        for step in ("change", "changed"):
            steps.append(step)
            if where == "begin":
                signal.raise_signal(signal.SIGINT)
        try:
            yield
        finally:
            for step in ("restore", "restored"):
                steps.append(step)
                if where == "end":
                    signal.raise_signal(signal.SIGINT)

    with pytest.raises(KeyboardInterrupt), changed("begin"):
        steps.append("block")
    assert steps == ["change", "changed", "restore", "restored"]
    steps.clear()
    with pytest.raises(KeyboardInterrupt), changed("end"):
        steps.append("block")
    assert steps == ["change", "changed", "block", "restore", "restored"]
