"""The effect of padding on the statistics of a layer is that of the values themselves, and packed layers have none."""

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F  # noqa: N812
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

import bnlab
from bnlab.observe.discover import any_batch_norm
from bnlab.observe.model_evidence import ModelEvidence, ModelLayer
from bnlab.observe.padding import with_padding
from bnlab.observe.passes.subject import Subject

LENGTHS = ((12, 33, 50, 21), (40, 16, 9, 30), (25, 60, 14, 18))


def sequences(channels=3, seed=0):
    """Return the samples of three batches, each of shape (C, L)."""
    generator = torch.Generator().manual_seed(seed)
    return [[2 + torch.randn(channels, own, generator=generator) for own in lengths] for lengths in LENGTHS]


def padded(samples, *, side="end", value=0.0, length=None):
    longest = length or max(x.size(1) for x in samples)
    rests = [longest - x.size(1) for x in samples]
    sizes = [(0, rest) if side == "end" else (rest, 0) for rest in rests]
    return torch.stack([F.pad(x, size, value=value) for x, size in zip(samples, sizes, strict=True)])


def masked(samples, length=None):
    longest = length or max(x.size(1) for x in samples)
    return torch.arange(longest) < torch.tensor([x.size(1) for x in samples])[:, None]


def evidence_of(model, batches):
    modules = any_batch_norm(model)
    layers = tuple(
        ModelLayer(name=name, kind="BatchNorm1d", channels=layer.num_features, momentum=0.1, eps=0.0, training=True)
        for name, layer in modules.items()
    )
    return with_padding(ModelEvidence(layers=layers), Subject(model), modules, batches)


def effects_of(model, batches):
    return {layer.name: layer.padding for layer in evidence_of(model, batches).layers}


def moments(values):
    """Return the mean over batches of the mean and the biased variance, from one array (count, C) for each batch."""
    means, variances = zip(*[(batch.mean(0), batch.var(0)) for batch in values], strict=True)
    return np.mean(means, 0), np.mean(variances, 0)


def rows(samples):
    return torch.cat([x.T for x in samples]).double().numpy()


@pytest.mark.parametrize("side", ["end", "beginning"])
@pytest.mark.parametrize("value", [0.0, -7.0])
def test_the_statistics_are_those_of_the_values_with_and_without_padding(side, value):
    batches = [padded(samples, side=side, value=value) for samples in sequences()]
    effect = effects_of(nn.Sequential(nn.BatchNorm1d(3)), batches)["0"]
    mean, var = moments([batch.double().movedim(1, 2).flatten(0, 1).numpy() for batch in batches])
    valid_mean, valid_var = moments([rows(samples) for samples in sequences()])
    np.testing.assert_allclose(effect.mean, mean, rtol=1e-12)
    np.testing.assert_allclose(effect.var, var, rtol=1e-12)
    np.testing.assert_allclose(effect.valid_mean, valid_mean, rtol=1e-12)
    np.testing.assert_allclose(effect.valid_var, valid_var, rtol=1e-12)
    counts = [(len(lengths) * max(lengths), sum(lengths)) for lengths in LENGTHS]
    assert effect.share == pytest.approx(1 - sum(own for _, own in counts) / sum(count for count, _ in counts))
    assert not np.allclose(effect.mean, valid_mean, rtol=0.05)


def test_a_mask_decides_which_positions_count():
    """The samples end in real zeros, so that the runs of zeros are longer than the padding."""
    samples = [[torch.cat([x, torch.zeros(3, 4)], 1) for x in batch] for batch in sequences()]
    batches = [{"input": padded(batch, length=70), "mask": masked(batch, 70)} for batch in samples]

    class Layer(nn.Module):
        def __init__(self):
            super().__init__()
            self.bn = nn.BatchNorm1d(3)

        def forward(self, input, mask):
            return self.bn(input)

    effect = effects_of(Layer(), batches)["bn"]
    valid_mean, valid_var = moments([rows(batch) for batch in samples])
    np.testing.assert_allclose(effect.valid_mean, valid_mean, rtol=1e-12)
    np.testing.assert_allclose(effect.valid_var, valid_var, rtol=1e-12)


@pytest.mark.parametrize("layout", ["sample by sample", "position by position"])
def test_rows_of_all_positions_are_taken_apart(layout):
    class Flat(nn.Module):
        def __init__(self):
            super().__init__()
            self.bn = nn.BatchNorm1d(3)

        def forward(self, x):
            x = x.permute(0, 2, 1) if layout == "sample by sample" else x.permute(2, 0, 1)
            return self.bn(x.reshape(-1, 3))

    effect = effects_of(Flat(), [padded(samples) for samples in sequences()])["bn"]
    valid_mean, valid_var = moments([rows(samples) for samples in sequences()])
    np.testing.assert_allclose(effect.valid_mean, valid_mean, rtol=1e-12)
    np.testing.assert_allclose(effect.valid_var, valid_var, rtol=1e-12)


class Features(nn.Module):
    """Convolutions behind features that come last."""

    def __init__(self):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv1d(3, 8, 1), nn.BatchNorm1d(8)
        self.conv2, self.bn2 = nn.Conv1d(8, 6, 3, stride=2, padding=1), nn.BatchNorm1d(6)

    def forward(self, x):
        return self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x.transpose(1, 2))))))


def test_layers_behind_a_stride_follow_the_positions():
    torch.manual_seed(0)
    model = Features().double()
    batches = [padded(samples).double().transpose(1, 2) for samples in sequences()]
    effects = effects_of(model, batches)
    valid = {"bn1": [], "bn2": []}
    for batch, samples in zip(batches, sequences(), strict=True):
        first = model.conv1(batch.transpose(1, 2))
        mean, var = first.mean((0, 2), keepdim=True), first.var((0, 2), keepdim=True, correction=0)
        second = model.conv2(F.relu((first - mean) / (var + model.bn1.eps).sqrt()))
        for name, x, stride in [("bn1", first, 1), ("bn2", second, 2)]:
            own = [row[:, : -(-sample.size(1) // stride)] for row, sample in zip(x, samples, strict=True)]
            valid[name].append(rows([part.detach() for part in own]))
    for name, values in valid.items():
        valid_mean, valid_var = moments(values)
        np.testing.assert_allclose(effects[name].valid_mean, valid_mean, rtol=1e-9, atol=1e-12)
        np.testing.assert_allclose(effects[name].valid_var, valid_var, rtol=1e-9)


def test_images_are_padded_along_both_axes():
    generator = torch.Generator().manual_seed(0)
    sizes = ((12, 24), (24, 10), (8, 16)), ((20, 30), (30, 22), (11, 12))
    samples = [[1 + torch.rand(2, *size, generator=generator) for size in batch] for batch in sizes]
    batches = []
    for images, longest in zip(samples, (24, 30), strict=True):
        rests = [(0, longest - image.size(2), 0, longest - image.size(1)) for image in images]
        batches.append(torch.stack([F.pad(image, rest) for image, rest in zip(images, rests, strict=True)]))
    effect = effects_of(nn.Sequential(nn.BatchNorm2d(2)), batches)["0"]
    valid_mean, valid_var = moments([rows([image.flatten(1) for image in images]) for images in samples])
    np.testing.assert_allclose(effect.valid_mean, valid_mean, rtol=1e-12)
    np.testing.assert_allclose(effect.valid_var, valid_var, rtol=1e-12)


class Recurrent(nn.Module):
    """BN between the layers of an LSTM, on packed sequences."""

    def __init__(self):
        super().__init__()
        self.lstm, self.bn = nn.LSTM(3, 8, batch_first=True), nn.BatchNorm1d(8)

    def forward(self, x, lengths):
        packed = pack_padded_sequence(x.transpose(1, 2), lengths, batch_first=True, enforce_sorted=False)
        out, _ = self.lstm(packed)
        return pad_packed_sequence(out._replace(data=self.bn(out.data)), batch_first=True)[0]


class Stripped(nn.Module):
    """BN on the positions that are no padding."""

    def __init__(self):
        super().__init__()
        self.bn = nn.BatchNorm1d(3)

    def forward(self, x, mask):
        x = x.transpose(1, 2).clone()
        x[mask] = self.bn(x[mask])
        return x


class Masked(nn.Module):
    """A layer of bnlab, with its mask."""

    def __init__(self):
        super().__init__()
        self.bn = bnlab.nn.BatchNorm1d(3)

    def forward(self, x, mask):
        return self.bn(x, mask=mask)


class OwnMask(nn.BatchNorm1d):
    """A masked layer of somebody else."""

    def forward(self, x, mask):
        return super().forward(x * mask)


class WithOwnMask(nn.Module):
    """The layer gets a mask of zeros and ones as its second argument."""

    def __init__(self):
        super().__init__()
        self.bn = OwnMask(3)

    def forward(self, x, mask):
        return self.bn(x, mask[:, None].to(x.dtype))


class Pooled(nn.Module):
    """BN behind a mean over the positions."""

    def __init__(self):
        super().__init__()
        self.bn = nn.BatchNorm1d(3)

    def forward(self, x, mask):
        return self.bn(x.mean(2))


@pytest.mark.parametrize("make", [Stripped, Masked, WithOwnMask, Pooled])
def test_no_padding_enters_layers_that_are_masked_or_pooled(make):
    batches = [{"x": padded(samples), "mask": masked(samples)} for samples in sequences()]
    evidence = evidence_of(make(), batches)
    assert evidence.padding.certain
    assert [(layer.padding, layer.padding_unknown) for layer in evidence.layers] == [(None, None)]


def test_no_padding_enters_packed_sequences():
    batches = [
        {"x": padded(samples), "lengths": torch.tensor(own)} for samples, own in zip(sequences(), LENGTHS, strict=True)
    ]
    evidence = evidence_of(Recurrent(), batches)
    assert evidence.padding.certain
    assert [(layer.padding, layer.padding_unknown) for layer in evidence.layers] == [(None, None)]


def test_positions_in_another_order_are_not_known():
    class Windows(nn.Module):
        def __init__(self):
            super().__init__()
            self.bn = nn.BatchNorm1d(3)

        def forward(self, x):
            return self.bn(x.unfold(2, 4, 4).permute(0, 2, 1, 3).flatten(0, 1))

    (layer,) = evidence_of(Windows(), [padded(samples) for samples in sequences()]).layers
    assert layer.padding is None
    assert "cannot be matched" in layer.padding_unknown


def test_batch_norm_over_the_positions_is_another_matter():
    """Channels that are positions (BN214) hold padding as channels and not as positions."""
    batches = [padded(samples, length=60).transpose(1, 2) for samples in sequences(channels=30)]
    (layer,) = evidence_of(nn.Sequential(nn.BatchNorm1d(60)), batches).layers
    assert layer.padding is None


def test_an_input_that_cannot_be_examined_is_not_known():
    (layer,) = evidence_of(nn.Sequential(nn.BatchNorm3d(2)), [torch.randn(4, 2, 5, 5, 5)] * 3).layers
    assert "2 to 4 axes" in layer.padding_unknown


def test_a_layer_that_does_not_run_is_not_known():
    model = nn.Sequential(nn.BatchNorm1d(3))
    model[0].unused = nn.BatchNorm1d(3)
    unused = evidence_of(model, [padded(samples) for samples in sequences()]).layers[1]
    assert unused.padding_unknown == "it did not run"


def test_no_padding_needs_no_pass():
    class Fails(nn.Module):
        def __init__(self):
            super().__init__()
            self.bn = nn.BatchNorm1d(3)

        def forward(self, x):
            raise AssertionError

    evidence = evidence_of(Fails(), [torch.randn(4, 3, 20)] * 3)
    assert evidence.padding is None
    assert evidence.layers[0].padding_unknown is None


def test_the_model_and_the_random_numbers_are_restored():
    model = Features().train()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    state = torch.get_rng_state()
    effects_of(model, [padded(samples).transpose(1, 2) for samples in sequences()])
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert all(not module._forward_pre_hooks and not module._forward_hooks for module in model.modules())
    assert all(module.training for module in model.modules())


def test_batches_of_every_length_are_examined():
    """One batch in twenty has another length than the others."""
    samples = sequences()
    longer = [torch.cat([x, x], 1) for x in samples[0]]
    batches = [padded(samples[0])] * 10 + [padded(longer)] + [padded(samples[0])] * 9
    assert evidence_of(nn.Sequential(nn.BatchNorm1d(3)), batches).padding.lengths == (50, 100)
