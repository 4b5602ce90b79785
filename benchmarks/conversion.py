"""Measures how much of timm's networks `bnlab.convert`, `bnlab.freeze` and `fuse=True` reach.

Every network is built without weights and runs on one small batch in both modes. A network counts as converted or
frozen if every layer of it is, and if `undo()` restores classes, keys and bits. The columns "activations" and
"additions" count the layers whose output a run sends into nothing but an activation of bnlab, or into an addition,
and how many of them take it in. Activations inside timm's own layers belong to the layers already.

The benchmark needs timm and torchvision: pip install --no-deps timm torchvision.
"""

from __future__ import annotations

import argparse
import importlib
import sys
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from rich.console import Console
from rich.table import Table
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

import bnlab
from bnlab.errors import UsageError
from bnlab.remedies.convert import fuse
from bnlab.remedies.convert.followers import Followers
from bnlab.remedies.receipt import Receipt

sys.path.insert(0, str(Path(__file__).parents[1]))

SMALL = (
    "resnet18", "resnet50d", "seresnet50", "ecaresnet26t", "resnest14d", "skresnet18", "res2net50_26w_4s",
    "cspresnet50", "tresnet_m", "gernet_s", "regnetx_002", "regnety_002", "rexnet_100", "repvgg_a0", "resnetv2_50",
    "efficientnet_b0", "efficientnet_lite0", "tf_efficientnetv2_b0", "mobilenetv2_100", "mobilenetv3_small_100",
    "mobilenetv4_conv_small", "mobileone_s0", "mnasnet_100", "mixnet_s", "fbnetc_100", "ghostnet_100",
    "ghostnetv2_100", "hardcorenas_a", "tinynet_e", "lcnet_050", "hrnet_w18_small", "densenet121", "dpn68", "dla34",
    "ese_vovnet19b_dw", "xception41", "selecsls42b", "darknet17", "hgnetv2_b0", "repvit_m0_9", "fastvit_t8",
    "mobilevit_xxs", "efficientvit_b0", "starnet_s1", "lambda_resnet26t", "convmixer_768_32",
)  # fmt: skip
"""Networks that take images of 64 by 64."""

SIZES = {
    **dict.fromkeys(SMALL, 64),
    **dict.fromkeys(("inception_v3", "inception_v4", "legacy_xception"), 96),
    **dict.fromkeys(("levit_128s", "efficientformer_l1", "visformer_tiny", "coatnet_rmlp_nano_rw_224"), 224),
}
"""The side of the images by network."""

ACTIONS: dict[str, Callable[[nn.Module, torch.Tensor], Receipt]] = {
    "convert": lambda model, _: bnlab.convert(model, bnlab.nn.BatchNorm2d),
    "freeze": lambda model, _: bnlab.freeze(model),
    "fuse": lambda model, x: bnlab.convert(model, bnlab.nn.BatchNorm2d, fuse=True, example=x),
}


@dataclass
class Row:
    """What was measured on one network.

    Attributes:
        layers: The number of its BN layers.
        results: The outcome of each action: "ok", or the reason of the refusal.
        activations: The numbers of layers that take in the activation that follows them, and of those that one follows.
        additions: The same for additions.
        reasons: Why the others do not, with the number of layers.
    """

    layers: int
    results: dict[str, str] = field(default_factory=dict)
    activations: tuple[int, int] = (0, 0)
    additions: tuple[int, int] = (0, 0)
    reasons: Counter[str] = field(default_factory=Counter)


def measured(model: nn.Module, x: torch.Tensor) -> Row:
    """Return what the actions reach in a model. The model is as before afterwards."""
    row = Row(sum(isinstance(module, _BatchNorm) for module in model.modules()))
    followed: dict[str, Followers] = {}
    places: Callable[..., Any] = fuse._places  # noqa: SLF001 - what a run shows, before the source code is read

    def recorded(model: nn.Module, to_fuse: dict[str, Followers], *rest: Any) -> Any:  # noqa: ANN401
        followed.update(to_fuse)
        return places(model, to_fuse, *rest)

    for name, action in ACTIONS.items():
        before = _state(model)
        with mock.patch.object(fuse, "_places", recorded):
            try:
                receipt = action(model, x)
            except UsageError as error:
                row.results[name] = str(error)
                continue
        receipt.undo()
        row.results[name] = "ok" if _is_same(_state(model), before) else "undo did not restore everything"
    if row.results["fuse"] == "ok":
        left = {item.layer: item.reason for item in receipt.changes.left_alone if item.layer in followed}
        row.reasons = Counter(left.values())
        row.activations, row.additions = (
            (sum(path not in left for path in paths), len(paths))
            for paths in (
                [path for path, following in followed.items() if following.residual is residual]
                for residual in (False, True)
            )
        )
    return row


def _state(model: nn.Module) -> tuple[list[tuple[str, type]], dict[str, torch.Tensor]]:
    classes = [(name, type(module)) for name, module in model.named_modules()]
    return classes, {name: value.clone() for name, value in model.state_dict().items()}


def _is_same(left: tuple[Any, dict[str, torch.Tensor]], right: tuple[Any, dict[str, torch.Tensor]]) -> bool:
    bits = all(torch.equal(value, right[1][name]) for name, value in left[1].items())
    return left[0] == right[0] and list(left[1]) == list(right[1]) and bits


def main() -> None:
    """Measure and print. The last line is the main result."""
    parser = argparse.ArgumentParser(prog="bnlab bench conversion", description=__doc__)
    parser.add_argument("names", nargs="*", default=list(SIZES), metavar="NETWORK")
    options = parser.parse_args()
    with suppress(ModuleNotFoundError):
        importlib.import_module("tests.torchvision_operators")  # before timm, which imports torchvision
    timm: Any = importlib.import_module("timm")
    console = Console(width=160)
    table = Table("network", "layers", *ACTIONS, "activations", "additions", "left alone, though one follows")
    rows = []
    for name in options.names:
        torch.manual_seed(0)
        size = SIZES.get(name, 64)
        row = measured(timm.create_model(name, pretrained=False, num_classes=10), torch.randn(2, 3, size, size))
        rows.append(row)
        reasons = "; ".join(f"{count} x {reason}" for reason, count in row.reasons.most_common())
        parts = ("/".join(map(str, pair)) for pair in (row.activations, row.additions))
        table.add_row(name, str(row.layers), *row.results.values(), *parts, reasons)
    console.print(table)
    whole = {name: sum(row.results[name] == "ok" for row in rows) for name in ACTIONS}
    activations, followed = (sum(row.activations[index] for row in rows) for index in (0, 1))
    additions, added = (sum(row.additions[index] for row in rows) for index in (0, 1))
    console.print(
        f"conversion: of {len(rows)} networks, {whole['convert']} convert, {whole['freeze']} freeze, {whole['fuse']} "
        f"fuse; {activations} of {followed} activations and {additions} of {added} additions are taken in"
    )


if __name__ == "__main__":
    main()
