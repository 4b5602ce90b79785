import json
import os
import threading
from pathlib import Path

import pytest

from bnlab.errors import BnlabWarning, UnwritableFile, UsageError
from bnlab.watching.logs import log_of

EVENT = (7, "BN605", "TrainedInEvalMode", "bn1", "it is in eval mode")


class Writer:
    def __init__(self):
        self.calls = []

    def add_scalar(self, tag, value, step):
        self.calls.append((tag, value, step))

    def add_text(self, tag, text, step):
        self.calls.append((tag, text, step))


def lines(path):
    return [
        {key: value for key, value in json.loads(line).items() if key != "time"}
        for line in path.read_text().splitlines()
    ]


def test_a_function_gets_the_step_as_a_value():
    calls = []
    log = log_of(calls.append)
    log.values(3, {"bnlab/bn1/lag": 0.5})
    log.event(*EVENT)
    log.event(*EVENT)
    assert calls == [
        {"bnlab/bn1/lag": 0.5, "bnlab/step": 3.0},
        {"bnlab/events/BN605": 1.0, "bnlab/step": 7.0},
        {"bnlab/events/BN605": 2.0, "bnlab/step": 7.0},
    ]


def test_a_function_that_takes_a_step_gets_it():
    calls = []
    log = log_of(lambda data, step=None, commit=None: calls.append((data, step)))
    log.values(3, {"bnlab/bn1/lag": 0.5})
    log.event(*EVENT)
    assert calls == [({"bnlab/bn1/lag": 0.5}, 3), ({"bnlab/events/BN605": 1.0}, 7)]


def test_a_step_that_cannot_be_passed_by_name_is_a_value():
    calls = []

    def positional(values, step=None, /):
        calls.append((values, step))

    def open_ended(values, **others):
        calls.append((values, others))

    for function in (positional, open_ended):
        log_of(function).values(1, {"a": 1.0})
    assert calls == [({"a": 1.0, "bnlab/step": 1.0}, None), ({"a": 1.0, "bnlab/step": 1.0}, {})]


def test_a_function_without_a_signature_is_called_with_the_dict():
    values = {}
    log_of(values.update).values(1, {"a": 2.0})
    assert values == {"a": 2.0, "bnlab/step": 1.0}


def test_tensorboard_gets_scalars_and_the_text_of_an_event():
    writer = Writer()
    log = log_of(writer)
    log.values(3, {"bnlab/bn1/lag": 0.5, "bnlab/bn2/lag": 1.5})
    log.event(*EVENT)
    assert writer.calls == [
        ("bnlab/bn1/lag", 0.5, 3),
        ("bnlab/bn2/lag", 1.5, 3),
        ("bnlab/events/BN605", 1.0, 7),
        ("bnlab/events/BN605", "BN605 TrainedInEvalMode, bn1: it is in eval mode", 7),
    ]


def test_a_log_stays_as_it_is():
    log = log_of(Writer())
    assert log_of(log) is log


def test_none_writes_nothing():
    log = log_of(None)
    log.values(1, {"a": 1.0})
    log.event(*EVENT)


@pytest.mark.parametrize("kind", [str, Path])
def test_json_lines_are_appended(tmp_path, kind):
    path = tmp_path / "run.jsonl"
    for step in (1, 2):  # the second one is a restart
        log = log_of(kind(path))
        log.values(step, {"bnlab/bn1/lag": float("inf")})
    log.event(*EVENT)
    assert lines(path) == [
        {"step": 1, "bnlab/bn1/lag": "inf"},
        {"step": 2, "bnlab/bn1/lag": "inf"},
        {"step": 7, "event": "BN605", "name": "TrainedInEvalMode", "layer": "bn1", "message": "it is in eval mode"},
    ]


def test_a_path_stays_where_it_was_when_the_folder_changes(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    log = log_of("run.jsonl")
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    log.values(1, {"a": 1.0})
    assert lines(tmp_path / "run.jsonl") == [{"step": 1, "a": 1.0}]


def test_a_line_that_a_crash_has_cut_is_ended_first(tmp_path):
    path = tmp_path / "run.jsonl"
    path.write_text('{"step": 1, "a": ')
    log = log_of(path)
    log.values(2, {"a": 1.0})
    log.values(3, {"a": 1.0})
    cut, *whole = path.read_text().splitlines()
    assert cut == '{"step": 1, "a": '
    assert [json.loads(line)["step"] for line in whole] == [2, 3]


def test_lines_of_several_writers_stay_whole(tmp_path):
    path = tmp_path / "run.jsonl"

    def write(writer):
        log = log_of(path)  # every line is written through a descriptor of its own, as by another process
        for step in range(100):
            log.values(step, {"writer": writer, **{f"bnlab/layer{i}/lag": 0.125 for i in range(100)}})

    threads = [threading.Thread(target=write, args=(float(writer),)) for writer in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    written = lines(path)
    for writer in range(3):
        assert [line["step"] for line in written if line["writer"] == writer] == list(range(100))


@pytest.mark.parametrize(("log", "name"), [(3, "int"), ([], "list"), (b"run.jsonl", "bytes")])
def test_another_target_is_refused(log, name):
    with pytest.raises(UsageError, match=f"^watch: log must be .*, got {name}[.] Pass log="):
        log_of(log)


def test_a_path_that_cannot_be_written_is_refused_at_once(tmp_path):
    with pytest.raises(UnwritableFile, match=r"^log: path must be writable, got .*no such file or directory"):
        log_of(tmp_path / "missing" / "run.jsonl")
    with pytest.raises(UnwritableFile, match=r"^log: path must be writable, got .*is a directory"):
        log_of(tmp_path)
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(UnwritableFile, match=r"^log: path must be that of a regular file"):
        log_of(tmp_path / "pipe")


def test_a_file_that_fails_later_warns_once_and_the_run_goes_on(tmp_path):
    folder = tmp_path / "folder"
    folder.mkdir()
    log = log_of(folder / "run.jsonl")
    folder.rmdir()
    with pytest.warns(BnlabWarning, match="must be writable, got: no such file or directory"):
        log.values(1, {"a": 1.0})
    log.values(2, {"a": 1.0})  # a second warning would be an error


def test_lines_name_the_rank_where_there_are_several(tmp_path, monkeypatch):
    import torch.distributed as distributed

    for name, value in {"is_available": True, "is_initialized": True, "get_world_size": 2, "get_rank": 1}.items():
        monkeypatch.setattr(distributed, name, lambda value=value: value)
    log_of(tmp_path / "run.jsonl").values(1, {"a": 1.0})
    assert lines(tmp_path / "run.jsonl") == [{"rank": 1, "step": 1, "a": 1.0}]
