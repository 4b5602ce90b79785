"""Paths that stand for several files, and files that hold a part of a network."""

import numpy as np
import pytest
import torch
from tests.ranks import save_ranks
from tests.samples import save, state_dict

from bnlab.errors import BnlabError, IncompleteFile
from bnlab.observe.evidence import Hyperparameters
from bnlab.observe.files.checkpoint import read_checkpoint, read_stored

STATE = state_dict("bn1", channels=9)


def read(path):
    return read_checkpoint(path, Hyperparameters())


@pytest.mark.parametrize("target", ["rank0.pt", "rank1.pt", "rank*.pt"])
def test_the_files_of_all_ranks_are_read_together(tmp_path, target):
    save_ranks(STATE, tmp_path)
    evidence = read(tmp_path / target)
    (layer,) = evidence.networks[0].layers
    assert np.array_equal(layer.running_var, STATE["bn1.running_var"].double().numpy())
    assert not evidence.incomplete
    tree = read_stored(tmp_path / target).tree
    assert all(np.array_equal(tree[name].read(), value.numpy()) for name, value in STATE.items())


def test_a_rank_alone_is_half_a_network(tmp_path):
    save_ranks(STATE, tmp_path, "net_rank_{}_of_2.pt")
    (tmp_path / "net_rank_0_of_2.pt").unlink()
    evidence = read(tmp_path / "net_rank_1_of_2.pt")
    assert evidence.networks == ()
    assert evidence.incomplete == (("bn1", "lacks values 0 to 4 of the 9 of running_mean"),)
    assert "Put all files of net_rank_*_of_2.pt into one folder" in evidence.way_to_the_rest


def test_two_of_three_ranks_are_half_a_network(tmp_path):
    save_ranks(STATE, tmp_path, world=3)
    (tmp_path / "rank1.pt").unlink()
    evidence = read(tmp_path / "rank*.pt")
    assert evidence.incomplete == (("bn1", "lacks values 3 to 5 of the 9 of running_mean"),)
    assert "rank*.pt" in evidence.way_to_the_rest


def test_ranks_of_different_runs_are_no_network(tmp_path):
    save_ranks(STATE, tmp_path)
    save_ranks(state_dict("bn1", channels=12), tmp_path, "other{}.pt")
    (tmp_path / "other1.pt").rename(tmp_path / "rank1.pt")
    with pytest.raises(BnlabError, match="pieces of one tensor"):
        read(tmp_path / "rank0.pt")


def test_other_numbered_files_are_read_alone(tmp_path):
    for epoch in (1, 2):
        state = state_dict("bn1")
        state["bn1.running_mean"] += epoch
        save(state, tmp_path / f"epoch_{epoch}.pt")
    (layer,) = read(tmp_path / "epoch_2.pt").networks[0].layers
    assert np.array_equal(layer.running_mean, state["bn1.running_mean"].double().numpy())
    with pytest.raises(BnlabError, match="no parts of one network"):
        read(tmp_path / "epoch_*.pt")


def test_a_flat_parameter_of_fsdp_is_named(tmp_path):
    state = {key: value for key, value in STATE.items() if "running" in key or "tracked" in key}
    evidence = read(save(state | {"_flat_param": torch.ones(90)}, tmp_path / "a.pt"))
    ((name, reason),) = evidence.incomplete
    assert name == "_flat_param"
    assert "StateDictType.FULL_STATE_DICT" in reason
    assert len(evidence.networks[0].layers) == 1


def test_a_pattern_that_matches_nothing(tmp_path):
    with pytest.raises(BnlabError, match="no such file"):
        read(tmp_path / "rank*.pt")


def test_half_a_network_is_not_loaded(tmp_path):
    save({"bn.weight": torch.ones(3)}, tmp_path / "m-1-of-2.pt")
    with pytest.raises(IncompleteFile, match=r"got one that lacks m-2-of-2\.pt"):
        read_stored(tmp_path / "m-*-of-2.pt")
