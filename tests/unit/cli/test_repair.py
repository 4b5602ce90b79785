"""What `bnlab repair` prints, what it writes, and what it leaves unchanged."""

from __future__ import annotations

import json
import stat
from argparse import Namespace
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tests.unit.report.html_samples import Page
from torch import nn

pytestmark = pytest.mark.trains

SPECS = """
import torch
from torch import nn

def blobs(count, seed):
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(0, 2, (count,), generator=generator)
    points = 4 + torch.randn(count, 8, generator=generator) + 3 * labels[:, None]
    return list(zip(points.split(32), labels.split(32), strict=True))

def training():
    return blobs(640, 0)

def held_out():
    return blobs(320, 1)

def empty():
    return []

def build():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 16, bias=False), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 2))

def ready():
    model = build()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    for _ in range(6):
        for points, labels in training():
            optimizer.zero_grad()
            torch.nn.functional.cross_entropy(model(points), labels).backward()
            optimizer.step()
    return model.eval()

def bare_loss(model, batch):
    return torch.nn.functional.cross_entropy(model(batch[0]), batch[1])

class Keyed(nn.Module):
    def __init__(self):
        super().__init__()
        self.net = stale()
        self.eval()

    def forward(self, points, scale):
        return self.net(points * scale)

def keyed(model, batch):
    return model(batch[0], scale=1.0)

def stale():
    model = ready()
    model[1].running_mean.add_(30)
    return model
"""


@pytest.fixture
def specs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "repair_specs.py").write_text(SPECS)
    import importlib
    import sys

    sys.modules.pop("repair_specs", None)
    importlib.invalidate_caches()
    return importlib.import_module("repair_specs")


OPTIONS = (
    *("--data", "repair_specs:held_out", "--train-data", "repair_specs:training", "--metric", "accuracy"),
    *("--model", "repair_specs:build"),
)


def identical(left, right):
    return (
        left.dtype == right.dtype
        and left.shape == right.shape
        and left.untyped_storage().tolist() == right.untyped_storage().tolist()
    )


def nested(model):
    state = {f"module.{name}": tensor for name, tensor in model.state_dict().items()}
    return {
        "epoch": 7,
        "best": 0.5,
        "net": {"state_dict": state},
        "ema": {"other": torch.randn(3)},
        "names": ["a", "b"],
    }


@pytest.mark.parametrize("legacy", [False, True])
def test_a_new_file_with_the_nesting_of_the_old_one_in_which_only_the_statistics_differ(specs, bnlab_command, legacy):
    torch.save(nested(specs.stale()), "old.pt", _use_new_zipfile_serialization=not legacy)
    old_bytes = Path("old.pt").read_bytes()
    code, out, err = bnlab_command("repair", "old.pt", *OPTIONS, "--output", "new.pt")
    assert (code, err) == (0, "")
    assert "repair: 1 layer changed, buffers only" in out
    assert "metric: 0." in out
    assert Path("old.pt").read_bytes() == old_bytes
    assert (Path("new.pt").read_bytes()[:2] == b"PK") is not legacy
    old, new = (torch.load(path, weights_only=True) for path in ("old.pt", "new.pt"))
    assert (new["epoch"], new["best"], new["names"]) == (7, 0.5, ["a", "b"])
    assert identical(new["ema"]["other"], old["ema"]["other"])
    before, after = old["net"]["state_dict"], new["net"]["state_dict"]
    assert list(before) == list(after)
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {"module.1.running_mean", "module.1.running_var"}
    code, out, _ = bnlab_command("check", "new.pt", *OPTIONS)
    assert code == 0


def test_safetensors_keep_their_metadata(specs, bnlab_command):
    save_file(specs.stale().state_dict(), "old.safetensors", {"format": "pt", "author": "someone"})
    code, _, err = bnlab_command("repair", "old.safetensors", *OPTIONS, "--output", "new.safetensors")
    assert (code, err) == (0, "")
    with safe_open("new.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt", "author": "someone"}
    old, new = load_file("old.safetensors"), load_file("new.safetensors")
    assert {name for name in old if not torch.equal(old[name], new[name])} == {"1.running_mean", "1.running_var"}


def test_a_state_dict_of_a_torch_file_as_safetensors_and_back(specs, bnlab_command):
    torch.save(nested(specs.stale()), "old.pt")
    assert bnlab_command("repair", "old.pt", *OPTIONS, "--output", "new.safetensors")[0] == 0
    assert set(load_file("new.safetensors")) == {f"module.{name}" for name in specs.build().state_dict()}
    save_file(specs.stale().state_dict(), "flat.safetensors")
    assert bnlab_command("repair", "flat.safetensors", *OPTIONS, "--output", "flat.pt")[0] == 0
    assert set(torch.load("flat.pt", weights_only=True)) == set(specs.build().state_dict())


def test_statistics_keep_the_dtype_they_have_in_the_file(specs, bnlab_command):
    state = {name: t.half() if t.is_floating_point() else t for name, t in specs.stale().state_dict().items()}
    torch.save(state, "half.pt")
    assert bnlab_command("repair", "half.pt", *OPTIONS, "--output", "new.pt")[0] == 0
    new = torch.load("new.pt", weights_only=True)
    assert {t.dtype for name, t in new.items() if t.is_floating_point()} == {torch.float16}
    assert torch.equal(new["0.weight"], state["0.weight"])
    assert not torch.equal(new["1.running_mean"], state["1.running_mean"])


def test_a_model_that_comes_from_code_is_written_as_a_state_dict(specs, bnlab_command):
    options = OPTIONS[:6]
    assert bnlab_command("repair", "repair_specs:stale", *options, "--output", "new.safetensors")[0] == 0
    assert bnlab_command("repair", "repair_specs:stale", *options, "--output", "new.pt")[0] == 0
    assert set(load_file("new.safetensors")) == set(torch.load("new.pt", weights_only=True))


def test_a_dry_run_prints_the_plan_and_writes_nothing(specs, bnlab_command, tmp_path):
    torch.save(specs.stale().state_dict(), "old.pt")
    before = sorted(path.name for path in tmp_path.iterdir() if path.is_file())
    code, out, err = bnlab_command("repair", "old.pt", *OPTIONS, "--dry-run")
    assert (code, err) == (1, "")
    assert "nothing has been changed yet" in out
    assert sorted(path.name for path in tmp_path.iterdir() if path.is_file()) == before
    code, out, _ = bnlab_command("repair", "old.pt", *OPTIONS, "--dry-run", "--format", "json")
    record = json.loads(out)
    assert record["planned"]
    assert record["schema"] == "bnlab.receipt/1"


def test_a_healthy_model_is_written_as_it_is(specs, bnlab_command):
    torch.save(specs.ready().state_dict(), "old.pt")
    code, out, err = bnlab_command("repair", "old.pt", *OPTIONS, "--output", "new.pt")
    assert (code, err) == (0, "")
    assert "nothing to repair" in out
    old, new = (torch.load(path, weights_only=True) for path in ("old.pt", "new.pt"))
    assert all(identical(old[name], new[name]) for name in old)


def test_a_repair_that_the_metric_rejects_is_not_written(specs, bnlab_command, tmp_path):
    (tmp_path / "repair_metric.py").write_text(
        "def worse(model, data):\n    m = model[1].running_mean\n    return 0.0 if m is None else float(m.mean())\n"
    )
    torch.save(specs.stale().state_dict(), "old.pt")
    options = [*OPTIONS[:5], "repair_metric:worse", *OPTIONS[6:]]
    code, out, err = bnlab_command("repair", "old.pt", *options, "--output", "new.pt")
    assert code == 1
    assert "recalibrating makes the evaluation data worse" in out
    assert err == "new.pt is not written, because nothing was repaired\n"
    assert not (tmp_path / "new.pt").exists()


def test_a_bias_that_was_dropped_is_not_in_the_new_file(specs, bnlab_command):
    model = specs.ready()
    wide = nn.Sequential(nn.Linear(8, 16), *model[1:])
    wide[0].weight = model[0].weight
    with torch.no_grad():
        wide[1].running_mean += wide[0].bias
    Path("repair_wide.py").write_text(
        "from torch import nn\n\ndef build():\n"
        "    return nn.Sequential(nn.Linear(8, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 2))\n"
    )
    torch.save(wide.state_dict(), "old.pt")
    options = [*OPTIONS[:6], "--model", "repair_wide:build", "--level", "info", "--safety", "exact"]
    _, out, err = bnlab_command("repair", "old.pt", *options, "--output", "new.pt")
    assert err == ""
    assert "bias: a parameter -> dropped (0)" in out
    old, new = (torch.load(path, weights_only=True) for path in ("old.pt", "new.pt"))
    assert old.keys() - new.keys() == {"0.bias"}
    x = specs.held_out()[0][0]
    bare = specs.build().eval()
    bare.load_state_dict(new)
    torch.testing.assert_close(bare(x), wide.eval()(x), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("old.pt", *OPTIONS), "error: --output: path must be given, got none. Or print the plan only: --dry-run.\n"),
        (("old.pt", *OPTIONS, "--output", "old.pt"), "error: --output: path must not be an input, got old.pt.\n"),
        (("old.pt", *OPTIONS, "--output", "no/new.pt"), "error: --output: path must be a file in an existing folder"),
        (
            ("old.pt", *OPTIONS[:6], "--output", "new.pt"),
            "error: --model: value must be given with old.pt, to run data through it, got none.",
        ),
        (("gone.pt", *OPTIONS, "--output", "new.pt"), "error: gone.pt: file must be readable"),
        (("cut.pt", *OPTIONS, "--output", "new.pt"), "error: cut.pt: file must be a whole checkpoint"),
        (("odd.pt", *OPTIONS, "--output", "new.pt"), "error: odd.pt: file must hold tensors and plain data only"),
        (("net.onnx", *OPTIONS, "--output", "new.pt"), "error: net.onnx: target must be a model of torch"),
        (
            ("old.pt", "--data", "repair_specs:empty", *OPTIONS[6:], "--output", "new.pt"),
            (
                "error: data: it must hold at least one batch, got none. Look at its length: a loader with "
                "drop_last=True has no batch if it has fewer samples than one.\n"
            ),
        ),
        (("old.pt", "--data", "nowhere:data", *OPTIONS[6:], "--output", "new.pt"), "error: --data: value must be"),
    ],
)
def test_what_cannot_be_done_is_one_line_and_writes_nothing(specs, bnlab_command, tmp_path, arguments, message):
    torch.save(specs.stale().state_dict(), "old.pt")
    (tmp_path / "cut.pt").write_bytes((tmp_path / "old.pt").read_bytes()[:3000])
    torch.save({"args": Namespace(lr=0.1), "state_dict": specs.stale().state_dict()}, "odd.pt")
    code, out, err = bnlab_command("repair", *arguments)
    assert code == 2
    assert out == ""
    assert err.startswith(message)
    assert err.count("\n") == 1
    assert not (tmp_path / "new.pt").exists()
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".new")]


def test_the_new_file_has_ordinary_permissions(specs, bnlab_command, tmp_path):
    torch.save(specs.stale().state_dict(), "old.pt")
    bnlab_command("repair", "old.pt", *OPTIONS, "--output", "new.pt")
    assert stat.S_IMODE((tmp_path / "new.pt").stat().st_mode) == stat.S_IMODE((tmp_path / "old.pt").stat().st_mode)


def test_repair_reports_what_a_state_dict_cannot_hold(specs, bnlab_command):
    Path("repair_frozen.py").write_text(
        "import repair_specs\n\ndef build():\n"
        "    model = repair_specs.ready().train()\n    model[1].requires_grad_(False)\n    return model\n"
    )
    options = [*OPTIONS[:6], "--safety", "behaviour", "--output", "new.pt"]
    code, out, err = bnlab_command("repair", "repair_frozen:build", *options)
    assert code == 0
    assert "FrozenBatchNorm1d" in out
    assert err == "a state dict does not record that layers are frozen: call bnlab.freeze after loading it\n"


def test_repair_prints_a_page(tmp_path, bnlab_command):
    spec = "bnlab.lab.stuck_statistics:build_network"
    code, out, _ = bnlab_command(
        "repair", spec, "--data", "digits", "--format", "html", "--output", tmp_path / "mended.pt"
    )
    assert code in (0, 1)
    assert Page(out).unbalanced == []
    assert spec in out


def test_a_file_with_foreign_objects_beside_the_state_dict_gives_a_new_state_dict(specs, bnlab_command):
    state = {f"_orig_mod.{name}": tensor for name, tensor in specs.stale().state_dict().items()}
    torch.save({"args": Namespace(lr=0.1), "state_dict": state}, "old.pt")
    code, out, err = bnlab_command("repair", "old.pt", *OPTIONS, "--output", "new.safetensors")
    assert (code, err) == (0, "")
    assert "repair: 1 layer changed, buffers only" in out
    new = load_file("new.safetensors")
    assert new.keys() == state.keys()
    changed = {name for name in state if not torch.equal(state[name], new[name])}
    assert changed == {"_orig_mod.1.running_mean", "_orig_mod.1.running_var"}
    code, _, err = bnlab_command("check", "new.safetensors", *OPTIONS)
    assert (code, err) == (0, "")


def test_a_model_that_is_called_through_a_function(specs, bnlab_command):
    arguments = (
        *("repair", "repair_specs.py:Keyed", "--forward", "repair_specs.py:keyed", "--device", "cpu"),
        *("--data", "repair_specs.py:held_out", "--train-data", "repair_specs.py:training", "--output", "new.pt"),
    )
    code, out, err = bnlab_command(*arguments, "--metric", "loss")
    assert (code, err) == (0, "")
    assert "running statistics: " in out
    new = torch.load("new.pt", weights_only=True)
    assert float(new["net.1.running_mean"].mean()) == pytest.approx(float(specs.ready()[1].running_mean.mean()), abs=1)
    code, out, err = bnlab_command(*arguments[:2], *arguments[6:])
    assert (code, out) == (2, "")
    assert "forward" in err


def test_the_loss_of_the_caller_decides(specs, bnlab_command):
    code, out, err = bnlab_command(
        "repair", "repair_specs:stale", "--data", "repair_specs:held_out", "--train-data", "repair_specs:training",
        "--loss", "repair_specs.py:bare_loss", "--output", "new.pt",
    )  # fmt: skip
    assert (code, err) == (0, "")
    assert "running statistics: " in out
    code, out, err = bnlab_command(
        "repair",
        "repair_specs:stale",
        "--data",
        "repair_specs:held_out",
        "--loss",
        "repair_specs:bare_los",
        "--dry-run",
    )
    assert (code, out) == (2, "")
    assert err.endswith("Did you mean 'bare_loss'?\n")


def test_a_higher_accuracy_is_never_worse(specs, bnlab_command):
    code, out, err = bnlab_command(
        "repair",
        "repair_specs:stale",
        "--data",
        "repair_specs:held_out",
        "--metric",
        "accuracy",
        "--minimize",
        "--dry-run",
    )
    assert (code, out) == (2, "")
    assert err == (
        "error: metric: lower_is_better must be False for accuracy, got True. Leave out lower_is_better=True, or "
        "--minimize on the command line.\n"
    )
