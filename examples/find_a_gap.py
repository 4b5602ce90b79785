"""Find out why a model is good in train mode and bad in eval mode.

The momentum of this network is 0.001. Its running statistics still hold most of their initial values after 6 epochs, so
eval mode normalises with numbers that have little to do with the data.
"""

from __future__ import annotations

import torch
from digits_network import accuracy, build_network, load_batches, train

import bnlab

torch.manual_seed(0)
training, held_out = load_batches()
model = build_network(momentum=0.001)
train(model, training)

diagnosis = bnlab.check(model, data=held_out, train_data=training, metric=accuracy)

print(diagnosis.conclusion)
for cause in diagnosis.causes:
    if cause.share >= 0.01:
        print(f"{100 * cause.share:.0f} % of the gap: {cause.cause} in {', '.join(cause.layers)}")
for finding in diagnosis.findings:
    if finding.level.value != "info":
        print(f"{finding.level.value} {finding.code} {finding.layer}: {finding.message}")
