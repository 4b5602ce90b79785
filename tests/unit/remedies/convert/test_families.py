import pytest
from torch import nn

import bnlab
from bnlab.remedies.convert.families import FROZEN, GROUP, class_name, family_of


class Own(nn.BatchNorm2d):
    pass


@pytest.mark.parametrize("kind", [nn.BatchNorm2d, Own, bnlab.nn.GhostBatchNorm2d, nn.InstanceNorm2d])
def test_a_subclass_belongs_to_the_family_of_its_base(kind):
    family, base = family_of(kind)
    assert issubclass(kind, base)
    assert family.rank_of(base) == 2
    assert family.classes[2] is base


def test_layers_of_bnlab_are_no_family_of_torch_although_they_derive_from_its_classes():
    family, base = family_of(bnlab.nn.BatchNorm2d)
    assert (base, family.is_bnlab_class, family.is_plain) == (bnlab.nn.BatchNorm2d, True, True)


def test_classes_of_any_rank_have_none():
    for kind in (nn.SyncBatchNorm, nn.GroupNorm):
        family, base = family_of(kind)
        assert (base, family.rank_of(kind), family.has_ranks) == (kind, None, False)


def test_what_a_family_does():
    assert FROZEN.freezes
    assert FROZEN.is_bnlab_class
    assert not GROUP.keeps_statistics
    family, _ = family_of(nn.BatchNorm1d)
    assert (family.is_plain, family.is_bnlab_class, family.freezes) == (True, False, False)
    assert family_of(nn.Linear) is None


def test_classes_are_called_as_users_know_them():
    assert class_name(nn.BatchNorm2d) == "torch.nn.BatchNorm2d"
    assert class_name(bnlab.nn.BatchNorm2d) == "bnlab.nn.BatchNorm2d"
    assert class_name(Own).endswith("test_families.Own")
