"""Draws what the page shows of a watched training run: python tools/screenshot_run.py docs/images/watch.png.

A small CNN learns the digits. From the third epoch on it trains in eval mode, as after a validation that leaves it on.
Needs chromium, as `make test-browser` installs it.
"""

from __future__ import annotations

import sys
import warnings

import torch
from screenshot_page import photograph
from torch.nn import functional as F  # noqa: N812 - torch's own name for it

import bnlab
from bnlab.errors import BnlabWarning
from bnlab.lab import datasets
from bnlab.lab.stuck_statistics import build_network
from bnlab.report.html.diagnosis import render

_WIDTH, _HEIGHT = 1180, 560
_EPOCHS, _LEFT_ON = 5, 3
_ONLY_THE_RUN = "<style>body > *, main > * { display: none } main, #history { display: block }</style>"


def main() -> None:
    """Train, and take the picture of the section on the run."""
    warnings.simplefilter("ignore", BnlabWarning)
    torch.manual_seed(0)
    model = build_network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    batches = datasets.load("digits:train")
    with bnlab.watch(model, optimizer, every=5) as watch:
        for epoch in range(_EPOCHS):
            model.train(epoch < _LEFT_ON)
            for x, labels in batches:
                optimizer.zero_grad()
                F.cross_entropy(model(x), labels).backward()  # type: ignore[no-untyped-call]
                optimizer.step()
    photograph(render(watch.report()).replace("</head>", f"{_ONLY_THE_RUN}</head>"), sys.argv[1], _WIDTH, _HEIGHT)


if __name__ == "__main__":
    main()
