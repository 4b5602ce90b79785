"""Train with bnlab's layers, and go back to torch's for everyone else.

The layers take the arguments of torch's and have the same state dict. They stay exact where the mean of the input is
large, keep NaN and inf out of the running statistics, and apply the activation in the same kernel.
"""

from __future__ import annotations

import torch
from digits_network import accuracy, build_network, load_batches, train
from torch import nn

import bnlab

torch.manual_seed(0)
training, held_out = load_batches()

model = build_network()
example = training[0][0]
print(bnlab.convert(model, bnlab.nn.BatchNorm2d, fuse=True, example=example))  # each ReLU moves into its BN layer
print(model.bn1)

train(model, training)
print(f"accuracy: {accuracy(model, held_out):.3f}")

# One overflowed batch does not reach the running statistics.
before = model.bn1.running_mean.clone()
model.train()
model(torch.full_like(example, float("inf")))
model.eval()
print("running statistics after a batch of inf are unchanged:", torch.equal(model.bn1.running_mean, before))

# The state dict loads into a network of torch's layers: nobody who uses the model needs bnlab.
plain = build_network()
plain.load_state_dict(model.state_dict())
print(f"accuracy with torch's layers: {accuracy(plain, held_out):.3f}")
assert not any(isinstance(layer, bnlab.nn.BatchNorm2d) for layer in plain.modules())
assert isinstance(plain.bn1, nn.BatchNorm2d)
