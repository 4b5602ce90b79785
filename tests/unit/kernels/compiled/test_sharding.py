import copy
import subprocess
import sys

import pytest
import torch
from torch import distributed, nn
from torch.testing import assert_close

import bnlab
from bnlab.kernels.compiled.sharding import is_sharded, register_shardings, replicated_like

threads = pytest.importorskip("torch.testing._internal.common_distributed")
tensor = pytest.importorskip("torch.distributed.tensor")

pytestmark = pytest.mark.filterwarnings("ignore")  # torch's own
LAYERS = {
    "plain": bnlab.nn.BatchNorm2d(4, activation="relu"),
    "cumulative": bnlab.nn.BatchNorm2d(4, momentum=None, affine=False),
    "frozen": bnlab.nn.FrozenBatchNorm2d(4, moves_statistics=True),
    "ghost": bnlab.nn.GhostBatchNorm2d(4, ghost_size=4),
    "renorm": bnlab.nn.BatchRenorm2d(4, r_max=3.0, d_max=2.0),
}
X = torch.randn(8, 4, 5, 5) * 2 + torch.arange(8).reshape(8, 1, 1, 1)  # the halves of the batch differ
KEEP = torch.rand(8, 5, 5) > 0.4


def on_two_processes(check):
    """Run a check on two processes, which are threads here, with their mesh."""

    @threads.spawn_threads_and_init_comms(world_size=2)
    def run(_):
        check(distributed.device_mesh.init_device_mesh("cpu", (2,)))

    run(None)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("dimension", [0, 1, 2])
@pytest.mark.parametrize("name", LAYERS)
def test_a_sharded_batch_is_normalised_as_a_whole(name, dimension, training):
    plain = copy.deepcopy(LAYERS[name]).train(training)
    sharded = copy.deepcopy(plain)
    expected = X.clone().requires_grad_()
    for _ in range(2):
        y = plain(expected)
    y.square().sum().backward()

    def check(mesh):
        layer = tensor.distribute_module(copy.deepcopy(sharded), mesh)
        x = tensor.distribute_tensor(X.clone(), mesh, [tensor.Shard(dimension)]).requires_grad_()
        for _ in range(2):
            result = layer(x)
        result.square().sum().backward()
        if dimension == 1 or not training:
            assert result.placements == x.placements
        assert_close(result.full_tensor(), y, rtol=1e-5, atol=1e-5)
        assert_close(x.grad.full_tensor(), expected.grad, rtol=1e-4, atol=1e-4)
        for key, buffer in plain.named_buffers():
            assert_close(layer.get_buffer(key).full_tensor(), buffer)
        assert int(layer.skipped_batches) == 0

    on_two_processes(check)


def test_statistics_of_one_process_alone_would_differ():
    alone = bnlab.nn.BatchNorm2d(4)(X[:4])
    assert not torch.allclose(alone, bnlab.nn.BatchNorm2d(4)(X)[:4], atol=0.1)


def test_torchs_layer_takes_the_whole_batch_too():
    expected = nn.BatchNorm2d(4)(X)

    def check(mesh):
        layer = tensor.distribute_module(nn.BatchNorm2d(4), mesh)
        result = layer(tensor.distribute_tensor(X.clone(), mesh, [tensor.Shard(0)]))
        assert result.placements == (tensor.Replicate(),)
        assert_close(result.full_tensor(), expected)

    on_two_processes(check)


@pytest.mark.parametrize("dimension", [0, 1])
def test_a_mask_and_a_batch_that_is_not_finite(dimension):
    plain = bnlab.nn.BatchNorm2d(4)
    spoiled = X.clone()
    spoiled[7, 3] = torch.inf
    expected = copy.deepcopy(plain)(X, mask=KEEP)

    def check(mesh):
        layer = tensor.distribute_module(copy.deepcopy(plain), mesh)
        keep = tensor.distribute_tensor(KEEP, mesh, [tensor.Replicate()])
        x = tensor.distribute_tensor(X.clone(), mesh, [tensor.Shard(dimension)])
        assert_close(layer(x, mask=keep).full_tensor(), expected)
        before = layer.running_mean.full_tensor().clone()
        layer(tensor.distribute_tensor(spoiled, mesh, [tensor.Shard(dimension)]))
        assert int(layer.skipped_batches) == 1
        assert int(layer.num_batches_tracked.full_tensor()) == 1
        assert_close(layer.running_mean.full_tensor(), before, rtol=0, atol=0)

    on_two_processes(check)


def test_what_every_process_holds_becomes_a_replicated_tensor():
    def check(mesh):
        register_shardings()
        x = tensor.distribute_tensor(X.clone(), mesh, [tensor.Shard(0)])
        assert is_sharded(x)
        values = torch.ones(3)
        assert not is_sharded(values)
        assert replicated_like(values, X) is values
        assert replicated_like(values, x).placements == (tensor.Replicate(),)
        assert torch.ops.bnlab.copied(x).placements == (tensor.Shard(0),)

    on_two_processes(check)


def test_an_import_does_not_load_it():
    code = "import sys, torch, bnlab.nn; bnlab.nn.BatchNorm1d(2)(torch.randn(3, 2)); "
    code += "assert 'torch.distributed.tensor' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
