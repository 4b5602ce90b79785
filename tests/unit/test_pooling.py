"""Pooled statistics are those of all values together, whatever the layers are called and however the data is split."""

import warnings
from collections import OrderedDict
from types import MappingProxyType

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.samples import layer_state, small_network, state_dict
from torch import nn
from torch.testing import assert_close

import bnlab
from bnlab.errors import BnlabError, BnlabWarning, NoBatchNorm, UsageError
from bnlab.pooling import pooled_states


def bn(mean, var, counter=None, name="bn", dtype=torch.float64):
    """Return the state of one BN layer without weight and bias."""
    state = {f"{name}.running_mean": torch.tensor(mean, dtype=dtype)}
    state[f"{name}.running_var"] = torch.tensor(var, dtype=dtype)
    if counter is not None:
        state[f"{name}.num_batches_tracked"] = torch.tensor(counter)
    return state


def measured(values, *, unbiased=False, name="bn"):
    """Return the state of a layer that has seen exactly these values, of shape (N, C)."""
    values = np.asarray(values)
    return bn(values.mean(0).tolist(), values.var(0, ddof=unbiased).tolist(), name=name)


GOOD = bn([0.0, 1.0], [1.0, 1.0], 5)


@pytest.fixture
def shares():
    """Values of three clients, of different numbers and distributions: shape (N, 5)."""
    generator = np.random.default_rng(0)
    return [
        shift + scale * generator.normal(size=(size, 5))
        for size, shift, scale in ((7, -30, 1), (200, 0, 2), (1500, 4, 3))
    ]


@pytest.mark.parametrize("name", ["bn1", "norm_7", "foo.bar", "encoder.stages.0.3.body.1"])
def test_pooled_statistics_are_those_of_the_values_of_all_clients_together(shares, name):
    states = [measured(values, name=name) for values in shares]
    pooled = bnlab.pool(states, [len(values) for values in shares])
    everything = np.concatenate(shares)
    np.testing.assert_allclose(pooled[f"{name}.running_mean"], everything.mean(0), rtol=1e-12, atol=1e-12)
    np.testing.assert_allclose(pooled[f"{name}.running_var"], everything.var(0), rtol=1e-12)
    average = np.average([values.var(0) for values in shares], axis=0, weights=[len(values) for values in shares])
    assert (everything.var(0) > 1.3 * average).all(), "an average of variances passes this test"


def test_the_result_is_in_the_dtype_of_the_first_state_to_its_rounding(shares):
    states = [{key: value.float() for key, value in measured(values).items()} for values in shares]
    pooled = bnlab.pool(states, [len(values) for values in shares])
    everything = np.concatenate(shares)
    assert pooled["bn.running_var"].dtype == torch.float32
    np.testing.assert_allclose(pooled["bn.running_mean"], everything.mean(0), rtol=1e-6, atol=1e-6)
    np.testing.assert_allclose(pooled["bn.running_var"], everything.var(0), rtol=1e-6)


def test_unbiased_variances_are_taken_as_they_stand_and_the_distance_is_the_documented_one(shares):
    states = [measured(values, unbiased=True) for values in shares]
    var = bnlab.pool(states, [len(values) for values in shares])["bn.running_var"].numpy()
    everything = np.concatenate(shares)
    above = (sum(values.var(0, ddof=1) for values in shares) - var) / (len(everything) - 1)
    np.testing.assert_allclose(var - above, everything.var(0, ddof=1), rtol=1e-12)


def test_a_network_that_bnlab_recalibrated_on_shares_of_the_data_is_the_one_of_all_data():
    torch.manual_seed(0)
    model = small_network()
    images = (
        torch.randn(96, 3, 9, 9) * torch.linspace(0.2, 3, 96)[:, None, None, None]
        + torch.linspace(-3, 3, 96)[:, None, None, None]
    )
    parts = [images[:16], images[16:32], images[32:]]
    states = []
    for part in parts:
        receipt = bnlab.recalibrate(model[:2], [part])
        states.append({key: value.clone() for key, value in receipt.model.state_dict().items()})
    pooled = bnlab.pool(states, [len(part) for part in parts])
    values = model[0](images).double().transpose(0, 1).flatten(1)
    assert_close(pooled["1.running_mean"], values.mean(1).float(), rtol=1e-5, atol=1e-6)
    assert_close(pooled["1.running_var"], values.var(1).float(), rtol=1e-3, atol=0)


def states_of(draw, size):
    floats = st.floats(-1e3, 1e3, width=32)
    layers = st.tuples(
        st.lists(floats, min_size=2, max_size=2), st.lists(st.floats(0, 1e4, width=32), min_size=2, max_size=2)
    )
    return [(bn(*draw(layers)), draw(st.floats(0.125, 1e6))) for _ in range(size)]


weighted_states = st.composite(lambda draw: states_of(draw, draw(st.integers(2, 5))))()
three_states = st.composite(lambda draw: states_of(draw, 3))()


def assert_pooled_alike(left, right):
    scale = 1e-9 * max(1.0, float(left["bn.running_var"].max()), float(left["bn.running_mean"].abs().max()))
    assert_close(left, right, rtol=1e-9, atol=scale)


@settings(max_examples=40, deadline=None)
@given(weighted_states, st.randoms(use_true_random=False))
def test_the_order_of_the_states_does_not_matter(pairs, random):
    states, counts = zip(*pairs, strict=True)
    shuffled = list(pairs)
    random.shuffle(shuffled)
    other_states, other_counts = zip(*shuffled, strict=True)
    assert_pooled_alike(bnlab.pool(states, counts), bnlab.pool(other_states, other_counts))


@settings(max_examples=40, deadline=None)
@given(three_states)
def test_pooling_in_steps_is_pooling_at_once(pairs):
    (a, b, c), (na, nb, nc) = zip(*pairs, strict=True)
    in_steps = bnlab.pool([bnlab.pool([a, b], [na, nb]), c], [na + nb, nc])
    assert_pooled_alike(in_steps, bnlab.pool([a, b, c], [na, nb, nc]))


@settings(max_examples=20, deadline=None)
@given(st.integers(1, 4), st.floats(0.1, 10), st.integers(0, 5))
def test_a_state_pooled_with_itself_changes_in_its_counters_only(copies, weight, seed):
    state = {
        **state_dict("a", "b"),
        "mask": torch.tensor([[0.0, -torch.inf]]),
        "b.running_var": layer_state(seed=seed)["running_var"],
    }
    pooled = bnlab.pool([state] * copies, [weight * (index + 1) for index in range(copies)])
    assert pooled.keys() == state.keys()
    for key, value in state.items():
        assert torch.equal(pooled[key], value * copies if key.endswith("tracked") else value), key


def test_ranks_of_one_model_are_pooled_without_a_warning():
    ranks = [{**state_dict("bn"), "bn.running_mean": torch.full((4,), float(rank))} for rank in range(3)]
    ranks = [{**ranks[0], **{key: value for key, value in rank.items() if "running" in key}} for rank in ranks]
    pooled = bnlab.pool(ranks)
    assert pooled["bn.running_mean"].tolist() == [1.0] * 4
    assert_close(pooled["bn.running_var"], ranks[0]["bn.running_var"] + 2 / 3)
    assert int(pooled["bn.num_batches_tracked"]) == 3000


def test_counters_are_the_weights_layer_by_layer_and_it_says_so():
    a = {**bn([0.0], [1.0], 30), **bn([0.0], [1.0], 10, name="shared")}
    b = {**bn([4.0], [1.0], 10), **bn([4.0], [1.0], 10, name="shared")}
    with pytest.warns(BnlabWarning, match=r"weights are num_batches_tracked \(bn: 30, 10\)"):
        pooled = bnlab.pool([a, b])
    assert (pooled["bn.running_mean"].item(), pooled["bn.running_var"].item()) == (1.0, 4.0)
    assert (pooled["shared.running_mean"].item(), pooled["shared.running_var"].item()) == (2.0, 5.0)
    assert int(pooled["bn.num_batches_tracked"]) == 40


@pytest.mark.parametrize("counters", [(None, None), (0, 5), (5, None), (-3, 5)])
def test_all_states_weigh_the_same_where_a_counter_cannot_serve(counters):
    states = [bn([mean], [2.0], counter) for mean, counter in zip((0.0, 4.0), counters, strict=True)]
    with pytest.warns(BnlabWarning, match="All states weigh the same in bn, because"):
        pooled = bnlab.pool(states)
    assert (pooled["bn.running_mean"].item(), pooled["bn.running_var"].item()) == (2.0, 6.0)


def test_a_layer_that_one_state_never_updated_weighs_nothing_by_its_counter():
    states = [bn([4.0], [2.0], 7), bn([0.0], [1.0], 0)]
    with pytest.warns(BnlabWarning, match=r"states\[1\] never updated the statistics of bn"):
        pooled = bnlab.pool(states)
    assert (pooled["bn.running_mean"].item(), pooled["bn.running_var"].item()) == (4.0, 2.0)
    with pytest.warns(BnlabWarning, match="never updated"):
        assert bnlab.pool(states, [1, 1])["bn.running_mean"].item() == 2.0


def test_a_network_that_nobody_updated_stays_as_it_is():
    state = nn.BatchNorm1d(2).state_dict()
    assert_close(bnlab.pool([state, state]), state)


def test_other_tensors_are_averaged_with_the_weights_and_it_says_what_that_means():
    def state(value):
        return {
            **bn([0.0], [1.0], 1),
            "fc.weight": torch.tensor([value], dtype=torch.float16),
            "complex": torch.tensor([value * 1j]),
            "step": torch.tensor(int(value)),
            "flag": torch.tensor(value > 1),
            "epoch": value,
        }

    states = [state(1.0), state(5.0)]
    with pytest.warns(BnlabWarning) as caught:
        pooled = bnlab.pool(states, [3, 1])
    assert len(caught) == 1
    assert "bnlab.recalibrate(model, data)" in str(caught[0].message)
    assert "flag and step differ between the states and come from states[0]" in str(caught[0].message)
    assert caught[0].filename == __file__
    assert pooled["fc.weight"].tolist() == [2.0]
    assert pooled["fc.weight"].dtype == torch.float16
    assert pooled["complex"].tolist() == [2j]
    assert (int(pooled["step"]), bool(pooled["flag"]), pooled["epoch"]) == (1, False, 1.0)
    with pytest.warns(BnlabWarning, match="not those of the weights of one state"):
        first = bnlab.pool(states, [3, 1], rest="first")
    assert first["fc.weight"].tolist() == [1.0]


def test_the_rest_may_be_of_another_shape_where_it_comes_from_the_first():
    a, b = ({**bn([0.0], [1.0], 1), "head": torch.zeros(size)} for size in (2, 3))
    with pytest.raises(UsageError, match=r"states\[1\]: head must be a tensor as in states\[0\].*rest='first'"):
        bnlab.pool([a, b])
    with pytest.warns(BnlabWarning, match="differ"):
        assert bnlab.pool([a, b], rest="first")["head"].shape == (2,)


@pytest.mark.parametrize(
    "counts", [(3, 1), np.array([3, 1]), torch.tensor([3.0, 1.0]), [np.float32(3), torch.tensor(1)]]
)
def test_every_kind_of_number_is_a_count(counts):
    assert bnlab.pool([bn([0.0], [1.0], 1), bn([4.0], [1.0], 1)], counts)["bn.running_mean"].item() == 1.0


def test_no_input_changes_and_the_result_shares_no_memory():
    states = [state_dict("bn"), state_dict("bn")]
    copies = [{key: value.clone() for key, value in state.items()} for state in states]
    for rest in ("average", "first"):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", BnlabWarning)
            pooled = bnlab.pool(states, rest=rest)
        for value in pooled.values():
            value.fill_(7)
    assert_close(states, copies, rtol=0, atol=0)


def test_prefixes_of_wrappers_are_no_difference():
    plain, wrapped = state_dict("bn1", "layer1.bn"), state_dict("bn1", "layer1.bn", prefix="module.")
    compiled = {key.replace("layer1.", "layer1._orig_mod."): value for key, value in plain.items()}
    wrapped |= {f"module.{key}": value for key, value in plain.items()}
    assert bnlab.pool([plain, wrapped, compiled]).keys() == plain.keys()
    assert bnlab.pool([wrapped, plain]).keys() == wrapped.keys()


def test_containers_and_several_networks_keep_their_nesting():
    def checkpoint(shift):
        networks = {
            name: {**state_dict("bn"), **bn([shift] * 4, [1.0] * 4, 9, dtype=torch.float32)}
            for name in ("model", "ema")
        }
        return {"epoch": 3, "nets": [networks], "optimizer": {"state": {0: {"exp_avg": torch.full((1,), shift)}}}}

    torch.manual_seed(0)
    first = checkpoint(0.0)
    torch.manual_seed(0)
    with pytest.warns(BnlabWarning, match="the state of the optimizer differs between the states and comes from"):
        pooled = bnlab.pool([first, checkpoint(2.0)])
    for name in ("model", "ema"):
        assert pooled["nets"][0][name]["bn.running_var"].tolist() == [2.0] * 4
    assert pooled["epoch"] == 3
    assert pooled["optimizer"]["state"][0]["exp_avg"].tolist() == [0.0]


def test_a_layer_under_two_names_is_pooled_as_one_under_both():
    def tied(mean):
        state = bn([mean], [1.0], 5)
        return state | {key.replace("bn", "twin"): value for key, value in state.items()}

    pooled = bnlab.pool([tied(0.0), tied(4.0)])
    assert pooled["twin.running_var"].item() == pooled["bn.running_var"].item() == 5.0


def test_metadata_and_kind_of_the_first_state_are_kept():
    model = small_network()
    pooled = bnlab.pool([model.state_dict(), MappingProxyType(model.state_dict())])
    assert isinstance(pooled, OrderedDict)
    assert pooled._metadata == model.state_dict()._metadata
    assert isinstance(bnlab.pool([MappingProxyType(model.state_dict())]), dict)
    model.load_state_dict(pooled)


def test_stacked_ensembles_have_a_counter_for_each_member():
    def stacked(means, counters):
        return {
            "bn.running_mean": torch.tensor(means).repeat(3, 1).T.contiguous(),
            "bn.running_var": torch.ones(2, 3),
            "bn.num_batches_tracked": torch.tensor(counters),
        }

    with pytest.warns(BnlabWarning, match="weights are num_batches_tracked"):
        pooled = bnlab.pool([stacked([0.0, 0.0], [3, 1]), stacked([4.0, 4.0], [1, 1])])
    assert pooled["bn.running_mean"].tolist() == [[1.0] * 3, [2.0] * 3]
    assert pooled["bn.num_batches_tracked"].tolist() == [4, 2]


def test_arrays_under_the_names_of_another_library():
    def keras(mean):
        names = {"moving_mean": mean, "moving_variance": 1.0, "gamma": 1.0, "beta": 0.0}
        return {f"norm_7/{name}": np.full(2, value, np.float32) for name, value in names.items()}

    with pytest.warns(BnlabWarning, match="weigh the same in norm_7"):
        pooled = bnlab.pool([keras(0.0), keras(4.0)])
    assert isinstance(pooled["norm_7/moving_variance"], np.ndarray)
    assert pooled["norm_7/moving_variance"].dtype == np.float32
    assert pooled["norm_7/moving_variance"].tolist() == [5.0, 5.0]


def test_a_variance_beyond_the_range_of_its_dtype_is_its_largest_value():
    states = [bn([mean], [1.0], 1, dtype=torch.float16) for mean in (-3e4, 3e4)]
    assert bnlab.pool(states)["bn.running_var"].item() == torch.finfo(torch.float16).max


def test_what_is_no_layer_is_named():
    codebook = {"q.running_mean": torch.zeros(2, 3), "q.running_var": torch.ones(2, 3)}
    with pytest.warns(BnlabWarning, match="q is not pooled as a BN layer"):
        bnlab.pool([{**bn([0.0], [1.0], 1), **codebook}])


def test_what_cannot_be_averaged_is_named_and_comes_from_the_first():
    state = {**GOOD, "q": torch.eye(2).to_sparse()}
    with pytest.warns(BnlabWarning, match=r"pool: q: sparse, quantized or foreign, and taken from states\[0\]\.$"):
        assert torch.equal(bnlab.pool([state, state])["q"].to_dense(), torch.eye(2))


def test_float8_is_averaged_and_compared():
    states = [{**GOOD, "w": torch.full((2,), value).to(torch.float8_e4m3fn)} for value in (1.0, 3.0)]
    for rest, value in (("average", 2.0), ("first", 1.0)):
        with pytest.warns(BnlabWarning, match="The other tensors differ"):
            assert bnlab.pool(states, rest=rest)["w"].float().tolist() == [value] * 2


def test_one_state_is_in_memory_at_a_time():
    class Lazy:
        """A sequence that makes a state when it is indexed."""

        def __init__(self):
            self.alive = 0

        def __len__(self):
            return 4

        def __getitem__(self, index):
            return small_network().state_dict()

    pooled = pooled_states(Lazy(), [1, 2, 3, 4])
    assert_close(pooled.state["1.running_var"], small_network().state_dict()["1.running_var"])
    assert (pooled.notes, pooled.weights, len(pooled.leaves.layers)) == ((), "counts", 2)


@pytest.mark.parametrize(
    ("states", "options", "message"),
    [
        ([], {}, "states must hold at least one"),
        (GOOD, {}, "states must be a list of state dicts, got dict"),
        ([GOOD, nn.BatchNorm1d(2)], {}, r"states\[1\] must be a state dict, got the module BatchNorm1d. Pass model"),
        (["a.pt"], {}, r"states\[0\] must be a state dict, got str. Load it"),
        ([GOOD], {"rest": "mean"}, "rest must be 'average' or 'first', got 'mean'"),
        ([GOOD], {"counts": [1, 2]}, "counts must be one number per state, got 2 for 1"),
        ([GOOD], {"counts": [0]}, "counts must be finite numbers above 0, got 0. Leave out"),
        ([GOOD], {"counts": [True]}, "counts must be finite numbers above 0, got True"),
        ([GOOD], {"counts": [float("nan")]}, "above 0, got nan"),
        ([GOOD], {"counts": ["3"]}, "above 0, got '3'"),
        ([GOOD], {"counts": [10**400]}, "above 0, got 1000"),
        ([GOOD], {"counts": [torch.ones(2)]}, "above 0, got tensor"),
        ([GOOD, GOOD], {"counts": [1.7e308, 1.7e308]}, "finite sum"),
        ([GOOD], {"counts": 3}, "counts must be one number per state, got int"),
        ([GOOD, {}], {}, r"states\[1\]: state must have the BN layers of states\[0\], got none at bn. Pool"),
        ([GOOD, {**GOOD, **bn([0.0], [1.0], name="more")}], {}, r"states\[1\]: .* got more as well"),
        ([GOOD, bn([0.0], [1.0], 5)], {}, r"states\[1\]: bn must have statistics of shape \(2,\).*got \(1,\)"),
        ([GOOD, bn([0.0, 1.0], [1.0, -2.0], 5)], {}, r"states\[1\]: running variance of bn .* got -2 in channel 1. L"),
        ([bn([np.nan, 1.0], [1.0, 2.0], 5)], {}, r"states\[0\]: running mean of bn .* finite, got nan in channel 0"),
        ([{**GOOD, "w": torch.ones(1)}, {**GOOD, "w": torch.tensor([np.nan])}], {}, r"states\[1\]: w must be finite"),
        ([{**GOOD, "w": torch.tensor([np.inf])}, {**GOOD, "w": torch.ones(1)}], {}, r"states\[0\]: w must be f.*inf"),
        ([{**GOOD, "w": torch.ones(1)}, GOOD], {}, r"states\[1\]: w must be a tensor as in .* got none"),
        ([{**GOOD, "w": torch.empty(2, device="meta")}], {}, "w must have values, got a tensor on the meta device"),
        ([bn([0.0], [1.0], 2**62)] * 2, {}, "must sum to at most 9223372036854775807"),
    ],
)  # fmt: skip
def test_what_cannot_be_pooled_is_refused_in_one_line(states, options, message):
    with pytest.raises(UsageError, match=message) as caught:
        bnlab.pool(states, **options)
    assert "\n" not in str(caught.value)


def test_states_without_batch_norm_are_refused():
    with pytest.raises(NoBatchNorm, match=r"states\[0\]: state must hold BN layers, got none among 2 tensors"):
        bnlab.pool([nn.Linear(2, 2).state_dict()])
    with pytest.raises(BnlabError, match="none that can be pooled: bn has no running_var"):
        bnlab.pool([{"bn.running_mean": torch.zeros(2), "bn.num_batches_tracked": torch.tensor(1)}])


def test_a_cumulative_average_has_no_momentum_and_is_pooled_as_any_other():
    states = []
    for shift in (0.0, 8.0):
        layer = nn.BatchNorm1d(3, momentum=None)
        for seed in range(4):
            layer(shift + torch.randn(32, 3, generator=torch.Generator().manual_seed(seed)))
        states.append(layer.state_dict())
    pooled = bnlab.pool(states)
    assert_close(pooled["running_mean"], states[0]["running_mean"] + 4)
    assert_close(pooled["running_var"], states[0]["running_var"] + 16)
    assert int(pooled["num_batches_tracked"]) == 8
