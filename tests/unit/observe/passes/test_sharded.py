import pytest
import torch
from torch import distributed, nn
from torch.testing import assert_close

import bnlab
from bnlab.observe.passes.sharded import gathered

fsdp = pytest.importorskip("torch.distributed.fsdp")


def network():
    torch.manual_seed(0)
    inner = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU())
    return nn.Sequential(inner, nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(4, 3)).eval()


DATA = [(torch.randn(16, 3, 5, 5) + 1, torch.randint(3, (16,))) for _ in range(4)]


@pytest.fixture(params=[False, True])
def sharded(request):
    """Return a sharded model, one of whose parts is sharded by itself in the second case."""
    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    mesh = distributed.device_mesh.init_device_mesh("cpu", (1,))
    model = network()
    if request.param:
        fsdp.fully_shard(model[0], mesh=mesh)
    yield fsdp.fully_shard(model, mesh=mesh)
    distributed.destroy_process_group()


def is_whole(model):
    return not any(hasattr(parameter, "full_tensor") for parameter in model.parameters())


def test_parameters_are_whole_in_the_block_and_after_each_forward(sharded):
    assert not is_whole(sharded[0])
    with gathered(sharded):
        for _ in range(2):
            sharded(DATA[0][0]).sum().backward()
            assert is_whole(sharded)
        with gathered(sharded):
            assert is_whole(sharded)
        assert is_whole(sharded)
    assert not is_whole(sharded[0])
    assert not is_whole(sharded[1])


def whole_parameters(model):
    """Return the names of the parameters that FSDP leaves whole after a forward, and after its backward."""
    output = model(DATA[0][0])
    after_forward = {name for name, parameter in model.named_parameters() if not hasattr(parameter, "full_tensor")}
    output.sum().backward()
    after_backward = {name for name, parameter in model.named_parameters() if not hasattr(parameter, "full_tensor")}
    return after_forward, after_backward


def test_the_settings_of_fsdp_come_back(sharded):
    is_split = isinstance(sharded[0], fsdp.FSDPModule)
    names = {name for name, _ in sharded.named_parameters() if not (is_split and name.startswith("0."))}
    with gathered(sharded):
        pass
    assert whole_parameters(sharded) == (names, set())
    with gathered(sharded):
        assert len(whole_parameters(sharded)[1]) == 10
    assert whole_parameters(sharded) == (names, set())


def test_settings_of_the_caller_come_back(sharded):
    sharded.set_reshard_after_forward(True)
    sharded.set_reshard_after_backward(False)
    everything = {name for name, _ in sharded.named_parameters()}
    assert whole_parameters(sharded) == (set(), everything)
    with gathered(sharded):
        pass
    assert whole_parameters(sharded) == (set(), everything)


def test_a_model_that_is_not_sharded_is_left_alone():
    model = network()
    parameters = list(model.parameters())
    with gathered(model):
        assert all(one is other for one, other in zip(parameters, model.parameters(), strict=True))


def test_commands_on_a_sharded_model(sharded):
    plain = network()
    assert bnlab.check(sharded, data=DATA).layers == bnlab.check(plain, data=DATA).layers
    for command in (bnlab.recalibrate, lambda model, data: bnlab.repair(model, data=data, force=True)):
        receipts = [command(model, DATA) for model in (sharded, plain)]
        assert_close(sharded(DATA[0][0]), plain(DATA[0][0]))
        for receipt in receipts:
            receipt.undo()
        assert_close(sharded(DATA[0][0]), plain(DATA[0][0]))
