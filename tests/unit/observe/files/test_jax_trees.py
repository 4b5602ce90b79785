from bnlab.observe.files.containers import containers, keys_of
from bnlab.observe.files.jax_trees import with_joined_trees


def joined(tree):
    """Return the containers that come on top of those of the tree, by the path to them."""
    plain = list(containers(tree))
    return {keys_of(one.path): dict(one.children) for one in list(with_joined_trees(containers(tree)))[len(plain) :]}


def test_the_containers_of_a_tree_come_first_and_unchanged():
    tree = {"params": {"a": 1}, "batch_stats": {"a": 2}}
    both = list(with_joined_trees(containers(tree)))
    assert [keys_of(one.path) for one in both] == [(), ("params",), ("batch_stats",), ()]


def test_other_trees_have_nothing_on_top():
    assert joined({"state_dict": {"bn.running_mean": 1}, "batch_stats": 3}) == {}


def test_flax_collections_are_flat_with_slashes():
    tree = {"state": {"params": {"bn": {"scale": 1}}, "batch_stats": {"bn": {"mean": 2, "var": 3}}}}
    flat = joined(tree)[("state",)]
    assert flat.items() >= {"params/bn/scale": 1, "batch_stats/bn/mean": 2, "batch_stats/bn/var": 3}.items()


def test_collections_within_collections_are_joined_once():
    inner = {"batch_stats": {"bn": {"mean": 1, "var": 2}}}
    assert list(joined({"batch_stats": {"x": inner}})) == [()]


def test_the_states_of_haiku_get_the_parameters_of_their_modules():
    state = {"net/bn/~/mean_ema": {"average": 1, "hidden": 2}, "net/bn/~/var_ema": {"average": 3}}
    flat = joined([{"net/bn": {"scale": 4, "offset": 5}}, state])[()]
    assert flat == {
        "net/bn/~/mean_ema/average": 1,
        "net/bn/~/mean_ema/hidden": 2,
        "net/bn/~/var_ema/average": 3,
        "net/bn/scale": 4,
        "net/bn/offset": 5,
    }


def test_the_variables_of_nnx_are_taken_out_of_their_dicts():
    tree = {"bn": {"mean": {"value": 1}, "var": {"raw_value": 2}, "scale": 3}}
    assert joined(tree)[("bn",)] == {"mean": 1, "var": 2, "scale": 3}


def test_a_very_deep_tree_ends():
    tree = {"mean": 1}
    for _ in range(5000):
        tree = {"x": tree}
    assert list(joined({"batch_stats": tree})) == [()]
