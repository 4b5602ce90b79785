"""Fold BN into the convolutions for deployment, with proof that the output stays the same.

`bnlab.fold` returns a copy without BN layers. It compares the copy with the original before it returns.
"""

from __future__ import annotations

import torch
from digits_network import accuracy, build_network, load_batches, train
from torch import nn

import bnlab

torch.manual_seed(0)
training, held_out = load_batches()
model = build_network()
train(model, training)

receipt = bnlab.fold(model, held_out[0][0])
print(receipt)

folded = receipt.model
left = [name for name, layer in folded.named_modules() if isinstance(layer, nn.BatchNorm2d)]
print(f"BN layers left: {len(left)}")
print(f"accuracy of the original {accuracy(model, held_out):.3f}, of the folded copy {accuracy(folded, held_out):.3f}")

program = torch.export.export(folded, (held_out[0][0],))
torch.export.save(program, "digits-folded.pt2")
