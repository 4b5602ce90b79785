"""Repair the statistics of a checkpoint, and keep the repair only where it helps.

The checkpoint comes from a training whose running statistics hardly moved. `bnlab.repair` recomputes them from the
training data, measures the metric before and after, and takes the repair back if the metric gets worse.
"""

from __future__ import annotations

import torch
from digits_network import accuracy, build_network, load_batches, train

import bnlab

torch.manual_seed(0)
training, held_out = load_batches()
trained = build_network(momentum=0.001)
train(trained, training)
torch.save(trained.state_dict(), "digits.pt")

# A project that has only the checkpoint starts here.
print(bnlab.check("digits.pt", momentum=0.001).conclusion)

model = build_network(momentum=0.001)
model.load_state_dict(torch.load("digits.pt", weights_only=True))
print(f"accuracy before: {accuracy(model, held_out):.3f}")

receipt = bnlab.repair(model, data=held_out, train_data=training, metric=accuracy)
print(receipt)
print(f"accuracy after: {accuracy(model, held_out):.3f}")

if receipt.changes.kept:
    torch.save(model.state_dict(), "digits-repaired.pt")
    print("wrote digits-repaired.pt")
