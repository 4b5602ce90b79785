"""Runs layers on a device where triton cannot be imported, and prints what happens as JSON."""

from __future__ import annotations

import json
import sys

import torch
from tests import oracle
from tests.gpu.cases import batch_of, expected_of, layer_for, run
from torch.testing import assert_close

from bnlab.kernels import Request, choose


def main(name: str) -> None:
    """Print what happens on a device."""
    sys.stdout.write(json.dumps(seen_on(torch.device(name))))


def seen_on(device: torch.device) -> dict[str, object]:
    """Return the choice, the error in eps of every layout and mean, and whether a compiled layer agrees."""
    errors = {}
    for layout in ("contiguous", "channels_last"):
        for ratio in (0.0, 1e2, 1e4):
            batch, expected = expected_of(batch_of((4, 24, 14, 14), torch.float32, ratio=ratio, residual=True), "relu")
            layer = layer_for(batch, device, activation="relu")
            results = run(layer, batch, layout, device)
            errors[f"{layout} {ratio:g}"] = oracle.error_in_eps(results.y.cpu(), expected.y.numpy())
            gradient = float((results.dx.cpu().double() - expected.dx).abs().max() / expected.dx.abs().max())
            errors[f"{layout} {ratio:g} backward"] = gradient / torch.finfo(torch.float32).eps
    layer = layer_for(batch, device, activation="relu")
    compiled, x = torch.compile(layer, fullgraph=True, backend="aot_eager"), batch.x.to(device)
    assert_close(compiled(x), layer(x), rtol=1e-5, atol=1e-5)
    layer(x * float("nan"))
    return {
        "repr": repr(layer),
        "choice": str(choose(Request(device.type, "float32", False, 2))),
        "errors": errors,
        "batches": int(layer.num_batches_tracked),
        "skipped": int(layer.skipped_batches),
        "has_triton": any(name.startswith("triton.") for name in sys.modules),
    }
