import json
import os
import subprocess
import sys
from argparse import Namespace
from pathlib import Path

import jsonschema
import pytest
import torch
from tests.samples import save, small_network, state_dict
from tests.unit.report.html_samples import Page
from torch import nn

from bnlab.records import DiagnosisRecord, json_schema


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "80")
    return tmp_path


@pytest.fixture
def healthy(folder):
    return save(small_network().state_dict(), folder / "healthy.pt")


@pytest.fixture
def broken(folder):
    state = small_network().state_dict()
    state["1.running_var"][3] = -1
    state["4.weight"][0] = 0
    return save(state, folder / "broken.pt")


NETWORK = """
import torch
from tests.samples import small_network

def build():
    model = small_network()
    model.append(torch.nn.AdaptiveAvgPool2d(1)).append(torch.nn.Flatten())
    return model

def batches(shift=0.0):
    generator = torch.Generator().manual_seed(0)
    images = 1 + shift + 2 * torch.randn(8, 16, 3, 9, 9, generator=generator)
    return [(batch, torch.zeros(16, dtype=torch.int64)) for batch in images]

def shifted():
    return batches(5.0)

def one():
    return batches()[0]

def loader():
    images = torch.cat([images for images, _ in batches()])
    return torch.utils.data.DataLoader(torch.utils.data.TensorDataset(images), batch_size=16)

class Keyed(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.net = build()

    def forward(self, image, scale):
        return self.net(image * scale)

def keyed(model, batch):
    return model(batch[0], 1.0)

def talking():
    model = build()
    model.register_forward_hook(lambda *_: print("a forward"))
    return model

def cost(model, batch):
    return model(batch[0]).square().mean()

def first_class(model, data):
    return float(torch.cat([model(x).argmax(1) == label for x, label in data]).float().mean())
"""


@pytest.fixture
def code(folder, monkeypatch):
    (folder / "mine.py").write_text(NETWORK)
    yield folder
    sys.modules.pop("mine", None)


def test_a_model_with_data_and_a_metric(bnlab_command, code):
    status, out, err = bnlab_command(
        "check", "mine:build", "--data", "mine:shifted", "--train-data", "mine:batches", "--metric", "mine:first_class",
        "--format", "json",
    )  # fmt: skip
    assert (status, err) == (1, "")
    diagnosis = DiagnosisRecord.from_json(json.loads(out))
    jsonschema.validate(json.loads(out), json_schema())
    assert diagnosis.causes[0].cause == "shift"
    assert diagnosis.numbers is not None
    assert "BN402" in {finding.code for finding in diagnosis.findings}


def test_a_checkpoint_is_loaded_into_a_model(bnlab_command, code):
    state = small_network().state_dict()
    state["1.running_mean"] += 50
    save({"epoch": 3, "model": {f"module.{key}": value for key, value in state.items()}}, code / "spoiled.pt")
    before = (code / "spoiled.pt").read_bytes()
    status, out, err = bnlab_command("check", "spoiled.pt", "--model", "mine:build", "--data", "mine:batches")
    assert (status, err) == (1, "")
    assert "BN401" in out
    assert "1: eval mode differs from train mode" in " ".join(out.split())
    assert (code / "spoiled.pt").read_bytes() == before


@pytest.mark.parametrize("prefix", ["_orig_mod.", "module.", "net.", "model.", "_orig_mod.module."])
def test_what_check_reads_of_a_file_is_what_a_model_loads(bnlab_command, code, prefix):
    state = small_network().state_dict()
    state["1.running_var"][3] = -1
    wrapped = {f"{prefix}{name}": tensor for name, tensor in state.items()}
    save({"args": Namespace(lr=0.1), "state_dict": wrapped}, code / "wrapped.pt")
    findings = []
    for arguments in (["wrapped.pt"], ["wrapped.pt", "--model", "mine:build"]):
        status, out, err = bnlab_command("check", *arguments, "--select", "BN102", "--format", "json")
        assert (status, err) == (1, "")
        findings.append([(item["code"], item["layer"], item["channels"]) for item in json.loads(out)["findings"]])
    assert findings[0] == findings[1] == [("BN102", "1", [3])]


def test_an_example_shows_the_structure(bnlab_command, code):
    status, out, err = bnlab_command("check", "mine:build", "--example", "mine:one", "--level", "info")
    assert "BN201" in out
    assert (status, err) == (1, "")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["healthy.pt", "--data", "digits"],
            "--data: target must be a model, got healthy.pt. Name its code with --model.",
        ),
        (
            ["mine:build", "--metric", "accuracy"],
            "check: data must be given with train_data, metric or loss, got none.",
        ),
        (["mine:build", "--data", "nothing"], "--data: value must be digits, mnist, cifar10"),
        (["mine:build", "--data", "mine:nothing"], "--data: value must be digits, mnist, cifar10"),
        (
            ["other.pt", "--model", "mine:build"],
            "other.pt: state dict must fit the model, got no 0.weight, no 0.bias, no",
        ),
        (["absent.pt", "--model", "mine:build"], "absent.pt: file must be readable, got: no such file or directory."),
        (
            ["helthy.pt", "--model", "mine:build"],
            "helthy.pt: file must be readable, got: no such file or directory. Did",
        ),
        (["healthy.pt", "--forward", "mine:keyed"], "--forward: target must be a model, got healthy.pt. Name its code"),
        (["healthy.pt", "--device", "cpu"], "--device: target must be a model, got healthy.pt. Name its code with"),
        (["mine:build", "--device", "warp"], "--device: value must be cpu"),
        (
            ["mine:build", "--loss", "mine:coast", "--data", "mine:batches"],
            "--loss: value must be package.module:callable",
        ),
        (["mine.py"], "mine.py: target must be a checkpoint, or a callable that returns a model, got a Python file."),
        (["mne.py:build"], "mne.py:build: target must be a file, or a callable that returns a model, got FileNotFound"),
        (["mine:build", "--metric", "acc", "--data", "mine:batches"], "--metric: value must be accuracy, loss, miou, "),
        (["module.pt", "--model", "mine:build"], "module.pt: file must hold tensors, got a pickled module"),
        (["cut.pt", "--model", "mine:build"], "cut.pt: file must be "),
        (["empty.pt", "--model", "mine:build"], "empty.pt: file must hold a state dict, got none."),
    ],
)
def test_what_goes_wrong_with_models_is_one_line(bnlab_command, code, healthy, arguments, message):
    save(state_dict(), code / "other.pt")
    save({"epoch": 1}, code / "empty.pt")
    torch.save(torch.nn.ReLU(), code / "module.pt")
    (code / "cut.pt").write_bytes(healthy.read_bytes()[:500])
    status, out, err = bnlab_command("check", *arguments)
    assert (status, out) == (2, "")
    assert err.startswith(f"error: {message}")
    assert err.count("\n") == 1
    assert "weights only load failed" not in err.lower()


def test_exit_code_0_without_findings(bnlab_command, healthy):
    code, out, err = bnlab_command("check", "healthy.pt")
    assert (code, err) == (0, "")
    assert out.startswith("healthy.pt\n2 BN layers, 12 channels, float32\n")


def test_exit_code_1_with_findings_at_the_level(bnlab_command, broken):
    assert bnlab_command("check", "broken.pt")[0] == 1
    assert bnlab_command("check", "broken.pt", "--level", "error")[0] == 1
    assert bnlab_command("check", "broken.pt", "--select", "BN108")[0] == 0
    assert bnlab_command("check", "broken.pt", "--select", "BN108", "--level", "info")[0] == 1


def test_select_and_ignore(bnlab_command, broken):
    code, out, _ = bnlab_command(
        "check", "broken.pt", "--select", "BN102,bn103", "--ignore", "BN102=seen", "--format", "json"
    )
    outcomes = {item["code"]: item for item in json.loads(out)["outcomes"]}
    assert code == 0
    assert outcomes["BN102"] == {"code": "BN102", "status": "skipped", "reason": "ignored: seen (1 finding dropped)"}
    assert list(outcomes) == ["BN102", "BN103"]


def test_json_of_one_target(bnlab_command, broken):
    code, out, err = bnlab_command("check", "broken.pt", "--format", "json")
    data = json.loads(out)
    jsonschema.validate(data, json_schema())
    assert (code, err) == (1, "")
    assert data["target"] == {"kind": "checkpoint", "name": "broken.pt"}
    assert data["findings"][0]["measured"]["running_var"] == {"value": -1.0, "unit": "input^2"}
    assert DiagnosisRecord.from_json(data).dumps(indent=2) + "\n" == out


def test_json_lines_of_several(bnlab_command, broken, healthy):
    code, out, err = bnlab_command("check", "broken.pt", "healthy.pt", "--format", "json")
    records = [json.loads(line) for line in out.splitlines()]
    assert (code, err) == (1, "")
    assert [record["target"]["name"] for record in records] == ["broken.pt", "healthy.pt"]


ASSUMED = "BN105 would fire at a momentum below 0.0628 (0.1 is assumed)"


def test_a_line_per_file_and_a_summary(bnlab_command, broken, healthy):
    code, out, err = bnlab_command("check", "broken.pt", "healthy.pt")
    assert (code, err) == (1, "")
    assert out.splitlines() == [
        "broken.pt: 2 layers, 1 error, 0 warnings, 1 note (BN102)",
        f"healthy.pt: 2 layers, 0 errors, 0 warnings, 0 notes; {ASSUMED}",
        "2 targets: 2 checked with 4 BN layers, 1 error and 0 warnings; 0 without BN, 0 not readable",
    ]


def test_a_broken_file_does_not_stop_the_others(bnlab_command, folder, healthy):
    (folder / "empty.pt").write_bytes(b"")
    save(nn.Linear(2, 2).state_dict(), folder / "linear.pt")
    code, out, err = bnlab_command("check", "empty.pt", "linear.pt", "missing.pt", "healthy.pt")
    assert code == 2
    assert out.splitlines() == [
        "linear.pt: checkpoint must hold running statistics of batch normalization, got none.",
        f"healthy.pt: 2 layers, 0 errors, 0 warnings, 0 notes; {ASSUMED}",
        "4 targets: 1 checked with 2 BN layers, 0 errors and 0 warnings; 1 without BN, 2 not readable",
    ]
    assert err.splitlines() == [
        "error: empty.pt: file must be a checkpoint, got an empty file.",
        "error: missing.pt: file must be readable, got: no such file or directory.",
    ]


def test_a_file_without_batch_norm_among_others_is_no_failure(bnlab_command, folder, healthy):
    save(nn.Linear(2, 2).state_dict(), folder / "linear.pt")
    assert bnlab_command("check", "linear.pt", "healthy.pt")[0] == 0
    code, out, err = bnlab_command("check", "linear.pt", "healthy.pt", "--format", "json")
    assert code == 0
    assert len(out.splitlines()) == 1
    assert err.startswith("linear.pt: checkpoint must hold")


def test_folders_and_globs(bnlab_command, folder):
    (folder / "runs" / "a").mkdir(parents=True)
    for name in ("a/one.pt", "a/two", "three.safetensors.pt"):
        save(state_dict("bn"), folder / "runs" / name)
    (folder / "runs" / "notes.txt").write_text("x")
    (folder / "runs" / "LICENSE").write_text("x")
    names = ["runs/a/one.pt", "runs/a/two", "runs/three.safetensors.pt"]
    code, out, _ = bnlab_command("check", "runs")
    assert code == 0
    assert [line.partition(":")[0] for line in out.splitlines()[:-1]] == names
    assert bnlab_command("check", "runs/**/*.pt", "runs/a/*", "runs")[1].count("1 layer,") == 3
    assert bnlab_command("check", "runs/a/o*")[1].startswith("runs/a/one.pt: 1 layer,")
    assert bnlab_command("check", "run*")[1].count("1 layer,") == 3


def test_a_target_that_stands_for_nothing_does_not_stop_the_others(bnlab_command, folder, healthy):
    (folder / "empty").mkdir()
    code, out, err = bnlab_command("check", "empty", "healthy.pt", "./healthy.pt", "sys:exit", "--format", "json")
    assert code == 2
    assert len(out.splitlines()) == 1
    assert err.splitlines()[0] == "error: empty: folder must hold at least one checkpoint, got none."
    assert err.splitlines()[1].startswith("error: sys:exit: ")


def test_an_unreadable_folder_is_reported(bnlab_command, folder, healthy, monkeypatch):
    scandir = os.scandir

    def refusing(path):
        if str(path).endswith("secret"):
            raise PermissionError(13, "Permission denied", path)
        return scandir(path)

    Path("runs/secret").mkdir(parents=True)
    monkeypatch.setattr(os, "scandir", refusing)
    code, out, err = bnlab_command("check", ".")
    assert code == 2
    assert "healthy.pt: 2 layers" in out
    assert err == "error: ./runs/secret: folder must be readable, got: permission denied.\n"


def test_a_folder_gives_json_lines_however_many_files_it_holds(bnlab_command, folder, healthy):
    assert len(bnlab_command("check", ".", "--format", "json")[1].splitlines()) == 1


def test_a_run_that_checked_nothing_is_no_success(bnlab_command, folder):
    save(nn.Linear(2, 2).state_dict(), folder / "a.pt")
    code, _, err = bnlab_command("check", ".")
    assert (code, err) == (2, "error: TARGET: at least one must hold batch normalization, got none.\n")


def test_a_pipe_in_a_folder_does_not_block(bnlab_command, folder, healthy):
    os.mkfifo(folder / "pipe")
    assert bnlab_command("check", ".")[0] == 0


def test_a_crashed_check_is_reported_for_many_files_too(bnlab_command, healthy, monkeypatch):
    from bnlab import checks

    monkeypatch.setattr(checks.by_code("BN101"), "inspect", lambda *_: 1 / 0, raising=False)
    code, _, err = bnlab_command("check", "healthy.pt", "healthy.pt", "missing.pt")
    assert code == 2
    assert err.splitlines()[0] == "error: healthy.pt: BN101 crashed: ZeroDivisionError: division by zero"


def test_output_into_a_pipe_or_through_a_link(bnlab_command, folder, healthy):
    (folder / "link").symlink_to("real.txt")
    assert bnlab_command("check", "healthy.pt", "--output", "link")[0] == 0
    assert (folder / "link").is_symlink()
    assert "2 BN layers" in (folder / "real.txt").read_text()
    assert bnlab_command("check", "healthy.pt", "--output", os.devnull)[0] == 0
    assert not Path(os.devnull).is_file()


def test_output_goes_to_a_file_that_is_whole(bnlab_command, folder, broken):
    for format_ in ("text", "json"):
        _, out, _ = bnlab_command("check", "broken.pt", "--format", format_)
        code, nothing, err = bnlab_command("check", "broken.pt", "--format", format_, "--output", "report")
        assert (code, nothing, err) == (1, "", "")
        assert (folder / "report").read_text().split() == out.split()
    assert {path.name for path in folder.iterdir()} == {"broken.pt", "report"}


def test_output_of_many(bnlab_command, folder, broken, healthy):
    code, out, _ = bnlab_command("check", "broken.pt", "healthy.pt", "--output", "report.txt")
    assert (code, out) == (1, "")
    assert len((folder / "report.txt").read_text().splitlines()) == 3


def test_an_input_is_never_overwritten(bnlab_command, folder, broken):
    before = broken.read_bytes()
    (folder / "link").symlink_to(broken)
    for output in ("broken.pt", "link"):
        code, _, err = bnlab_command("check", "broken.pt", "--output", output)
        assert (code, err) == (2, f"error: --output: path must not be an input, got {output}.\n")
    assert broken.read_bytes() == before


def test_momentum_and_eps(bnlab_command, folder):
    model = nn.Sequential(nn.BatchNorm1d(3, momentum=0.001))
    for _ in range(90):
        model(5 * torch.randn(64, 3))
    save(model.state_dict(), folder / "a.pt")
    assert bnlab_command("check", "a.pt")[0] == 0
    code, out, _ = bnlab_command("check", "a.pt", "--momentum", "0.001", "--eps", "1e-3", "--format", "json")
    assert code == 1
    assert json.loads(out)["layers"][0]["assumed"] == []
    assert json.loads(out)["layers"][0]["eps"] == 1e-3
    assert bnlab_command("check", "a.pt", "--momentum", "none")[0] == 0


def test_a_model_by_its_callable(bnlab_command, folder):
    (folder / "nets.py").write_text(
        "from torch import nn\n\n"
        "def build():\n    return nn.Sequential(nn.BatchNorm2d(3))\n\n"
        "class holder:\n    build = build\n"
    )
    code, out, _ = bnlab_command("check", "nets:build", "--format", "json")
    data = json.loads(out)
    assert code == 1
    assert data["target"] == {"kind": "model", "name": "nets:build"}
    assert [finding["code"] for finding in data["findings"]] == ["BN104"]
    assert bnlab_command("check", "nets:holder.build")[0] == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["missing.pt"], "missing.pt: file must be readable, got: no such file or directory."),
        (["."], ".: folder must hold at least one checkpoint, got none."),
        (["*.pt"], "*.pt: pattern must match at least one file, got none."),
        ([""], "TARGET: path must not be empty."),
        (["a" * 300], "a" * 300 + ": file must be readable, got: file name too long."),
        (["linear.pth"], "linear.pth: checkpoint must hold running statistics of batch normalization, got none."),
        (["linear.pth", "--momentum", "x"], "--momentum: value must be a number, got 'x'."),
        (["linear.pth", "--momentum", "2"], "momentum: value must be in [0, 1] or None, got 2.0."),
        (["linear.pth", "--eps", "x"], "--eps: value must be a number, got 'x'."),
        (["linear.pth", "--eps", "-1"], "eps: value must be finite and >= 0, got -1.0."),
        (["linear.pth", "--ignore", "BN101"], "--ignore: value must be CODE=REASON, got 'BN101'."),
        (["linear.pth", "--output", "no/such/folder"], None),
        (
            ["no_such_module_:build"],
            "no_such_module_:build: target must be a file, or a callable that returns a model, got ",
        ),
        (["json:dumps"], "json:dumps: target must be a file, or a callable that returns a model, got TypeError: "),
        (["json:decoder"], "json:decoder: target must be a file, or a callable that returns a model, got TypeError: "),
        (["sys:exit"], "sys:exit: target must be a file, or a callable that returns a model, got SystemExit:"),
        (["time:time"], "time:time: target must return a torch.nn.Module, got float."),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(bnlab_command, folder, arguments, message):
    if arguments[0].startswith("linear"):
        save(nn.Linear(2, 2).state_dict(), folder / "linear.pth")
    code, out, err = bnlab_command("check", *arguments)
    assert (code, out) == (2, "")
    assert len(err.splitlines()) == 1
    assert message is None or err.startswith(f"error: {message}")


def test_an_output_that_cannot_be_written(bnlab_command, healthy):
    code, _, err = bnlab_command("check", "healthy.pt", "--output", "no/such/file")
    assert (code, err) == (2, "error: --output: path must be a file in an existing folder, got no/such/file.\n")


@pytest.mark.parametrize(
    "arguments", [["check"], ["check", "a.pt", "--level", "bad"], ["nonsense"], ["check", "a.pt", "--nope"]]
)
def test_wrong_usage_is_exit_code_2(bnlab_command, arguments):
    code, out, err = bnlab_command(*arguments)
    assert (code, out) == (2, "")
    assert "Usage: bnlab" in err


def test_names_with_escapes_stay_harmless(bnlab_command, folder):
    save(state_dict("\x1b[31m<b>bn\x07"), folder / "a\x1b[2J.pt")
    for path in folder.iterdir():
        code, out, err = bnlab_command("check", str(path))
        assert code == 0
        assert "\x1b" not in out + err
        assert "\x07" not in out + err
        assert "\x1b" not in bnlab_command("check", str(path), "--format", "json")[1]
    code, _, err = bnlab_command("check", "\x1b[2Jmissing.pt")
    assert code == 2
    assert "\x1b" not in err


def run(*arguments, **options):
    return subprocess.run(
        [sys.executable, "-m", "bnlab", *arguments], capture_output=True, text=True, check=False, **options
    )


@pytest.mark.parametrize(
    ("arguments", "modules"), [(["check", "healthy.pt"], {"torch"}), (["--help"], {"torch", "numpy"})]
)
def test_what_is_not_needed_is_not_imported(healthy, arguments, modules):
    code = (
        f"import sys, runpy; sys.argv = ['bnlab', *{arguments}]\n"
        "try: runpy.run_module('bnlab', run_name='__main__')\n"
        f"finally: assert not {modules} & set(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")


def test_as_a_process(healthy, broken):
    assert run("check", "healthy.pt").returncode == 0
    assert run("check", "broken.pt").returncode == 1
    done = run("check", "missing.pt")
    assert (done.returncode, done.stdout) == (2, "")
    assert len(done.stderr.splitlines()) == 1


def shell(command, **environment):
    command = command.replace("bnlab", f"{sys.executable} -m bnlab")
    return subprocess.run(
        ["bash", "-c", command], capture_output=True, text=True, check=False, env=os.environ | environment
    )


@pytest.mark.skipif(os.name != "posix", reason="a shell of POSIX")
@pytest.mark.parametrize(
    ("command", "code", "error"),
    [
        ("bnlab check healthy.pt healthy.pt . | true", 0, ""),
        ("set -o pipefail; bnlab explain BN101 | true", 141, ""),
        ("bnlab check healthy.pt > /dev/full", 2, "error: output must be writable, got: no space left on device.\n"),
        ("bnlab check healthy.pt --format json >&-", 0, ""),
    ],
)
def test_pipes_and_full_disks(healthy, command, code, error):
    done = shell(command)
    assert (done.returncode, done.stderr) == (code, error)


def test_a_terminal_that_cannot_show_a_name(folder):
    save(state_dict("层.bn"), folder / "a.pt")
    done = shell("bnlab check a.pt", PYTHONIOENCODING="ascii")
    assert (done.returncode, done.stderr) == (0, "")
    assert r"\u5c42.bn" in done.stdout


def test_check_writes_a_page_with_a_value_for_each_channel(tmp_path, bnlab_command):
    path = save(state_dict("bn1", "bn2"), tmp_path / "model.pt")
    output = tmp_path / "page.html"
    code, out, _ = bnlab_command("check", path, "--format", "html", "--output", output)
    assert (code, out) == (0, "")
    page = Page(output.read_text(encoding="utf-8"))
    assert page.unbalanced == []
    assert "running_mean" in json.dumps(page.data)


def test_check_writes_one_page_of_several_targets(tmp_path, bnlab_command):
    for name in ("a", "b"):
        save(state_dict("bn1"), tmp_path / f"{name}.pt")
    code, out, _ = bnlab_command("check", tmp_path, "--format", "html")
    assert code == 0
    assert "2 targets" in Page(out).text


def test_per_channel_puts_values_into_the_json(tmp_path, bnlab_command):
    path = save(state_dict("bn1"), tmp_path / "model.pt")
    plain = json.loads(bnlab_command("check", path, "--format", "json")[1])
    full = json.loads(bnlab_command("check", path, "--format", "json", "--per-channel")[1])
    assert plain["layers"][0]["per_channel"] is None
    assert len(full["layers"][0]["per_channel"]["running_var"]) == full["layers"][0]["channels"]


def test_a_model_that_is_called_through_a_function(bnlab_command, code):
    arguments = ["mine.py:Keyed", "--data", "mine.py:batches", "--forward", "mine.py:keyed", "--format", "json"]
    status, out, err = bnlab_command("check", *arguments, "--metric", "loss", "--device", "cpu")
    diagnosis = DiagnosisRecord.from_json(json.loads(out))
    assert (status, err, diagnosis.target.name, diagnosis.failure) == (0, "", "mine.py:Keyed", None)
    assert diagnosis.numbers.lower_is_better
    assert diagnosis.numbers.eval_running > 0
    status, out, err = bnlab_command("check", *arguments[:3], "--format", "json")
    assert status == 2
    assert json.loads(out)["failure"]


def test_what_a_model_prints_is_not_part_of_the_result(bnlab_command, code):
    status, out, err = bnlab_command("check", "mine:talking", "--data", "mine:batches", "--format", "json")
    assert (status, json.loads(out)["target"]["name"]) == (0, "mine:talking")
    assert "a forward" in err


@pytest.mark.parametrize("metric", ["accuracy", "loss", "miou", "miou:-1"])
def test_every_metric_by_its_name(bnlab_command, code, metric):
    status, out, err = bnlab_command(
        "check", "mine:build", "--data", "mine:batches", "--metric", metric, "--format", "json"
    )
    assert (status, err) == (0, "")
    numbers = DiagnosisRecord.from_json(json.loads(out)).numbers
    assert numbers.lower_is_better == (metric == "loss")


def test_a_loader_as_an_example_and_a_loss(bnlab_command, code):
    status, out, err = bnlab_command(
        "check", "mine.py:build", "--example", "mine.py:loader", "--select", "BN201", "--level", "info"
    )
    assert (status, err) == (1, "")
    assert "BN201" in out
    status, out, err = bnlab_command(
        "check", "mine:build", "--data", "mine:batches", "--loss", "mine:cost", "--format", "json"
    )
    assert (status, err) == (0, "")
    assert DiagnosisRecord.from_json(json.loads(out)).numbers.lower_is_better


def test_the_names_of_files_and_values_are_suggested(bnlab_command, code, healthy):
    assert bnlab_command("check", "helthy.pt")[2].endswith("no such file or directory. Did you mean 'healthy.pt'?\n")
    assert bnlab_command("check", "mne.py:build")[2].endswith("Did you mean 'mine.py'?\n")
    status, out, err = bnlab_command("check", "healthy.pt", "--format", "jsn")
    assert (status, out) == (2, "")
    assert "Did you mean 'json'?" in err
    status, _, err = bnlab_command("check", "healthy.pt", "--level", "warn")
    assert status == 2
    assert "Did you mean 'warning'?" in err
