import torch
from torch import nn

from bnlab.watching.owners import Owners


def sgd(*modules):
    return torch.optim.SGD([one for module in modules for one in module.parameters()], lr=0.1)


def test_without_an_optimizer_every_one_with_parameters_of_the_model_trains_it():
    model, other = nn.ModuleList([nn.BatchNorm1d(2), nn.BatchNorm1d(2)]), nn.Linear(2, 2)
    owners = Owners(model, None)
    first, second, foreign = sgd(model[0]), sgd(model[1]), sgd(other)
    assert [owners.trains_model(one) for one in (first, second, foreign)] == [True, True, False]
    assert [owners.trains_layer(first, layer) for layer in model] == [True, False]
    assert [owners.trains_layer(second, layer) for layer in model] == [False, True]


def test_a_layer_that_no_optimizer_trains_belongs_to_every_one():
    model = nn.ModuleList([nn.BatchNorm1d(2), nn.BatchNorm1d(2, affine=False), nn.BatchNorm1d(2)])
    head = sgd(model[0])
    owners = Owners(model, None)
    assert owners.trains_model(head)
    assert all(owners.trains_layer(head, layer) for layer in model)


def test_an_optimizer_that_is_passed_is_the_only_one_and_may_be_wrapped():
    model = nn.BatchNorm1d(2)
    own, other = sgd(model), sgd(model)

    class Wrapper:
        param_groups = own.param_groups

    owners = Owners(model, Wrapper())
    assert owners.trains_model(own)
    assert not owners.trains_model(other)
    assert owners.trains_layer(own, model)


def test_parameters_that_are_added_later_count():
    model = nn.ModuleList([nn.BatchNorm1d(2), nn.BatchNorm1d(2)])
    optimizer = sgd(model[0])
    owners = Owners(model, None)
    assert len(owners.parameters_of(optimizer)) == 2
    optimizer.add_param_group({"params": list(model[1].parameters())})
    assert len(owners.parameters_of(optimizer)) == 4
