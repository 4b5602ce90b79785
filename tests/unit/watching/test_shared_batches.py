import torch
from torch import distributed, nn

from bnlab.watching.pooled_batches import Block
from bnlab.watching.shared_batches import merged_over_ranks


def block_of(values):
    return Block(float(len(values)), values.mean(0), values.var(0, correction=0) * len(values))


def test_without_ranks_everything_stays():
    layer, block = nn.SyncBatchNorm(2), block_of(torch.randn(4, 2))
    assert merged_over_ranks([(layer, block), (layer, None)]) == [block, None]
    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    try:
        assert merged_over_ranks([(layer, block), (layer, None)]) == [block, None]
    finally:
        distributed.destroy_process_group()


def test_ranks_merge_what_each_of_them_has(monkeypatch):
    """The exchange itself is that of torch; `test_once_per_step` runs it between processes."""
    of_ranks = [torch.randn(size, 2).double() + size for size in (3, 5, 4)]

    def all_gather(results, own, group):
        for result, values in zip(results, of_ranks, strict=True):
            moments = [block_of(values)[index] for index in range(3)]
            result.copy_(torch.cat([torch.tensor([moments[0]]).double(), *moments[1:], torch.zeros(7).double()]))
        assert torch.equal(own, results[0])

    monkeypatch.setattr(distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(distributed, "get_world_size", lambda _: len(of_ranks))
    monkeypatch.setattr(distributed, "all_gather", all_gather)
    layers = [
        (nn.SyncBatchNorm(2, process_group="all"), block_of(of_ranks[0])),
        (nn.SyncBatchNorm(3, process_group="all"), None),
    ]
    merged, empty = merged_over_ranks(layers)
    whole = torch.cat(of_ranks)
    assert float(merged.count) == len(whole)
    torch.testing.assert_close(merged.statistics.var, whole.var(0, correction=0))
    torch.testing.assert_close(merged.mean, whole.mean(0))
    assert float(empty.count) == 0
