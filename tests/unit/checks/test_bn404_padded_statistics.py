"""Networks with padding in their statistics are named, and their healthy twins are not."""

import dataclasses

import pytest
import torch
from torch import nn
from torch.nn import functional as F  # noqa: N812

import bnlab
from bnlab.checks.bn404_padded_statistics import PaddedStatistics
from bnlab.diagnosis.run_checks import run_check
from bnlab.observe import survey
from bnlab.records import Level


@pytest.fixture(autouse=True)
def _without_other_measurements(monkeypatch):
    """Layers that were never trained make a check look for another eps, in 18 passes that this check does not read."""
    monkeypatch.setattr(survey, "fit_eps", lambda *arguments, **options: None)


class Waves(nn.Module):
    """Two convolutions over (N, C, L), or over (N, L, C) with `last`."""

    def __init__(self, layer=nn.BatchNorm1d, *, last=False, stride=1):
        super().__init__()
        self.last = last
        self.conv1, self.bn1 = nn.Conv1d(3, 12, 3, padding=1, bias=False), layer(12)
        self.conv2, self.bn2 = nn.Conv1d(12, 12, 3, stride, 1, bias=False), layer(12)

    def forward(self, x, **mask):
        x = x.transpose(1, 2) if self.last else x
        x = F.relu(self.bn1(self.conv1(x), **mask))
        return F.relu(self.bn2(self.conv2(x), **mask)).mean(2)


class WithMask(Waves):
    """A network that gets a mask and does not pass it to its layers."""

    def forward(self, x, attention_mask):
        return super().forward(x)


class Text(nn.Module):
    """A convolution over the embeddings of token ids."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(40, 8, padding_idx=0)
        self.conv, self.bn = nn.Conv1d(8, 12, 3, padding=1), nn.BatchNorm1d(12)

    def forward(self, ids):
        return F.relu(self.bn(self.conv(self.embed(ids).transpose(1, 2)))).amax(2)


class Pictures(nn.Module):
    """Two convolutions over images of any size."""

    def __init__(self):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.conv2, self.bn2 = nn.Conv2d(8, 12, 3, 2, 1), nn.BatchNorm2d(12)

    def forward(self, x):
        return F.relu(self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))).mean((2, 3))


def generator(seed):
    torch.manual_seed(seed)
    return torch.Generator().manual_seed(seed)


def waves(g, lengths, length=None, *, left=False):
    longest = length or max(lengths)
    x = torch.zeros(len(lengths), 3, longest)
    for row, own in zip(x, lengths, strict=True):
        part = slice(longest - own, longest) if left else slice(0, own)
        row[:, part] = (
            2
            + torch.sin(torch.arange(own) * (0.2 + torch.rand(1, generator=g)))
            + 0.3 * torch.randn(3, own, generator=g)
        )
    return x


def lengths_of(g, count=12):
    return torch.randint(6, 50, (count,), generator=g).tolist()


def keep(lengths, longest):
    return torch.arange(longest) < torch.tensor(lengths)[:, None]


def batches(make, g):
    return [make(g, lengths_of(g)) for _ in range(6)]


def labels(g):
    return torch.randint(0, 50, (12,), generator=g)


def right_padding(g, lengths):
    return waves(g, lengths), labels(g)


def left_padding(g, lengths):
    return waves(g, lengths, left=True), labels(g)


def with_lengths(g, lengths):
    return waves(g, lengths, 50), torch.tensor(lengths), labels(g)


def features_last(g, lengths):
    return waves(g, lengths).transpose(1, 2), labels(g)


def with_mask(g, lengths):
    return {"x": waves(g, lengths, 50), "attention_mask": keep(lengths, 50)}, labels(g)


def token_ids(g, lengths):
    return torch.randint(1, 40, (12, max(lengths)), generator=g) * keep(lengths, max(lengths)), labels(g)


def pictures(g, lengths):
    sizes = list(zip(lengths, lengths_of(g), strict=True))
    x = torch.zeros(12, 3, max(lengths), max(width for _, width in sizes))
    for image, (height, width) in zip(x, sizes, strict=True):
        image[:, :height, :width] = 1 + torch.rand(3, height, width, generator=g)
    return x


SICK = {
    "right padding": (Waves, right_padding),
    "right padding, a stride": (lambda: Waves(stride=2), right_padding),
    "left padding": (Waves, left_padding),
    "mask in a dict": (WithMask, with_mask),
    "lengths vector": (Waves, with_lengths),
    "token ids": (Text, token_ids),
    "features last": (lambda: Waves(last=True), features_last),
    "images": (Pictures, pictures),
    "layers of bnlab without their mask": (lambda: Waves(bnlab.nn.BatchNorm1d), right_padding),
}


def fixed_length_without_mask(g, lengths):
    return waves(g, lengths, 50), labels(g)


def saturated(g, lengths):
    slope = 5 + 20 * torch.rand(12, 1, 1, generator=g)
    return (slope * torch.linspace(0, 1, 50) + 0.5 * torch.randn(12, 3, 50, generator=g)).clamp(max=3), labels(g)


def one_length(g, lengths):
    return waves(g, [lengths[0]] * 12), labels(g)


def zero_inflated(g, lengths):
    wet = torch.rand(12, 1, lengths[0] + 10, generator=g) < 0.12
    return torch.rand(12, 3, lengths[0] + 10, generator=g) * wet, labels(g)


def black_borders(g, lengths):
    return F.pad(torch.rand(12, 3, 16, 14, generator=g), (4, 10, 5, 7)) * (torch.rand(12, 1, 1, 1, generator=g) + 0.5)


def mask_of_ones(g, lengths):
    return {"x": waves(g, [lengths[0]] * 12), "attention_mask": torch.ones(12, lengths[0])}


NOTED = {
    "fixed length without a mask": (Waves, fixed_length_without_mask),
    "a saturated end": (Waves, saturated),
}
HEALTHY = {
    "one length in each batch": (Waves, one_length),
    "constant stretches": (Waves, zero_inflated),
    "black borders": (Pictures, black_borders),
    "a mask of ones": (WithMask, mask_of_ones),
}


SEEDS = [0, pytest.param(1, marks=pytest.mark.slow)]


def diagnosis_of(make, batch, seed):
    g = generator(seed)
    model = make()
    data = batches(batch, g)
    return bnlab.check(model, data=data[:2], train_data=data, select=["BN404"])


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("name", SICK)
def test_padding_is_a_warning_in_every_layer(name, seed):
    make, batch = SICK[name]
    diagnosis = diagnosis_of(make, batch, seed)
    assert {finding.level for finding in diagnosis.findings} == {Level.WARNING}
    assert len(diagnosis.findings) == len(diagnosis.layers)
    for finding in diagnosis.findings:
        assert finding.measured["effect"].value > 0.1
        assert 0.1 < finding.measured["padding"].value < 0.9


@pytest.mark.parametrize("name", NOTED)
def test_ends_that_may_really_be_constant_are_a_note(name):
    findings = diagnosis_of(*NOTED[name], 0).findings
    assert {finding.level for finding in findings} == {Level.INFO}
    assert "really constant" in findings[0].message


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("name", HEALTHY)
def test_healthy_twins_give_no_finding(name, seed):
    diagnosis = diagnosis_of(*HEALTHY[name], seed)
    assert diagnosis.findings == ()
    assert [outcome.status.value for outcome in diagnosis.outcomes] == ["passed"]


def test_masked_layers_give_no_finding():
    class Masked(Waves):
        def __init__(self):
            super().__init__(bnlab.nn.BatchNorm1d)

        def forward(self, x, attention_mask):
            return super().forward(x, mask=attention_mask)

    assert diagnosis_of(Masked, with_mask, 0).findings == ()
    assert diagnosis_of(WithMask, with_mask, 0).findings != ()


def test_frozen_layers_are_skipped():
    def frozen():
        return bnlab.freeze(Waves()).model

    diagnosis = diagnosis_of(frozen, right_padding, 0)
    assert [outcome.status.value for outcome in diagnosis.outcomes] == ["skipped"]


def test_the_message_compares_the_effect_with_its_limit_and_names_the_proof():
    (finding,), _ = run_check(PaddedStatistics(), [], PaddedStatistics.BROKEN[0].build())
    assert finding.message == (
        "40 % of the positions are padding and change the batch statistics by up to 0.5 standard deviations in 4 of 4 "
        "channels, must be <= 0.1: `attention_mask` shows where it is"
    )


def test_without_proof_the_same_evidence_is_a_note():
    evidence = PaddedStatistics.BROKEN[0].build()
    doubtful = dataclasses.replace(evidence, padding=dataclasses.replace(evidence.padding, proof=None))
    (finding,), _ = run_check(PaddedStatistics(), [], doubtful)
    assert finding.level is Level.INFO
    assert "constant ends of samples (padding, or really constant)" in finding.message


@pytest.mark.parametrize(("ratio", "count"), [(1.21, 0), (1.23, 1), (1 / 1.23, 1)])
def test_the_variance_alone_may_matter(ratio, count):
    """log(1.2214)/2 is 0.1."""
    evidence = PaddedStatistics.BROKEN[0].build()
    (layer,) = evidence.layers
    effect = layer.padding
    changed = dataclasses.replace(effect, mean=effect.valid_mean, var=ratio * effect.valid_var)
    evidence = dataclasses.replace(evidence, layers=(dataclasses.replace(layer, padding=changed),))
    assert len(run_check(PaddedStatistics(), [], evidence)[0]) == count
