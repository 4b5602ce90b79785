"""Data sets are compared at a common count, and single samples are joined where their shapes allow it."""

import pytest
import torch
from torch import nn

import bnlab
from bnlab.observe.data_passes import DataPasses, require_finite
from bnlab.observe.discover import any_batch_norm
from bnlab.observe.passes.kept_batches import keep
from bnlab.observe.passes.layer_statistics import OneValueInEachBatch
from bnlab.observe.passes.subject import ForwardFailed, Subject


def mlp():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 3)
    ).eval()


def passes(model):
    return DataPasses(Subject(model), any_batch_norm(model), lambda _: None)


def batches(count, size, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return keep("data", [torch.randn(size, 6, generator=generator) for _ in range(count)], None)


def test_the_smaller_batches_are_joined_for_the_comparison():
    runner = passes(mlp())
    data, train_data = runner.over("data", batches(4, 64)), runner.over("train_data", batches(64, 2, seed=1))
    common = runner.at_common_count(data, train_data)
    assert common.possible
    assert common.data == {}
    assert common.train_data["4"].count == 128
    assert common.train_data["4"].batches == 2
    swapped = runner.at_common_count(train_data, data)
    assert swapped.train_data == {}
    assert swapped.data["4"].batches == 2


@pytest.mark.parametrize(("size", "other"), [(64, 32), (8, 8), (16, 128)])
def test_large_batches_and_equal_ones_are_compared_as_they_are(size, other):
    runner = passes(mlp())
    data, train_data = runner.over("data", batches(4, size)), runner.over("train_data", batches(4, other))
    assert runner.at_common_count(data, train_data) == type(runner.at_common_count(data, train_data))()


def test_samples_that_cannot_be_joined_are_not_compared():
    model = nn.Sequential(nn.AdaptiveAvgPool1d(1), nn.Flatten(), nn.BatchNorm1d(3)).eval()
    runner = passes(model)
    ragged = keep("data", [torch.randn(2, 3, 4 + i) for i in range(8)], None)
    data, train_data = (
        runner.over("data", ragged),
        runner.over("train_data", keep("t", [torch.randn(64, 3, 5)] * 4, None)),
    )
    assert not runner.at_common_count(data, train_data).possible


def test_a_shift_is_not_reported_between_batches_of_two_and_of_64():
    """The noise of batches of two changes the statistics behind the first layer; the data are the same."""
    model = mlp().train()
    for x in batches(400, 2, seed=2):
        model(x)
    for seed in range(4):
        diagnosis = bnlab.check(model.eval(), data=batches(4, 64, seed), train_data=batches(200, 2, seed + 9))
        assert "BN402" not in {finding.code for finding in diagnosis.findings}


def test_a_real_shift_is_reported_between_batches_of_two_and_of_64():
    model = mlp().train()
    for x in batches(400, 2, seed=2):
        model(x)
    shifted = [x + 2 for x in batches(4, 64)]
    diagnosis = bnlab.check(model.eval(), data=shifted, train_data=batches(200, 2, seed=9))
    assert "BN402" in {finding.code for finding in diagnosis.findings}


def test_batches_that_differ_show_between_them():
    runner = passes(mlp())
    plain, offset = batches(6, 16), keep("data", [x + index for index, x in enumerate(batches(6, 16))], None)
    like_shuffled, differing = (runner.between_batches("data", runner.over("data", data)) for data in (plain, offset))
    assert like_shuffled.keys() == differing.keys() == {"1", "4"}
    assert all(each.z < 4 for each in like_shuffled.values())
    assert all(each.z > 5 and each.ratio > 3 for each in differing.values())
    assert runner.between_batches("train_data", None) == {}


def test_a_model_that_takes_whole_batches_only_is_not_compared():
    class Whole(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm = nn.BatchNorm1d(6)

        def forward(self, x):
            return self.norm(x.view(16, 6))

    runner = passes(Whole())
    assert runner.between_batches("data", runner.over("data", batches(6, 16))) == {}


def test_single_samples_are_joined():
    runner = passes(mlp())
    of_joined = runner.over_joined("data", batches(50, 1))
    assert of_joined.seen["1"].count == 50
    assert "data: its 50 batches of 1 sample were joined into 3 batches" in runner.notes[-1]


def test_single_samples_that_cannot_be_joined_are_judged_on_the_training_data():
    model = nn.Sequential(nn.AdaptiveAvgPool1d(1), nn.Flatten(), nn.BatchNorm1d(3), nn.Linear(3, 2)).eval()
    data = [torch.randn(1, 3, 4 + i) for i in range(8)]
    with pytest.raises(OneValueInEachBatch):
        passes(model).over_joined("data", keep("data", data, None))
    train_data = [torch.randn(32, 3, 6) for _ in range(8)]
    model.train()
    for x in train_data * 10:
        model(x)
    diagnosis = bnlab.check(
        model.eval(), data=data, train_data=train_data, metric=lambda m, d: sum(float(m(x).sum()) for x in d)
    )
    assert any("the layers are judged on train_data" in note for note in diagnosis.notes)
    assert next(o for o in diagnosis.outcomes if o.code == "BN401").status.value == "passed"
    assert diagnosis.numbers.eval_batch != diagnosis.numbers.eval_batch
    assert diagnosis.numbers.eval_running == diagnosis.numbers.eval_running


def test_no_running_statistics_and_single_rows_are_bn209():
    model = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8, track_running_stats=False), nn.Linear(8, 2)).eval()
    diagnosis = bnlab.check(model, data=batches(20, 1), train_data=batches(8, 16))
    assert diagnosis.findings[0].code == "BN209"
    assert diagnosis.failure is None
    assert any("does not run on one sample" in note for note in diagnosis.notes)


def test_data_with_a_nan_in_each_batch_are_refused():
    spoiled = [torch.full((4, 6), float("nan")), torch.tensor([[1.0] * 5 + [float("inf")]])]
    with pytest.raises(ForwardFailed, match="data: its inputs must be finite, got NaN or inf in each of 2 batches"):
        require_finite("data", keep("data", spoiled, None))
    require_finite("data", keep("data", [*spoiled, torch.zeros(2, 6)], None))
    require_finite("data", keep("data", [(torch.zeros(2, 6), spoiled[0])], None))
