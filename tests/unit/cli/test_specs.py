import importlib
import subprocess
import sys

import pytest
import torch
from torch import nn

from bnlab.cli.specs import TARGET, load_data, load_example, load_forward, load_loss, load_metric, load_model
from bnlab.errors import UnreadableFile, UsageError

LOADERS = [load_data, load_example, load_metric, load_model, load_loss, load_forward]
FORMS = "package.module:callable or file.py:callable"
SOURCE = """
import sys
import torch
from torch import nn

BATCHES = [(torch.ones(2, 3), torch.zeros(2, dtype=torch.int64))]
number = 3

def batches(): return BATCHES
def stream(): yield from BATCHES
ITERATOR = iter(BATCHES)
def one_shot(): return ITERATOR
def one_tensor(): return torch.ones(3)
def nothing(): return None
def metric(model, data): return 1.0
def later(model, data):
    import spec_later_module
    return spec_later_module.VALUE
def model(): return nn.Linear(3, 2)
def build_network(): return nn.Linear(3, 2)
def loss(model, batch): return 0.0
def forward(model, batch): return model(batch)
def raising(): raise ValueError("two\\nlines.")
def leaving(): sys.exit(3)
def needs(argument): return argument
class Space:
    @staticmethod
    def batches(): return BATCHES
"""


@pytest.fixture
def module(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", sys.path.copy())
    monkeypatch.delenv("BNLAB_DATA", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "spec_module.py").write_text(SOURCE, encoding="utf-8")
    (tmp_path / "spec_later_module.py").write_text("VALUE = 7.0\n", encoding="utf-8")
    importlib.invalidate_caches()
    yield "spec_module"
    for name in [name for name in sys.modules if name.startswith("spec_")]:
        del sys.modules[name]


def refused(call, *arguments):
    with pytest.raises(UsageError) as error:
        call(*arguments)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_what_a_callable_returns(module):
    (batch,) = load_data(f"{module}:batches")
    assert torch.equal(batch[0], torch.ones(2, 3))
    assert load_data(f"{module}:Space.batches") is load_data(f"{module}:batches")
    assert load_example(f"{module}:batches")[0] is batch
    assert torch.equal(load_example(f"{module}:one_tensor"), torch.ones(3))
    assert isinstance(load_model(f"{module}:model"), nn.Linear)


def test_a_metric_is_not_called(module):
    metric = load_metric(f"{module}:metric")
    assert metric is sys.modules[module].metric
    assert load_metric(f"{module}:needs") is sys.modules[module].needs
    assert load_loss(f"{module}:loss") is sys.modules[module].loss
    assert load_forward("spec_module.py:forward") is sys.modules[module].forward


def test_what_is_imported_may_import_from_the_current_folder_when_it_is_used(module):
    before = list(sys.path)
    assert load_metric(f"{module}:later")(nn.Identity(), []) == 7.0
    load_metric(f"{module}:later")
    assert sys.path[: len(before)] == before
    assert len(sys.path) <= len(before) + 1


def test_built_in_names():
    pytest.importorskip("sklearn")
    batches = load_data("digits:train")
    assert sum(len(labels) for _, labels in batches) == 1348
    assert torch.equal(load_example("digits"), load_data("digits")[0][0])


@pytest.mark.parametrize("name", ["accuracy", "loss", "miou", "miou:255", "accuracy:-100"])
def test_the_name_of_a_metric_stands_for_itself(name):
    assert load_metric(name) == name


def test_a_callable_of_a_module_named_like_a_data_set(module, tmp_path, monkeypatch):
    (tmp_path / "mnist.py").write_text("def mine(): return [1]\ndef train(): return [2]\n", encoding="utf-8")
    importlib.invalidate_caches()
    monkeypatch.setitem(sys.modules, "mnist", None)
    del sys.modules["mnist"]
    assert load_data("mnist:mine") == [1]
    with pytest.raises(UnreadableFile, match="mnist: train-images"):
        load_data("mnist:train")


@pytest.mark.parametrize("spec", ["", "nothing", "mnist:", ":f", "a:b:c", "a b:c", "../a:b", "a.py", "1a:b"])
def test_a_value_of_no_known_form(module, spec):
    built_in = "digits, mnist, cifar10, "
    end = f"{FORMS}, got {spec!r}."
    assert refused(load_data, spec).startswith(f"--data: value must be {built_in}{end}")
    assert refused(load_data, spec, "--train-data").startswith(f"--train-data: value must be {built_in}{end}")
    assert refused(load_example, spec).startswith(f"--example: value must be {built_in}{end}")
    assert refused(load_metric, spec).startswith(f"--metric: value must be accuracy, loss, miou, {end}")
    for load, option in ((load_model, "--model"), (load_loss, "--loss"), (load_forward, "--forward")):
        assert refused(load, spec).startswith(f"{option}: value must be {end}")


@pytest.mark.parametrize(
    ("load", "spec", "suggestion"),
    [
        (load_data, "digts", "Did you mean 'digits'?"),
        (load_data, "mnist:", "Did you mean 'mnist'?"),
        (load_data, "digits:tset", "Did you mean 'digits:test'?"),
        (load_example, "cifar:train", "Did you mean 'cifar10:train'?"),
        (load_metric, "acuracy", "Did you mean 'accuracy'?"),
        (load_metric, "mIoU", "Did you mean 'miou'?"),
        (load_model, "spec_module.py", "Name a callable in the file, as in spec_module.py:build."),
        (load_model, "spec_module:modle", "Did you mean 'model'?"),
        (load_model, "spec_module.py:build", "Did you mean 'build_network'?"),
        (load_data, "spec_module:Space.batch", "Did you mean 'batches'?"),
        (load_metric, "spec_modul:metric", "Did you mean 'spec_module'?"),
        (load_loss, "spec_modle.py:loss", "Did you mean 'spec_module.py'?"),
        (load_forward, "spec_module:zzz", "It has batches, stream, one_shot, one_tensor, nothing and 10 more."),
    ],
)
def test_what_the_user_may_have_meant(module, load, spec, suggestion):
    assert refused(load, spec).endswith(f" {suggestion}")


@pytest.mark.parametrize(
    "spec", ["xyz", "spec_module:raising", "spec_module.py:raising", "spec_qqqqqqqqqqqqqq.py:f", "q:f"]
)
def test_nothing_is_suggested_where_nothing_is_alike(module, spec):
    assert "Did you mean" not in refused(load_model, spec)


@pytest.mark.parametrize("load", LOADERS)
def test_what_cannot_be_imported(module, load):
    assert "got 'spec_nowhere:f' (ModuleNotFoundError: No module named 'spec_nowhere')." in refused(
        load, "spec_nowhere:f"
    )
    assert "got 'spec_nowhere.py:f' (FileNotFoundError: no file spec_nowhere.py in " in refused(
        load, "spec_nowhere.py:f"
    )
    assert "(AttributeError: module 'spec_module' has no attribute 'absent')." in refused(load, f"{module}:absent")
    assert "(ModuleNotFoundError: " in refused(load, f"{module}.below:f")


@pytest.mark.parametrize("load", [load_data, load_example, load_model])
def test_what_cannot_be_called(module, load):
    assert refused(load, f"{module}:raising").endswith("got 'spec_module:raising' (ValueError: two lines).")
    assert refused(load, f"{module}:leaving").endswith("(SystemExit: 3).")
    assert "(TypeError: needs() missing 1 required positional argument: 'argument')." in refused(
        load, f"{module}:needs"
    )
    assert "(TypeError: 'int' object is not callable)." in refused(load, f"{module}:number")


@pytest.mark.parametrize("load", LOADERS)
@pytest.mark.parametrize("source", ["1 +", "raise RuntimeError('at import')", "import sys; sys.exit('bye')"])
def test_a_module_that_does_not_import(module, tmp_path, load, source):
    (tmp_path / "spec_broken.py").write_text(source, encoding="utf-8")
    importlib.invalidate_caches()
    assert "got 'spec_broken:f' (" in refused(load, "spec_broken:f")


def test_a_function_that_returns_an_iterator_is_called_for_each_pass(module):
    data = load_data(f"{module}:stream")
    for _ in range(2):
        ((x, label),) = data
        assert torch.equal(x, torch.ones(2, 3))
        assert torch.equal(label, torch.zeros(2, dtype=torch.int64))
    data = load_data(f"{module}:one_shot")
    assert len(list(data)) == 1
    with pytest.raises(UsageError, match=r"^--data spec_module:one_shot: the function must return a new iterator"):
        list(data)


def test_what_is_of_no_use(module):
    assert "must be an iterable of batches, got one tensor" in refused(load_data, f"{module}:one_tensor")
    assert refused(load_data, f"{module}:nothing").startswith("--data spec_module:nothing: ")
    assert refused(load_example, f"{module}:nothing") == "--example: spec_module:nothing must return a batch, got None."
    assert refused(load_metric, f"{module}:number") == (
        "--metric: spec_module:number must be callable as metric(model, data), got int."
    )
    assert refused(load_loss, f"{module}:number") == (
        "--loss: spec_module:number must be callable as loss(model, batch), got int."
    )
    assert refused(load_forward, f"{module}:number") == (
        "--forward: spec_module:number must be callable as forward(model, batch), got int."
    )
    assert refused(load_model, f"{module}:batches") == (
        "--model: spec_module:batches must return a torch.nn.Module, got list."
    )


def test_files_that_are_not_there(module):
    for load in (load_data, load_example):
        with pytest.raises(UnreadableFile, match="Set BNLAB_DATA to the folder"):
            load("cifar10")


def test_importing_the_loaders_imports_no_torch():
    code = "import sys, bnlab.cli.specs; sys.exit('torch' in sys.modules or 'numpy' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.filterwarnings("ignore::FutureWarning:copyreg")
def test_a_target_may_be_an_exported_program_and_other_options_may_not(tmp_path, monkeypatch):
    (tmp_path / "exported_spec.py").write_text(
        "import torch\ndef build():\n    return torch.export.export(torch.nn.BatchNorm1d(2), (torch.randn(3, 2),))\n",
        encoding="utf-8",
    )
    monkeypatch.chdir(tmp_path)
    assert isinstance(load_model("exported_spec:build", TARGET), torch.fx.GraphModule)
    assert "must return a torch.nn.Module, got ExportedProgram" in refused(load_model, "exported_spec:build")
