import copy
import pickle
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.host_reads import as_on_a_device, host_reads
from tests.traces import differences, trace_of, trace_of_process
from torch import distributed, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import update_bn
from torch.utils.checkpoint import checkpoint

import bnlab
from bnlab.errors import NoBatchNorm, UsageError
from bnlab.watching.once_per_step import is_deferred

KINDS = [nn.BatchNorm1d, bnlab.nn.BatchNorm1d]


def network(kind=nn.BatchNorm1d, **options):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 3), kind(3, **options), nn.Tanh(), nn.Linear(3, 2))


def sgd(model, lr=0.0, **options):
    return torch.optim.SGD(model.parameters(), lr=lr, **options)


def inputs(model, x):
    """Return what the BN layer of a network receives."""
    with torch.no_grad():
        return model[0](x).double()


def expected(values, momentum=0.1, mean=0.0, var=1.0):
    """Return the running statistics after one update by values of shape (N, C), in float64."""
    return (1 - momentum) * mean + momentum * values.mean(0), (1 - momentum) * var + momentum * values.var(0)


def ulps(actual, exact):
    """Return the largest distance from exact values in ulp of the dtype of `actual`."""
    rounded = exact.to(actual.dtype)
    step = (torch.nextafter(rounded.abs(), torch.tensor(torch.inf, dtype=rounded.dtype)) - rounded.abs()).double()
    return float(((actual.double() - exact).abs() / step).max())


def require_moved(layer, values, batches=1, **options):
    assert int(layer.num_batches_tracked) == batches
    for actual, exact in zip((layer.running_mean, layer.running_var), expected(values, **options), strict=True):
        assert ulps(actual, exact) <= 1


def train(model, optimizer, parts, *, use_reentrant=None, scaler=None, gradient=1.0):
    """Take one step with several micro-batches."""
    for part in parts:
        if use_reentrant is None:
            y = model(part)
        else:
            y = checkpoint(model, part.detach().requires_grad_(), use_reentrant=use_reentrant)
        loss = (y * gradient).sum()
        (loss if scaler is None else scaler.scale(loss)).backward()
    if scaler is None:
        optimizer.step()
    else:
        scaler.step(optimizer)
        scaler.update()
    optimizer.zero_grad()


@settings(max_examples=25)
@given(st.lists(st.integers(2, 9), min_size=1, max_size=8), st.sampled_from(KINDS))
def test_the_statistics_move_once_by_the_pooled_batch(sizes, kind):
    model = network(kind)
    x = torch.randn(sum(sizes), 4) * 3 + 2
    with bnlab.once_per_step(model, sgd(model)):
        train(model, sgd(model), x.split(sizes))
        assert int(model[1].num_batches_tracked) == 0  # another optimizer
        optimizer = sgd(model)
    with bnlab.once_per_step(model, optimizer):
        train(model, optimizer, x.split(sizes))
    require_moved(model[1], inputs(model, x))


def test_the_mean_of_the_variances_would_be_noticed():
    model = network()
    values = inputs(model, torch.randn(12, 4) + torch.arange(12)[:, None])
    _, var = expected(values)
    wrong = 0.9 + 0.1 * torch.stack([part.var(0) for part in values.split(4)]).mean(0)
    assert ulps(wrong.float(), var) > 1000
    assert ulps(var.float(), var) <= 1


@pytest.mark.parametrize("kind", [*KINDS, bnlab.nn.GhostBatchNorm1d])
@pytest.mark.parametrize("use_reentrant", [None, True, False])
def test_recomputation_counts_nothing(kind, use_reentrant):
    model, x = network(kind, momentum=0.1), torch.randn(12, 4)
    optimizer = sgd(model)
    with bnlab.once_per_step(model, optimizer):
        train(model, optimizer, x.split(4), use_reentrant=use_reentrant)
        with torch.no_grad():  # validation in train mode
            model(100 * x)
            checkpoint(model, 100 * x, use_reentrant=False)
        train(model, optimizer, [x + 1], use_reentrant=use_reentrant)
    first = expected(inputs(model, x))
    second = expected(inputs(model, x + 1), mean=first[0].float().double(), var=first[1].float().double())
    assert ulps(model[1].running_mean, second[0]) <= 1
    assert ulps(model[1].running_var, second[1]) <= 1
    assert int(model[1].num_batches_tracked) == 2


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_buffers_of_every_dtype(dtype):
    model, x = network().to(dtype), torch.randn(12, 4, dtype=dtype)
    optimizer = sgd(model)
    with bnlab.once_per_step(model, optimizer):
        train(model, optimizer, x.split(4))
    values = torch.cat([inputs(model, part) for part in x.split(4)])
    _, var = expected(values)
    if dtype is torch.float64:  # the formula itself rounds in this dtype
        torch.testing.assert_close(model[1].running_var, var, rtol=1e-14, atol=0)
    else:
        require_moved(model[1], values)


@pytest.mark.parametrize("kind", KINDS)
def test_a_cumulative_average_counts_steps(kind):
    model, optimizer = network(kind, momentum=None), None
    optimizer = sgd(model)
    steps = torch.randn(3, 12, 4) * 2 + torch.arange(3)[:, None, None]
    with bnlab.once_per_step(model, optimizer):
        for x in steps:
            train(model, optimizer, x.split(4))
    each = [inputs(model, x) for x in steps]
    assert int(model[1].num_batches_tracked) == 3
    exact = torch.stack([values.var(0) for values in each]).mean(0)
    torch.testing.assert_close(model[1].running_var.double(), exact, rtol=3e-7, atol=0)


def test_batch_renormalization_averages_standard_deviations():
    model, x = network(bnlab.nn.BatchRenorm1d, momentum=0.1), torch.randn(12, 4)
    optimizer = sgd(model)
    with bnlab.once_per_step(model, optimizer):
        train(model, optimizer, x.split(4))
    eps = model[1].eps
    std = (inputs(model, x).var(0, correction=0) + eps).sqrt()
    exact = (0.9 * (1 + eps) ** 0.5 + 0.1 * std) ** 2 - eps
    assert int(model[1].num_batches_tracked) == 1
    assert ulps(model[1].running_var, exact) <= 1


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_a_skipped_step_leaves_no_trace(kind, fused):
    model, x = network(kind), torch.randn(12, 4)
    optimizer, scaler = sgd(model, fused=fused), torch.amp.GradScaler("cpu", init_scale=2.0)
    with bnlab.once_per_step(model, optimizer, scaler=scaler):
        before = trace_of(model[1])
        train(model, optimizer, [*(x + 5).split(4), torch.full((4, 4), torch.nan)], scaler=scaler, gradient=torch.inf)
        assert not differences(before, trace_of(model[1]))
        train(model, optimizer, x.split(4), scaler=scaler)
    require_moved(model[1], inputs(model, x))
    assert "step" not in vars(scaler)


@pytest.mark.parametrize("kind", KINDS)
def test_micro_batches_that_are_not_finite_do_not_count(kind):
    model, x = network(kind), torch.randn(12, 4)
    optimizer, bad, values = sgd(model), torch.full((4, 4), torch.inf), inputs(model, x)
    with bnlab.once_per_step(model, optimizer):
        train(model, optimizer, [bad, *x.split(4), bad])
        require_moved(model[1], values)
        before = {name: value.clone() for name, value in model[1].named_buffers()}
        train(model, optimizer, [bad])
    assert all(torch.equal(value, before[name]) for name, value in model[1].named_buffers())
    assert int(getattr(model[1], "skipped_batches", 3)) == 3


def test_what_no_step_uses_is_dropped():
    model, x = network(), torch.randn(8, 4)
    optimizer = sgd(model)
    with bnlab.once_per_step(model, optimizer):
        model(x).sum().backward()
    assert int(model[1].num_batches_tracked) == 0
    optimizer.step()
    model(x)
    assert int(model[1].num_batches_tracked) == 1


def test_a_teacher_that_runs_without_gradients_alone_moves_with_the_steps():
    class Pair(nn.Module):
        def __init__(self):
            super().__init__()
            self.student, self.teacher = network(), network()

        def forward(self, x):
            with torch.no_grad():
                target = self.teacher(x + 1)
            return self.student(x) - target

    pair, x = Pair(), torch.randn(12, 4)
    optimizer = sgd(pair.student)
    with bnlab.once_per_step(pair, optimizer):
        train(pair, optimizer, x.split(4))
    require_moved(pair.student[1], inputs(pair.student, x))
    require_moved(pair.teacher[1], inputs(pair.teacher, x + 1))


def test_recalibration_inside_the_block_updates_at_once():
    model, x = network(), torch.randn(12, 4)
    optimizer = sgd(model)
    mean, var = expected(inputs(model, x), momentum=1.0)
    with bnlab.once_per_step(model, optimizer):
        update_bn([x], model)
        torch.testing.assert_close(model[1].running_var.double(), var, rtol=1e-5, atol=1e-5)
        bnlab.recalibrate(model, [x + 1])
        torch.testing.assert_close(model[1].running_mean.double(), inputs(model, x + 1).mean(0), rtol=1e-5, atol=1e-5)
        model[1].momentum = 1.0  # what others do
        with torch.no_grad():
            model(x)
        torch.testing.assert_close(model[1].running_mean.double(), mean, rtol=1e-5, atol=1e-5)
        model[1].momentum = 0.1
        assert int(model[1].num_batches_tracked) > 1
        assert is_deferred(model[1])


def test_a_layer_in_eval_mode_stays():
    model, x = network(), torch.randn(12, 4)
    optimizer = sgd(model)
    model[1].eval()
    before = trace_of(model[1])
    with bnlab.once_per_step(model, optimizer):
        train(model, optimizer, x.split(4))
    assert differences(before, trace_of(model[1])) == []


@pytest.mark.parametrize("kind", [*KINDS, bnlab.nn.BatchRenorm1d])
def test_copies_pickles_and_state_dicts_are_as_without_the_block(kind):
    model, x = network(kind), torch.randn(12, 4)
    before, names, attributes = trace_of(model), list(model.state_dict()), list(vars(model[1]))
    optimizer = sgd(model)
    with bnlab.once_per_step(model, optimizer):
        assert not differences(before, trace_of(model))
        model(x)
        assert list(model.state_dict()) == names
        for duplicate in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            assert list(vars(duplicate[1])) == attributes
            assert not is_deferred(duplicate[1])
            duplicate(x)
            assert int(duplicate[1].num_batches_tracked) == 1


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_everything_is_restored_after_an_error(error):
    class Raising(nn.Module):
        def forward(self, x):
            torch.set_grad_enabled(False)  # as an interrupt in torch leaves it
            raise error

    model = network()
    model.append(Raising())
    optimizer, scaler = sgd(model), torch.amp.GradScaler("cpu")
    x = torch.randn(4, 4)
    before, process, of_scaler = trace_of(model), trace_of_process(), dict(vars(scaler))
    forward = type(model[1]).forward
    with pytest.raises(error), bnlab.once_per_step(model, optimizer, scaler=scaler):
        model(x)
    assert not differences(before, trace_of(model))
    assert not differences(process, trace_of_process())
    assert type(model[1]).forward is forward
    assert vars(scaler) == of_scaler
    assert not is_deferred(model[1])
    with bnlab.once_per_step(model, optimizer, scaler=scaler):
        pass


def test_compiled_code_defers_too():
    """Also code that was compiled before the block, and it updates at once again behind it."""
    model, x = network(), torch.randn(12, 4)
    optimizer = sgd(model)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    compiled(x[:4])
    model[1].reset_running_stats()
    with bnlab.once_per_step(model, optimizer):
        train(compiled, optimizer, x.split(4))
        require_moved(model[1], inputs(model, x))
        model[1].reset_running_stats()
        train(compiled, optimizer, x.split(4), use_reentrant=False)
        require_moved(model[1], inputs(model, x))
    compiled(x[:4])
    assert int(model[1].num_batches_tracked) == 2
    torch.compiler.reset()


def test_wrong_arguments_are_refused_in_one_line():
    model = network()
    optimizer = sgd(model)
    with pytest.raises(UsageError, match=r"^once_per_step: optimizer must be .* Pass") as error:
        bnlab.once_per_step(model, "sgd").__enter__()
    assert "\n" not in str(error.value)
    with pytest.raises(UsageError, match="optimizer must train a parameter"):
        bnlab.once_per_step(model, sgd(network())).__enter__()
    with pytest.raises(UsageError, match="scaler must be"):
        bnlab.once_per_step(model, optimizer, scaler=2.0).__enter__()
    with pytest.raises(NoBatchNorm):
        bnlab.once_per_step(model[0], optimizer).__enter__()
    changed = network()
    changed[1].forward = changed[1].forward
    with pytest.raises(UsageError, match=r"^1: once_per_step needs .* del layer\.forward"):
        bnlab.once_per_step(changed, sgd(changed)).__enter__()


def test_a_second_block_on_a_layer_is_refused():
    model = network()
    optimizer = sgd(model)
    with bnlab.once_per_step(model, optimizer):
        with pytest.raises(UsageError, match=r"^1: a layer must be in one block of once_per_step at a time"):
            bnlab.once_per_step(model, optimizer).__enter__()
        assert is_deferred(model[1])
        other = network()
        with bnlab.once_per_step(other, sgd(other)):
            assert is_deferred(other[1])
        assert is_deferred(model[1])


def train_rank(rank, folder):
    """Train with two micro-batches on one of two ranks, and write what the layers have."""
    torch.set_num_threads(1)
    distributed.init_process_group("gloo", init_method=(Path(folder) / "store").as_uri(), rank=rank, world_size=2)
    try:
        model = network()
        shared = nn.SyncBatchNorm(3)
        wrapped = DistributedDataParallel(model)
        optimizer = sgd(model)
        x = torch.randn(8, 4, generator=torch.Generator().manual_seed(rank)) + rank
        with bnlab.once_per_step(wrapped, optimizer):
            with wrapped.no_sync():
                wrapped(x[:3]).sum().backward()
            wrapped(x[3:]).sum().backward()
            optimizer.step()
        values = inputs(model, x)
        from bnlab.watching.pooled_batches import Block
        from bnlab.watching.shared_batches import merged_over_ranks

        own = Block(float(len(values)), values.mean(0), values.var(0, correction=0) * len(values))
        (merged,) = merged_over_ranks([(shared, own)])
        torch.save({"state": model[1].state_dict(), "x": x, "merged": tuple(merged)}, Path(folder) / f"{rank}.pt")
    finally:
        distributed.destroy_process_group()


def test_each_rank_pools_its_own_micro_batches_and_shared_layers_those_of_all(tmp_path):
    torch.multiprocessing.start_processes(train_rank, (str(tmp_path),), nprocs=2, start_method="fork")
    ranks = [torch.load(tmp_path / f"{rank}.pt") for rank in range(2)]
    model = network()
    for rank in ranks:
        model[1].load_state_dict(rank["state"])
        require_moved(model[1], inputs(model, rank["x"]))
    whole = torch.cat([inputs(model, rank["x"]) for rank in ranks])
    for rank in ranks:
        count, mean, m2 = rank["merged"]
        assert float(count) == len(whole)
        torch.testing.assert_close(mean, whole.mean(0))
        torch.testing.assert_close(m2, whole.var(0) * (len(whole) - 1))
    assert all(torch.equal(a, b) for a, b in zip(ranks[0]["merged"], ranks[1]["merged"], strict=True))


@pytest.mark.parametrize("kind", KINDS)
def test_nothing_waits_for_a_device(kind, monkeypatch):
    for name in ("bnlab.watching.pooled_batches", "bnlab.nn.running_update"):
        monkeypatch.setattr(f"{name}.is_readable", lambda _: False)
    model, x = network(kind), torch.randn(12, 4)
    optimizer = sgd(model)
    as_on_a_device(monkeypatch)
    with host_reads() as reads, bnlab.once_per_step(model, optimizer):
        train(model, optimizer, x.split(4))
    assert not reads
    require_moved(model[1], inputs(model, x))
