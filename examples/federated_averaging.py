"""Pool the BN statistics of federated clients, with Flower or without it.

A server that averages running variances leaves out the variance between the clients: the more their data differs, the
more is missing. `bnlab.pool` adds it. It finds the BN layers by their tensors, whatever their names are, and averages
everything else as FedAvg does. `PooledFedAvg` is the strategy for Flower; without Flower this script plays the server
and three clients with different scanners.
"""

from __future__ import annotations

import copy
import importlib.util
import warnings

import torch
from digits_network import Batch, accuracy, build_network, load_batches, train
from torch import Tensor

import bnlab

if importlib.util.find_spec("flwr"):
    from collections.abc import Iterable

    from flwr.app import ArrayRecord, Message, MetricRecord
    from flwr.serverapp.strategy import FedAvg

    class PooledFedAvg(FedAvg):
        """FedAvg with BN statistics that are pooled and not averaged."""

        def aggregate_train(
            self, server_round: int, replies: Iterable[Message]
        ) -> tuple[ArrayRecord | None, MetricRecord | None]:
            """Aggregate as FedAvg does, and put the pooled state in the place of the average."""
            replies = list(replies)
            arrays, metrics = super().aggregate_train(server_round, replies)
            if arrays is None:
                return arrays, metrics
            contents = [reply.content for reply in replies if not reply.has_error()]
            states = [next(iter(one.array_records.values())).to_torch_state_dict() for one in contents]
            counts = [next(iter(one.metric_records.values()))[self.weighted_by_key] for one in contents]
            return ArrayRecord(pooled_state(states, counts)), metrics


def pooled_state(states: list[dict[str, Tensor]], counts: list[int]) -> dict[str, Tensor]:
    """Return the next state of the server: pooled statistics, and averages of everything else.

    bnlab warns that statistics of the clients' weights are not those of the averaged weights. It is right: the clients
    of the next round update them, and the last exchange below measures them.
    """
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "pool: The other tensors differ")
        return bnlab.pool(states, counts)


def split(batches: list[Batch]) -> list[list[Batch]]:
    """Return the data of three clients of unequal sizes, whose scanners have different contrast and brightness."""
    images, labels = (torch.cat(parts) for parts in zip(*batches, strict=True))
    scanned = []
    for part, contrast, brightness in ((slice(0, 150), 1, 0.3), (slice(150, 500), 0.9, 0), (slice(500, None), 1, 0)):
        own = images[part] * contrast + brightness
        scanned.append(list(zip(own.split(50), labels[part].split(50), strict=True)))
    return scanned


torch.manual_seed(0)
training, held_out = load_batches()
clients = split(training)
unseen = [batch for batches in split(held_out) for batch in batches]
counts = [sum(len(labels) for _, labels in batches) for batches in clients]
server = build_network()

for _ in range(4):
    states = []
    for batches in clients:
        model = copy.deepcopy(server)
        for name, buffer in model.named_buffers():
            if name.endswith("num_batches_tracked"):
                buffer.zero_()  # counters are summed: each client counts the batches of this round alone
        train(model, batches, epochs=1)
        states.append(model.state_dict())
    server.load_state_dict(pooled_state(states, counts))
print(f"accuracy after four rounds: {accuracy(server, unseen):.3f}")

# The last exchange: all clients measure the statistics of the same averaged weights, so that pooling them is exact.
states = [bnlab.recalibrate(copy.deepcopy(server), batches).model.state_dict() for batches in clients]
server.load_state_dict(bnlab.pool(states, counts))
print(f"accuracy with the statistics of these weights: {accuracy(server, unseen):.3f}")

central = bnlab.recalibrate(copy.deepcopy(server), [batch for batches in clients for batch in batches]).model
ratio = server.bn1.running_var / central.bn1.running_var
print(f"variance in bn1 over that of all data in one place: {ratio.min():.3f} to {ratio.max():.3f}")

averages = {
    name: sum(state[name] * count for state, count in zip(states, counts, strict=True)) / sum(counts)
    for name in states[0]
    if name.endswith(("running_mean", "running_var"))
}
server.load_state_dict(averages, strict=False)
ratio = server.bn1.running_var / central.bn1.running_var
print(f"an average of the variances instead: {ratio.min():.3f} to {ratio.max():.3f}")
