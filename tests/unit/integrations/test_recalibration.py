import random
from contextlib import contextmanager

import numpy as np
import pytest
import torch
from tests.unit.integrations.networks import batches, first_statistics, is_equal, network, state
from tests.unit.integrations.test_evaluation_weights import ScheduleFree
from torch.optim.swa_utils import AveragedModel
from torch.utils.data import DataLoader, TensorDataset

import bnlab
from bnlab.errors import UsageError
from bnlab.integrations.options import settings_of
from bnlab.integrations.recalibration import Recalibration, Target


def recalibration(**options):
    return Recalibration(settings_of(**{"max_batches": None, "standard_error": None, "forward": None, **options}))


def trained(steps=3):
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for batch in batches()[:steps]:
        model(batch).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    return model


def test_the_block_has_the_statistics_of_the_data_and_everything_is_restored():
    model = trained()
    before, (mean, var) = state(model), first_statistics(model, batches())
    with bnlab.integrations.recalibrated(model, batches()):
        torch.testing.assert_close(model[1].running_mean, mean, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(model[1].running_var, var, rtol=1e-5, atol=1e-5)
        assert model[1].num_batches_tracked >= 44  # settled: 0.9**44 <= 0.01
    assert is_equal(state(model), before)
    assert model.training


def test_an_error_in_the_block_restores_too():
    model = trained()
    before = state(model)
    with pytest.raises(ZeroDivisionError), bnlab.integrations.recalibrated(model, batches()):
        raise ZeroDivisionError
    assert is_equal(state(model), before)


def test_an_impossible_recalibration_leaves_the_model_as_it_was():
    model, optimizer = trained(), None
    optimizer = ScheduleFree(model.parameters())
    before = state(model)
    with (
        pytest.raises(UsageError),
        bnlab.integrations.recalibrated(model, [torch.full((4, 4), torch.nan)], optimizer=optimizer),
    ):
        pytest.fail("the block must not begin")
    assert is_equal(state(model), before)
    assert optimizer.param_groups[0]["train_mode"]


def test_random_numbers_continue_as_if_nothing_had_happened():
    model = trained()
    loader = DataLoader(TensorDataset(torch.cat(batches())), batch_size=32, shuffle=True)

    def numbers():
        return random.random(), np.random.rand(), torch.rand(()).item(), next(iter(loader))[0][0, 0].item()

    def seed():
        random.seed(1)
        np.random.seed(1)
        torch.manual_seed(1)

    seed()
    expected = numbers()
    seed()
    with bnlab.integrations.recalibrated(model, loader):
        pass
    assert numbers() == expected


def test_a_validation_in_inference_mode_leaves_tensors_that_train():
    model = trained()
    before = state(model)
    with torch.inference_mode(), bnlab.integrations.recalibrated(model, batches()):
        model.eval()(batches()[0])
    assert is_equal(state(model), before)
    model.train()(batches()[0]).sum().backward()


@pytest.mark.parametrize("mode", [True, False])
def test_schedule_free_weights_are_those_that_are_evaluated(mode):
    model = trained()
    optimizer = ScheduleFree(model.parameters())
    optimizer.eval()
    mean, _ = first_statistics(model, batches())
    if mode:
        optimizer.train()
    before = state(model)
    with bnlab.integrations.recalibrated(model, batches(), optimizer=optimizer):
        torch.testing.assert_close(model[1].running_mean, mean, rtol=1e-4, atol=1e-4)
        assert torch.equal(model[0].weight, before["0.weight"])
        assert optimizer.param_groups[0]["train_mode"] == mode
    assert is_equal(state(model), before)


@pytest.mark.parametrize("policy", ["recompute", "copy", "average"])
def test_the_policies_of_an_averaged_model(policy):
    model = trained()
    average = AveragedModel(model, use_buffers=True)
    for index in range(3):
        with torch.no_grad():
            model[0].weight.add_(0.5)
        model(batches()[index])
        average.update_parameters(model)
    before, source = state(average), state(model)
    mean, _ = first_statistics(average.module, batches())
    with bnlab.integrations.recalibrated(average, batches(), trained=model, averaged=policy):
        layer = average.module[1]
        expected = {
            "recompute": mean, "copy": model[1].running_mean, "average": before["module.1.running_mean"]
        }[policy]  # fmt: skip
        torch.testing.assert_close(layer.running_mean, expected, rtol=1e-5, atol=1e-5)
        assert layer.num_batches_tracked == (44 if policy == "recompute" else 6)
    assert is_equal(state(average), before)
    assert is_equal(state(model), source)


def test_an_average_without_averages_of_buffers_is_refused():
    model = trained()
    average = AveragedModel(model)
    with (
        pytest.raises(UsageError, match="use_buffers=True"),
        bnlab.integrations.recalibrated(average, batches(), trained=model, averaged="average"),
    ):
        pytest.fail("the block must not begin")


def test_one_pass_is_enough_for_the_same_weights_in_one_step():
    model, passes = trained(), []

    class Data(list):
        def __iter__(self):
            passes.append(1)
            return super().__iter__()

    data, one = Data(batches()), recalibration()
    target = Target(model, data, step=3)
    one.begin(target)
    first = state(model)
    one.end()
    once = len(passes)
    one.begin(target)
    assert is_equal(state(model), first)
    assert len(passes) == once
    one.end()
    with torch.no_grad():
        model[0].weight.mul_(2)
    one.begin(target)
    assert len(passes) > once
    torch.testing.assert_close(model[1].running_mean, first_statistics(model, batches())[0], rtol=1e-5, atol=1e-5)
    one.end()
    one.begin(Target(model, data))
    assert len(passes) > 2 * once


def test_batches_are_converted_and_run_in_the_context_of_the_framework():
    model, entered = trained(), []

    @contextmanager
    def around():
        entered.append(1)
        yield

    one = recalibration()
    raw = [{"x": batch * 255} for batch in batches()]
    one.begin(Target(model, raw, convert=lambda batch: batch["x"] / 255, around=around))
    torch.testing.assert_close(model[1].running_mean, first_statistics(model, batches())[0], rtol=1e-4, atol=1e-4)
    assert (entered, one.is_active) == ([1], True)
    one.end()
    one.end()
    assert not one.is_active


def test_every_rank_takes_the_statistics_of_the_first_one(monkeypatch):
    sent = []
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)

    def broadcast(tensor, src):
        sent.append(src)
        tensor.fill_(7)

    monkeypatch.setattr(torch.distributed, "broadcast", broadcast)
    model = trained()
    before, one = state(model), recalibration()
    one.begin(Target(model, batches(), is_on_every_rank=True))
    assert sent == [0] * 6
    assert (model[1].running_mean == 7).all()
    one.end()
    assert is_equal(state(model), before)
    one.begin(Target(model, batches()))
    assert len(sent) == 6


def test_max_batches_and_forward_are_passed_on():
    model = trained()
    with bnlab.integrations.recalibrated(model, [(1, batch) for batch in batches()], max_batches=2,
                                         forward=lambda model, batch: model(batch[1])):  # fmt: skip
        mean, _ = first_statistics(model, batches()[:2])
        torch.testing.assert_close(model[1].running_mean, mean, rtol=1e-5, atol=1e-5)


def test_wrong_arguments_are_refused():
    with pytest.raises(UsageError, match=r"^recalibrated: averaged must be"):
        bnlab.integrations.recalibrated(network(), batches(), averaged="mean").__enter__()
    with pytest.raises(UsageError, match=r"^batches: "):
        bnlab.integrations.recalibrated(network(), iter(batches())).__enter__()
