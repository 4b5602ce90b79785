import pytest
import torch
from torch.utils.data import DataLoader, RandomSampler, TensorDataset

from bnlab.integrations.loaders import apart, generators_kept

DATA = TensorDataset(torch.arange(12))


def order(loader):
    return [int(value) for (batch,) in loader for value in batch]


def test_a_second_pass_leaves_the_first_one_alone_although_its_workers_persist():
    loader = DataLoader(DATA, batch_size=4, num_workers=1, persistent_workers=True)
    first = iter(loader)
    assert next(first)[0].tolist() == [0, 1, 2, 3]
    assert order(apart(loader)) == list(range(12))
    assert next(first)[0].tolist() == [4, 5, 6, 7]


def test_the_loader_inside_one_of_accelerate_is_read():
    class Shard:
        def __init__(self, inner):
            self.base_dataloader = inner

        def __iter__(self):
            raise AssertionError("it counts its passes")

    assert order(apart(Shard(DataLoader(DATA, batch_size=4)))) == list(range(12))


@pytest.mark.parametrize("data", [[1, 2], {"a": 1}, iter])
def test_other_data_stay_as_they_are(data):
    assert apart(data) is data


@pytest.mark.parametrize("where", ["loader", "sampler"])
def test_generators_continue_as_if_nothing_had_been_read(where):
    generator = torch.Generator().manual_seed(5)
    if where == "loader":
        loader = DataLoader(DATA, batch_size=4, shuffle=True, generator=generator)
    else:
        loader = DataLoader(DATA, batch_size=4, sampler=RandomSampler(DATA, generator=generator))
    state = generator.get_state()
    torch.manual_seed(0)
    expected = order(loader)
    generator.set_state(state)
    with generators_kept(loader):
        order(apart(loader))
    torch.manual_seed(0)
    assert order(loader) == expected
