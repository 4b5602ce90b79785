import pytest
import torch
from torch import distributed, nn
from torch.optim.swa_utils import AveragedModel

from bnlab.conventions import WRAPPER_PREFIXES
from bnlab.observe.wrappers import has_no_mode, is_compiled, path_inside, unwrapped, wrapped


def compiled(model):
    return torch.compile(model, backend="eager")


@pytest.fixture(params=["gloo", "fake"])
def processes(request):
    """Start a process group, and return its size."""
    if request.param == "fake":
        fake = pytest.importorskip("torch.testing._internal.distributed.fake_pg")
        distributed.init_process_group("fake", store=fake.FakeStore(), rank=0, world_size=2)
    else:
        distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    yield distributed.get_world_size()
    distributed.destroy_process_group()


@pytest.mark.parametrize(
    ("wrap", "path"),
    [
        (lambda model: model, "0"),
        (nn.DataParallel, "module.0"),
        (compiled, "_orig_mod.0"),
        (lambda model: nn.DataParallel(compiled(model)), "module._orig_mod.0"),
        (lambda model: compiled(nn.DataParallel(model)), "_orig_mod.module.0"),
    ],
)
def test_the_model_inside(wrap, path):
    model = nn.Sequential(nn.BatchNorm1d(3))
    whole = wrap(model)
    assert unwrapped(whole) is model
    assert whole.get_submodule(path) is model[0]
    assert path_inside(whole, path) == "0"
    assert path_inside(whole, "0") == "0"
    assert has_no_mode(whole) is (whole is not model)
    assert path.removesuffix("0") in ("", *WRAPPER_PREFIXES, "module._orig_mod.", "_orig_mod.module.")


def test_which_modules_are_compiled():
    model = nn.Sequential(nn.BatchNorm1d(3))
    assert is_compiled(compiled(model))
    for other in (model, nn.DataParallel(compiled(model)), nn.Sequential(compiled(model))):
        assert not is_compiled(other)


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore:FSDP is switching")  # torch's own
def test_parallel_models_of_one_process_and_of_two(processes):
    from torch.distributed.fsdp import FullyShardedDataParallel

    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))
    assert wrapped(nn.parallel.DistributedDataParallel(model)) is model
    sharded = FullyShardedDataParallel(model, device_id=torch.device("cpu"))
    assert wrapped(sharded) is (model if processes == 1 else None)


def test_a_path_that_holds_inside_stays():
    model = nn.ModuleDict({"module": nn.Sequential(nn.BatchNorm1d(3))})
    assert path_inside(nn.DataParallel(model), "module.0") == "module.0"
    assert path_inside(nn.DataParallel(model), "module.*") == "module.*"


def test_a_module_that_does_something_of_its_own_is_no_wrapper():
    class Scaled(nn.Module):
        def __init__(self):
            super().__init__()
            self.module = nn.BatchNorm1d(3)

        def forward(self, x):
            return self.module(2 * x)

    assert wrapped(Scaled()) is None
    assert not has_no_mode(Scaled())
    averaged = AveragedModel(nn.Linear(2, 2))
    assert unwrapped(averaged) is averaged
    assert has_no_mode(averaged)
