"""PyTorch Geometric: its own BatchNorm around torch's, with batches of graphs."""

from __future__ import annotations

import dataclasses

import pytest
import torch

torch_geometric = pytest.importorskip(
    "torch_geometric", reason="make test-integration installs torch_geometric", exc_type=ImportError
)
from tests.integration.case import BATCHES, Case  # noqa: E402
from tests.integration.cells import CELLS, judge, run_lines  # noqa: E402
from torch import nn  # noqa: E402
from torch_geometric.data import Data  # noqa: E402
from torch_geometric.loader import DataLoader  # noqa: E402
from torch_geometric.nn import MLP, PointNetConv, global_add_pool, global_mean_pool, models  # noqa: E402


def graphs():
    """Return batches of random graphs."""
    generator = torch.Generator().manual_seed(1)
    data = [
        Data(
            x=torch.randn(12, 6, generator=generator) + torch.randn((), generator=generator),
            edge_index=torch.randint(0, 12, (2, 40), generator=generator),
            pos=torch.randn(12, 3, generator=generator),
        )
        for _ in range(8 * BATCHES)
    ]
    return list(DataLoader(data, batch_size=8))


def labelled(batch, output):
    batch.y = output.argmax(1)
    return batch


class Nodes(nn.Module):
    """A class for each node, as in the examples of PyTorch Geometric."""

    def __init__(self, network):
        super().__init__()
        self.network = network

    def forward(self, data):
        return self.network(data.x, data.edge_index)


class Graphs(nn.Module):
    """A class for each graph: a network, a pool, and a head with BN."""

    def __init__(self, network):
        super().__init__()
        self.network = network
        self.head = MLP([16, 16, 4], norm="batch_norm", dropout=0.5)

    def forward(self, data):
        return self.head(global_add_pool(self.network(data.x, data.edge_index), data.batch))


class PointNet(nn.Module):
    """A point cloud: the convolution of PointNet++ with BN in its networks."""

    def __init__(self):
        super().__init__()
        self.network = PointNetConv(MLP([6 + 3, 16, 16]), MLP([16, 16]))
        self.head = MLP([16, 16, 4], dropout=0.5)

    def forward(self, data):
        return self.head(global_mean_pool(self.network(data.x, data.pos, data.edge_index), data.batch))


def network(name, build):
    return Case(
        name,
        build,
        graphs,
        lambda batch: ((batch,), {}),
        label=labelled,
        # torch.export takes tensors alone: the network inside gets the tensors of the graphs
        program=lambda model, batch: (model.network, (batch.x, batch.edge_index), {}),
    )


CASES = [
    network("GCN", lambda: Nodes(models.GCN(6, 16, 3, 4, norm="BatchNorm"))),
    network("GraphSAGE", lambda: Nodes(models.GraphSAGE(6, 16, 3, 4, norm="BatchNorm"))),
    network("GIN", lambda: Graphs(models.GIN(6, 16, 3, norm="BatchNorm"))),
    dataclasses.replace(
        network("PointNet++", PointNet),
        program=lambda model, batch: (model.network, (batch.x, batch.pos, batch.edge_index), {}),
    ),
]


LINES = """
model = Graphs(GIN(6, 16, 3, norm="BatchNorm"))  # a module whose forward takes a Data
bnlab.recalibrate(model, loader)  # the DataLoader of PyTorch Geometric
print(bnlab.check(model, data=loader).conclusion)
"""


@pytest.mark.parametrize("action", CELLS)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_cell(case, action, record_property):
    judge("torch_geometric", case, action, record_property)


def test_lines(record_property):
    namespace = run_lines(
        "torch_geometric", LINES, record_property, loader=CASES[0].data, Graphs=Graphs, GIN=models.GIN
    )
    assert namespace["model"].head.norms[0].module.num_batches_tracked > 0
