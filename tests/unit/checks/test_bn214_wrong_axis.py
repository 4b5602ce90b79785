"""BN214 on real modules: sick networks next to twins that differ by a transpose alone."""

import pytest
import torch
from tests.architectures import ARCHITECTURES, build, images
from torch import nn

import bnlab

STEPS, INPUTS, WIDTH = 7, 6, 10


class Network(nn.Module):
    """A module, BN of its output, and a classifier on the mean over the steps."""

    def __init__(self, body, bn, *, transposes):
        super().__init__()
        self.body, self.bn, self.transposes = body, bn, transposes
        self.head = nn.LazyLinear(3)

    def forward(self, x):
        x = self.body(x, x, x) if isinstance(self.body, nn.MultiheadAttention) else self.body(x)
        x = x[0] if isinstance(x, tuple) else x
        x = torch.relu(self.bn(x.transpose(1, 2)).transpose(1, 2) if self.transposes else self.bn(x))
        return self.head(x.mean(1))


BODIES = {
    "linear": (lambda: nn.Linear(INPUTS, WIDTH), WIDTH, "body (Linear)"),
    "mlp": (lambda: nn.Sequential(nn.Linear(INPUTS, 4), nn.GELU(), nn.Linear(4, WIDTH)), WIDTH, "body.2 (Linear)"),
    "lstm": (lambda: nn.LSTM(INPUTS, WIDTH, batch_first=True), WIDTH, "body (LSTM)"),
    "gru": (lambda: nn.GRU(INPUTS, WIDTH, 2, batch_first=True, dropout=0.2), WIDTH, "body (GRU)"),
    "bidirectional": (lambda: nn.RNN(INPUTS, 4, batch_first=True, bidirectional=True), 8, "body (RNN)"),
    "attention": (lambda: nn.MultiheadAttention(INPUTS, 2, batch_first=True), INPUTS, "body (MultiheadAttention)"),
    "transformer": (
        lambda: nn.TransformerEncoderLayer(INPUTS, 2, 8, batch_first=True),
        INPUTS,
        "body (TransformerEncoderLayer)",
    ),
}

every_body = pytest.mark.parametrize("name", BODIES)


def network(name, bn=None, *, transposes):
    make, features, _ = BODIES[name]
    bn = bn or nn.BatchNorm1d(features if transposes else STEPS)
    model = Network(make(), bn, transposes=transposes)
    model(torch.randn(5, STEPS, INPUTS))
    return model


def findings(model, x=None):
    x = torch.randn(5, STEPS, INPUTS) if x is None else x
    diagnosis = bnlab.check(model, example=x, select="BN214")
    (outcome,) = diagnosis.outcomes
    assert outcome.status == ("findings" if diagnosis.findings else "passed")
    return diagnosis.findings


@every_body
def test_steps_are_normalised(name):
    (finding,) = findings(network(name, transposes=False))
    _, features, producer = BODIES[name]
    assert (finding.layer, finding.level.value, finding.remedies) == ("bn", "warning", ("manual",))
    assert finding.message == (
        f"the normalised axis of its input (5, 7, {features}) is 1, must be 2, where {producer} puts {features} "
        f"features: call bn(x.transpose(1, 2)).transpose(1, 2) with num_features={features}, unless each time step or "
        "token has its own statistics on purpose"
    )
    assert "on purpose" in finding.why


@every_body
def test_a_transpose_in_front_silences_it(name):
    assert findings(network(name, transposes=True)) == ()


@every_body
def test_the_transpose_of_the_message_normalises_the_features(name):
    """The oracle is the formula: over samples and steps, each feature has mean 0 and variance 1."""
    x = torch.randn(50, STEPS, INPUTS) * torch.arange(1, INPUTS + 1)
    for transposes, reduced in ((True, (0, 1)), (False, (0, 2))):
        model = network(name, transposes=transposes).train()
        outputs = []
        model.bn.register_forward_hook(lambda _, __, out, outputs=outputs: outputs.append(out.detach()))
        model(x)
        normalised = outputs[0].transpose(1, 2) if transposes else outputs[0]
        mean = normalised.double().mean(reduced)
        assert mean.abs().max() < 1e-5
        if not transposes:
            assert normalised.double().mean((0, 1)).abs().max() > 1e-3


@pytest.mark.parametrize("mode", ["eval mode", "frozen", "unaffine", "no statistics", "shared"])
def test_what_else_holds_of_the_layer_does_not_matter(mode):
    bn = nn.BatchNorm1d(STEPS, affine=mode != "unaffine", track_running_stats=mode != "no statistics")
    model = network("lstm", bn, transposes=False)
    if mode == "eval mode":
        model.eval()
    elif mode == "frozen":
        bnlab.freeze(model)
    elif mode == "shared":
        model = nn.Sequential(model.body, _First(), model.bn, nn.Linear(WIDTH, 4), model.bn)
    (finding,) = findings(model)
    assert finding.layer == ("2" if mode == "shared" else "bn")


class _First(nn.Module):
    def forward(self, x):
        return x[0]


def test_a_square_input_is_judged_by_its_axes():
    x = torch.randn(5, 8, 8)
    assert len(findings(nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.BatchNorm1d(8)), x)) == 1
    assert findings(nn.Sequential(nn.Conv1d(8, 8, 1), nn.ReLU(), nn.BatchNorm1d(8)), x) == ()


@pytest.mark.parametrize(
    ("model", "x"),
    [
        (nn.Sequential(nn.Linear(6, 4), nn.BatchNorm1d(4)), torch.randn(5, 6)),
        (nn.Sequential(nn.Linear(6, 4), nn.BatchNorm1d(1)), torch.randn(5, 1, 6)),
        (nn.Sequential(nn.Linear(6, 4), nn.Unflatten(1, (1, 4)), nn.BatchNorm1d(1)), torch.randn(5, 6)),
        (nn.Sequential(nn.Linear(6, 4), nn.BatchNorm2d(3)), torch.randn(5, 3, 8, 6)),
        (
            nn.Sequential(nn.Conv1d(3, 4, 1), nn.BatchNorm1d(4), nn.Linear(6, 9), nn.BatchNorm1d(4)),
            torch.randn(5, 3, 6),
        ),
    ],
    ids=["no steps", "one step", "one channel of samples", "maps", "a linear layer over time"],
)
def test_other_networks_with_linear_layers(model, x):
    assert findings(model, x) == ()


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_no_network_of_images_is_reported(name):
    assert findings(build(name), images(4)) == ()


def test_data_are_enough():
    data = [torch.randn(16, STEPS, INPUTS) for _ in range(4)]
    model = network("linear", transposes=False)
    assert [finding.code for finding in bnlab.check(model, data=data, select="BN214").findings] == ["BN214"]


def test_without_an_example_it_is_skipped():
    (outcome,) = bnlab.check(network("linear", transposes=False), select="BN214").outcomes
    assert outcome.status == "skipped"
    assert outcome.reason.startswith("no example given")
