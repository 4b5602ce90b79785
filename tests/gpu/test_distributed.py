"""Data parallel training with one and two processes, and layers on several devices of one process."""

from __future__ import annotations

import copy

import pytest
import torch
from tests.gpu import ranks
from tests.gpu.cases import assert_moved, assert_right, batch_of, expected_of, layer_for, run
from torch import distributed, multiprocessing, nn
from torch.testing import assert_close

import bnlab


def seen_by(world, backend, device, folder):
    """Run the processes, and return what each of them saw."""
    arguments = (world, backend, device.type, str(folder))
    if world == 1:
        ranks.train(0, *arguments)
    else:
        multiprocessing.spawn(ranks.train, arguments, nprocs=world)
    return [torch.load(folder / f"{rank}.pt") for rank in range(world)]


def alone(rank):
    """Return the gradients and the state of a process without the others, in float64 on the CPU."""
    net = ranks.network().double()
    ranks.loss_of(net(ranks.batch_of_rank(rank).double())).backward()
    return {name: parameter.grad for name, parameter in net.named_parameters()}, net.state_dict()


def processes(world, backend):
    def needs_devices(count):
        return pytest.mark.skipif(torch.cuda.device_count() < count, reason=f"needs {count} GPUs")

    marks = [needs_devices(world)] if backend == "nccl" else []  # nccl refuses two processes on one device
    return pytest.param(world, backend, marks=marks, id=f"{world} {backend}")


@pytest.mark.filterwarnings("ignore")  # of torch, about the devices of process groups
@pytest.mark.parametrize(
    ("world", "backend"), [processes(1, "gloo"), processes(1, "nccl"), processes(2, "gloo"), processes(2, "nccl")]
)
def test_data_parallel_training(world, backend, hardware, tmp_path):
    if not distributed.is_backend_available(backend):
        pytest.skip(f"needs a torch with {backend}")
    seen = seen_by(world, backend, hardware, tmp_path)
    expected = [alone(rank) for rank in range(world)]
    for rank, (own, (_, state)) in enumerate(zip(seen, expected, strict=True)):
        for name, gradient in own["gradients"].items():  # of convolutions that may round to TF32
            mean = sum(gradients[name] for gradients, _ in expected) / world
            assert float((gradient.double() - mean).abs().max()) <= 5e-3 * float(mean.abs().max()), name
        for name, value in own["state"].items():
            assert_close(value.to(state[name].dtype), state[name], rtol=1e-2, atol=1e-3)
        assert (own["batches"], own["skipped"]) == ((1, 1) if rank == world - 1 else (2, 0))
        assert own["finite"]
        assert all(torch.equal(own["gradients"][name], seen[0]["gradients"][name]) for name in own["gradients"])
        assert "backend=" in own["backend"]


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs 2 GPUs")
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_a_layer_on_a_device_that_is_not_current(layout, hardware):
    other = torch.device("cuda", 1 - torch.cuda.current_device())
    batch, expected = expected_of(batch_of((4, 24, 14, 14), torch.float32, residual=True), "relu")
    for device in (other, torch.device("cuda", torch.cuda.current_device()), other):
        layer = layer_for(batch, device, activation="relu")
        results = run(layer, batch, layout, device)
        assert_right(results, expected, batch)
        assert_moved(layer, expected, 0.1)
        assert {t.device for t in (*results.tensors(), *layer.buffers(), layer.skipped_batches)} == {device}


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs 2 GPUs")
@pytest.mark.filterwarnings("ignore")
def test_the_replicas_of_torch_on_two_devices(hardware):
    net = nn.Sequential(nn.Conv2d(3, 8, 3), bnlab.nn.BatchNorm2d(8, activation="relu")).to("cuda:0")
    x = torch.randn(8, 3, 9, 9).cuda(0)
    expected = torch.cat([copy.deepcopy(net)(part) for part in x.chunk(2)])
    y = nn.DataParallel(net, [0, 1])(x)
    assert_close(y, expected, rtol=1e-5, atol=1e-5)
    y.sum().backward()
    assert net[1].weight.grad.isfinite().all()
