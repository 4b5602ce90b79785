"""Wrong conversions of running statistics are recognised, and statistics that are off for another reason are not."""

import dataclasses
import math

import numpy as np
import pytest

from bnlab.checks.cases import executed, healthy, model_layer, observed
from bnlab.observe import ported
from bnlab.observe.evidence import Pruned
from bnlab.observe.ported import port_of, why_not_judged

EPS = 1e-5
EXCHANGE = "an exchange of running_mean and running_var"
DEVIATIONS = "standard deviations stored as running_var"
INVERSE = "inverse standard deviations stored as running_var"
MISTAKES = {
    EXCHANGE: lambda mean, var: (var, mean),
    DEVIATIONS: lambda mean, var: (mean, [math.sqrt(v) for v in var]),
    INVERSE: lambda mean, var: (mean, [1 / math.sqrt(v + EPS) for v in var]),
}


def statistics(seed, channels=12, *, width=1.5):
    """Return means and variances, of which the logarithms have a standard deviation of `width`."""
    rng = np.random.default_rng(seed)
    return rng.normal(size=channels).tolist(), np.exp(width * rng.normal(size=channels)).tolist()


def layer(name, of, stored=lambda mean, var: (mean, var), **changes):
    """Return a layer that stores a function of the statistics of its training data."""
    mean, var = of
    running_mean, running_var = stored(mean, var)
    state = healthy(name, running_mean=running_mean, running_var=running_var, weight=None, bias=None)
    seen = observed(mean=mean, var=var)
    return model_layer(name, state=state, data=seen, train_data=seen, channels=len(mean), eps=EPS, gap=None, **changes)


def network(stored, seed=0, layers=3, **options):
    return [layer(f"bn{index}", statistics(10 * seed + index, **options), stored) for index in range(layers)]


def mean_effect(layers):
    """Return the mean effect of the stored statistics channel by channel, in plain Python."""
    effects = []
    for one in layers:
        seen = one.train_data
        for m, v, mean, var in zip(
            one.state.running_mean, one.state.running_var, seen.within_mean, seen.within_var, strict=True
        ):
            of_mean = abs(m - mean) / math.sqrt(var + EPS)
            of_var = abs(math.log((v + EPS) / (var + EPS))) / 2 if v + EPS > 0 else 1.0
            effects.append(min(1.0, max(of_mean, of_var)))
    return sum(effects) / len(effects)


@pytest.mark.parametrize("fault", MISTAKES)
@pytest.mark.parametrize("seed", range(10))
def test_each_mistake_is_identified_and_no_other(fault, seed):
    layers = network(MISTAKES[fault], seed)
    port = port_of(layers)
    assert port is not None
    assert port.fault == fault
    assert port.layers == ("bn0", "bn1", "bn2")
    assert port.before == pytest.approx(mean_effect(layers), rel=1e-9)
    assert port.after == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize("fault", MISTAKES)
@pytest.mark.parametrize("seed", range(5))
def test_noise_of_the_buffers_does_not_hide_a_mistake(fault, seed):
    rng = np.random.default_rng(100 + seed)

    def stored(mean, var):
        noisy = [v * math.exp(0.06 * rng.normal()) for v in var]
        return MISTAKES[fault]([m + 0.03 * math.sqrt(v) * rng.normal() for m, v in zip(mean, var, strict=True)], noisy)

    port = port_of(network(stored, seed))
    assert port is not None
    assert port.fault == fault
    assert 0.01 < port.after < 0.08


@pytest.mark.parametrize("stored", [lambda v, eps: math.sqrt(v), lambda v, eps: math.sqrt(v + eps)])
def test_standard_deviations_are_recognised_with_and_without_eps(stored):
    """Where eps is as large as the variances, the two differ by up to half of log 2."""

    def convert(mean, var):
        return mean, [stored(v, 1e-3) for v in var]

    layers = []
    for index in range(2):
        mean, var = statistics(index)
        of = [0.03 * m for m in mean], [1e-3 * v for v in var]
        layers.append(dataclasses.replace(layer(f"bn{index}", of, convert), eps=1e-3))
    port = port_of(layers)
    assert port is not None
    assert port.fault == DEVIATIONS
    assert port.after < 1e-6


def test_an_exchanged_mean_makes_negative_variances():
    layers = network(MISTAKES[EXCHANGE])
    assert min(one.state.running_var.min() for one in layers) < 0
    port = port_of(layers)
    assert port is not None
    assert port.fault == EXCHANGE


def test_a_negative_mean_is_no_exchanged_variance():
    mean, var = [1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0], [4.0, 3.0, 0.2, 9.0, 0.5, 2.0, 7.0, 0.1]
    stored = MISTAKES[EXCHANGE]
    assert port_of([layer("a", (mean, var), stored), layer("b", (mean, var), stored)]) is not None
    flipped = lambda mean, var: ([-v for v in var], mean)  # noqa: E731
    assert port_of([layer("a", (mean, var), flipped), layer("b", (mean, var), flipped)]) is None


OTHER_REASONS = {
    "healthy": lambda mean, var: (mean, var),
    "another scale of the input": lambda mean, var: ([3 * m for m in mean], [9 * v for v in var]),
    "a larger variance": lambda mean, var: (mean, [4 * v for v in var]),
    "biased variance": lambda mean, var: (mean, [0.8 * v for v in var]),
    "reset": lambda mean, var: ([0.0] * len(mean), [1.0] * len(var)),
    "mean lost": lambda mean, var: ([0.0] * len(mean), var),
    "variance lost": lambda mean, var: (mean, [1.0] * len(var)),
    "other order": lambda mean, var: (mean[1:] + mean[:1], var[1:] + var[:1]),
    "second moment": lambda mean, var: (mean, [v + m * m for m, v in zip(mean, var, strict=True)]),
    "logarithm": lambda mean, var: (mean, [math.log(v) for v in var]),
    "inverse variance": lambda mean, var: (mean, [1 / v for v in var]),
    "square of the variance": lambda mean, var: (mean, [v * v for v in var]),
    "not a number": lambda mean, var: ([math.nan] * len(mean), var),
}


@pytest.mark.parametrize("stored", OTHER_REASONS.values(), ids=OTHER_REASONS)
@pytest.mark.parametrize("seed", range(5))
def test_statistics_that_are_off_for_another_reason_are_no_port(stored, seed):
    assert port_of(network(stored, seed)) is None


@pytest.mark.parametrize("seed", range(5))
def test_statistics_of_other_weights_are_no_port(seed):
    others = [layer(f"bn{i}", statistics(i), lambda *_, i=i: statistics(50 + 5 * seed + i)) for i in range(3)]
    assert port_of(others) is None


@pytest.mark.parametrize("layers", [1, 2, 3])
@pytest.mark.parametrize("width", [0.3, 0.7, 1.0, 1.5])
@pytest.mark.parametrize("seed", range(3))
def test_few_updates_do_not_look_like_standard_deviations(layers, width, seed):
    """(1 + var)/2 is near the square root of var where var is near 1, and the means may be small."""
    for weight in np.arange(0.05, 1, 0.09):

        def stored(mean, var, w=weight):
            return [(1 - w) * m for m in mean], [(1 - w) * v + w for v in var]

        of = [statistics(10 * seed + index, width=width) for index in range(layers)]
        small = [layer(f"bn{i}", ([0.2 * m for m in mean], var), stored) for i, (mean, var) in enumerate(of)]
        assert port_of(small) is None


def test_without_this_explanation_few_updates_would_look_like_standard_deviations(monkeypatch):
    """The wrong answer that the test above must be able to catch."""

    def stored(mean, var):
        return [0.65 * m for m in mean], [0.65 * v + 0.35 for v in var]

    layers = [layer(name, ([0.0] * 8, [0.3, 0.35, 0.4, 0.5, 2.8, 2.9, 2.6, 2.7]), stored) for name in "ab"]
    assert port_of(layers) is None
    monkeypatch.setattr(ported, "_RATIO_OF_FEW_UPDATES", math.inf)
    port = port_of(layers, effect=0.05, ratio=0.9)
    assert port is not None
    assert port.fault == DEVIATIONS


def test_every_layer_must_fit():
    first, second, third = network(MISTAKES[INVERSE])
    right = layer("right", statistics(7))
    assert port_of([first, second, third]) is not None
    assert port_of([first, second, third, right]) is None


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"frozen": True}, "frozen on purpose"),
        ({"own_formula": "is an ABN"}, "its class computes another formula than BN"),
        ({"train_data": None}, "no running statistics, or not run on train_data"),
        ({"state": None}, "no running statistics, or not run on train_data"),
        ({"execution": executed(calls=2)}, "called more than once per forward"),
    ],
)
def test_layers_that_show_nothing_are_left_out(changes, reason):
    silent = dataclasses.replace(layer("silent", statistics(7)), **changes)
    assert why_not_judged(silent) == reason
    port = port_of([*network(MISTAKES[DEVIATIONS]), silent])
    assert port is not None
    assert port.layers == ("bn0", "bn1", "bn2")


def test_a_loss_that_is_lower_with_the_stored_statistics_proves_nothing():
    layers = [dataclasses.replace(one, trained_with=True) for one in network(MISTAKES[DEVIATIONS])]
    assert port_of(layers) is not None


def test_a_network_without_judged_layers_is_no_port():
    assert port_of([]) is None
    assert port_of([dataclasses.replace(layer("a", statistics(0), MISTAKES[EXCHANGE]), frozen=True)]) is None


@pytest.mark.parametrize("fault", MISTAKES)
def test_a_few_channels_may_be_no_numbers(fault):
    def stored(mean, var):
        running_mean, running_var = MISTAKES[fault](mean, var)
        return [*running_mean[:-1], math.nan], list(running_var)

    port = port_of(network(stored, channels=16))
    assert port is not None
    assert port.fault == fault
    assert port.after == pytest.approx(1 / 16, abs=1e-6)


def test_pruned_channels_do_not_count():
    mean, var = statistics(3, channels=12)

    def stored(mean, var):
        return [*mean[:-4], 5.0, 5.0, 5.0, 5.0], [*(math.sqrt(v) for v in var[:-4]), 7.0, 7.0, 7.0, 7.0]

    layers = [layer(name, (mean, var), stored) for name in "ab"]
    assert port_of(layers) is None
    execution = executed(pruned=Pruned((8, 9, 10, 11), ("conv",)))
    port = port_of([dataclasses.replace(one, execution=execution) for one in layers])
    assert port is not None
    assert port.after == pytest.approx(0, abs=1e-6)


def test_one_layer_needs_channels_that_differ():
    """In one layer a common factor explains the variances as well: the input may have had another scale."""
    mean = [0.1 * m for m in statistics(1, channels=16)[0]]
    equal, different = [0.1] * 16, [0.02, 0.05, 0.1, 0.4, 2.0, 6.0, 12.0, 0.03] * 2
    stored = MISTAKES[DEVIATIONS]
    assert port_of([layer("a", (mean, equal), stored)]) is None
    alone = port_of([layer("a", (mean, different), stored)])
    assert alone is not None
    assert alone.fault == DEVIATIONS
    both = port_of([layer("a", (mean, equal), stored), layer("b", (mean, [9.0] * 16), stored)])
    assert both is not None


def test_few_channels_are_no_evidence():
    mean, var = statistics(2, channels=7)
    assert port_of([layer("a", (mean, var), MISTAKES[EXCHANGE])]) is None
    mean, var = statistics(2, channels=8)
    assert port_of([layer("a", (mean, var), MISTAKES[EXCHANGE])]) is not None


def test_variances_near_1_show_nothing():
    layers = network(MISTAKES[DEVIATIONS], width=0.2)
    assert mean_effect(layers) < 0.15
    assert port_of(layers) is None


def test_the_limits_can_be_changed():
    layers = network(MISTAKES[DEVIATIONS], width=0.5)
    effect = mean_effect(layers)
    assert port_of(layers, effect=effect - 1e-6) is not None
    assert port_of(layers, effect=effect + 1e-6) is None
    noisy = network(lambda mean, var: (mean, [1.15 * math.sqrt(v) for v in var]), width=3)
    assert port_of(noisy, ratio=0.9) is not None
    assert port_of(noisy, ratio=0.1) is None
