"""Every command looks through the wrappers of torch, and does to the model inside what it does to a bare model."""

import pytest
import torch
from torch import distributed, nn
from torch.testing import assert_close

import bnlab


def network():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 4, 3),
        nn.BatchNorm2d(4),
        nn.ReLU(),
        nn.Conv2d(4, 4, 3),
        nn.BatchNorm2d(4),
        nn.Flatten(),
        nn.Linear(4, 3),
    ).eval()


def sharded(model):
    fsdp = pytest.importorskip("torch.distributed.fsdp")
    return fsdp.FullyShardedDataParallel(model, device_id=torch.device("cpu"), use_orig_params=True)


def fully_sharded(model):
    fsdp = pytest.importorskip("torch.distributed.fsdp")
    return fsdp.fully_shard(model, mesh=distributed.device_mesh.init_device_mesh("cpu", (1,)))


WRAPPERS = {
    "DataParallel": nn.DataParallel,
    "DDP": nn.parallel.DistributedDataParallel,
    "compiled": lambda model: torch.compile(model, backend="eager"),
    "compiled DDP": lambda model: torch.compile(nn.parallel.DistributedDataParallel(model), backend="eager"),
    "FSDP": sharded,
    "fully_shard": fully_sharded,
}
X = torch.randn(8, 3, 5, 5)
DATA = [(torch.randn(16, 3, 5, 5) + 1, torch.randint(3, (16,))) for _ in range(4)]

pytestmark = [
    pytest.mark.filterwarnings(  # torch's own
        "ignore::FutureWarning", "ignore:FSDP is switching", "ignore:The .grad attribute"
    ),
    pytest.mark.cpu_only("a process group of gloo"),
]


@pytest.fixture(params=WRAPPERS)
def whole_and_model(request):
    """Return a wrapper and the model inside."""
    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    model = network()
    yield WRAPPERS[request.param](model), model
    distributed.destroy_process_group()
    torch._dynamo.reset()


def layers_of(receipt):
    return {change.layer for change in receipt.changes.changes}


def test_check(whole_and_model):
    whole, _ = whole_and_model
    expected = bnlab.check(network(), data=DATA)
    diagnosis = bnlab.check(whole, data=DATA)
    assert [layer.name for layer in diagnosis.layers] == ["1", "4"]
    assert diagnosis.layers == expected.layers
    assert [finding.code for finding in diagnosis.findings] == [finding.code for finding in expected.findings]


@pytest.mark.parametrize("command", ["recalibrate", "repair"])
def test_new_statistics(whole_and_model, command):
    whole, model = whole_and_model
    before, bare = whole(X), network()

    def run(model):
        if command == "recalibrate":
            return bnlab.recalibrate(model, DATA)
        return bnlab.repair(model, data=DATA, force=True)

    run(bare)
    receipt = run(whole)
    assert receipt.model is whole
    assert {"1", "4"} <= layers_of(receipt)
    assert_close(whole.eval()(X), bare(X))
    assert not torch.allclose(whole(X), before, atol=1e-3)
    assert receipt.undo() is whole
    assert_close(whole(X), before, rtol=0, atol=0)
    assert model[1].running_mean.abs().max() == 0


def test_convert(whole_and_model):
    whole, model = whole_and_model
    whole.train()(X)
    receipt = bnlab.convert(whole, bnlab.nn.BatchNorm2d, layers=["1"])
    assert receipt.model is whole
    assert layers_of(receipt) == {"1"}
    spoiled = X.clone()
    spoiled[0] = torch.inf
    whole(spoiled)
    assert model[1].running_mean.isfinite().all()  # only the class of bnlab skips such a batch
    assert int(model[1].skipped_batches) == 1
    receipt.undo()
    assert type(model[1]) is nn.BatchNorm2d
    whole(spoiled)
    assert not model[1].running_mean.isfinite().all()


def test_fuse(whole_and_model):
    whole, model = whole_and_model
    expected = whole(X)
    receipt = bnlab.convert(whole, bnlab.nn.BatchNorm2d, fuse=True, example=X)
    assert model[1].activation == "relu"
    assert_close(whole(X), expected)
    receipt.undo()
    assert_close(whole(X), expected, rtol=0, atol=0)


def test_freeze_and_unfreeze(whole_and_model):
    whole, model = whole_and_model
    expected, by_batch = whole(X), whole.train()(X)
    for layer in (model[1], model[4]):
        layer.reset_running_stats()
    receipt = bnlab.freeze(whole)
    assert receipt.model is whole
    assert layers_of(receipt) == {"1", "4"}
    assert_close(whole(X), expected)
    bnlab.unfreeze(whole)
    assert_close(whole(X), by_batch)


def test_fold(whole_and_model):
    whole, model = whole_and_model
    expected = whole(X)
    if hasattr(model, "unshard"):
        with pytest.raises(bnlab.errors.UsageError, match=r"copy\.deepcopy must accept it"):
            bnlab.fold(whole, X)
        return
    receipt = bnlab.fold(whole, X)
    assert type(receipt.model) is nn.Sequential
    assert not any(isinstance(module, nn.BatchNorm2d) for module in receipt.model.modules())
    assert_close(receipt.model(X), expected)
    assert receipt.undo() is whole
    assert_close(whole(X), expected, rtol=0, atol=0)


def test_the_names_of_a_wrapper_select_layers_too(whole_and_model):
    whole, model = whole_and_model
    names = [name for name, module in whole.named_modules() if module is model[4]]
    assert layers_of(bnlab.freeze(whole, layers=names)) == {"4"}
    bnlab.unfreeze(whole)
    receipt = bnlab.recalibrate(whole, DATA, layers=names)
    assert {change.layer for change in receipt.changes.changes if "statistics" in change.what} == {"4"}


def test_a_wrapper_within_a_model_keeps_its_name():
    model = nn.Sequential(nn.DataParallel(network()))
    assert [layer.name for layer in bnlab.check(model).layers] == ["0.module.1", "0.module.4"]
