"""Measures the latency of two networks in eval mode: unchanged, folded by bnlab, and sped up by torch's own tools.

The networks run in float32 on the CPU. The tools alternate in one process, each timed call follows an untimed call of
the same tool, and the table shows medians over the repetitions. If a tool cannot run, the benchmark prints the reason.
Set OMP_PROC_BIND=true for stable results.
"""

from __future__ import annotations

import argparse
import copy
import sys
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch._inductor import config as inductor

from bnlab.remedies.fold.fold import fold

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks.measuring.resnet50 import classifier, resnet50
from benchmarks.measuring.steps import LAYOUTS
from benchmarks.measuring.timing import alternating, medians, wall

SHAPES = ((1, 3, 224, 224), (8, 3, 112, 112))
SIDES = ("original", "bnlab fold", "optimize_for_inference", "compile + freezing")

Side = Callable[[Tensor], Tensor]


def main() -> None:
    """Measure and print. The last line is the main result."""
    parser = argparse.ArgumentParser(prog="bnlab bench fold", description=__doc__)
    parser.add_argument("--repetitions", type=int, default=30)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--shape", type=int, nargs=4, action="append", metavar=("N", "C", "H", "W"))
    parser.add_argument("--no-compile", action="store_true", help="leave out torch.compile, which takes minutes")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    console = Console(width=130)
    table = Table(title=f"eval-mode latency in ms, float32, {options.threads} threads", title_justify="left")
    for name in ("network", "input", "layout", *SIDES, "largest error of fold"):
        table.add_column(name, justify="right")
    gains, reasons = [], set()
    for network in NETWORKS:
        for shape in [tuple(shape) for shape in options.shape] if options.shape else SHAPES:
            for layout in LAYOUTS:
                model, x, error = prepared(network, shape, layout)
                sides = built(model, x, with_compile=not options.no_compile)
                reasons |= {f"{name}: {side}" for name, side in sides.items() if isinstance(side, str)}
                times = compare(
                    {name: s for name, s in sides.items() if not isinstance(s, str)}, x, options.repetitions
                )
                cells = [f"{1e3 * times[name]:.2f}" if name in times else "-" for name in SIDES]
                table.add_row(network, "x".join(map(str, shape)), layout, *cells, f"{error:.1e}")
                gains.append(times["original"] / times["bnlab fold"])
    console.print(table)
    for reason in sorted(reasons):
        console.print(reason, markup=False)
    console.print(
        f"folded by bnlab: {min(gains):.2f}x to {max(gains):.2f}x as fast as the original, largest error above"
    )


def prepared(network: str, shape: tuple[int, ...], layout: str) -> tuple[nn.Module, Tensor, float]:
    """Return a network in eval mode with its own statistics, its input, and the error of the folded network."""
    torch.manual_seed(0)
    model = NETWORKS[network]()
    x = torch.randn(shape)
    with torch.no_grad():
        model.train()(torch.randn(8, 3, 64, 64))
    model = model.eval().to(memory_format=LAYOUTS[layout])  # type: ignore[call-overload]
    x = x.to(memory_format=LAYOUTS[layout])
    errors = [m.value for m in fold(model, x).changes.measurements if m.layer is None]
    return model, x, max(errors)


def built(model: nn.Module, x: Tensor, *, with_compile: bool) -> dict[str, Side | str]:
    """Return the network of every tool, or the reason why the tool cannot run."""
    makers: dict[str, Callable[[], Side]] = {
        "original": lambda: model,
        "bnlab fold": lambda: fold(model, x).model,
        "optimize_for_inference": lambda: optimized(model, x),
    }
    if with_compile:
        makers["compile + freezing"] = lambda: compiled(model, x)
    sides: dict[str, Side | str] = {}
    for name, make in makers.items():
        try:
            sides[name] = make()
        except Exception as error:  # noqa: PERF203 - that a tool cannot run is a result
            sides[name] = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
    return sides


def optimized(model: nn.Module, x: Tensor) -> Side:
    """Return the model traced, frozen and optimized by TorchScript."""
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")  # TorchScript warns that it is deprecated
        side: Side = torch.jit.optimize_for_inference(torch.jit.trace(copy.deepcopy(model), x))  # type: ignore[no-untyped-call]
        side(x)
    return side


def compiled(model: nn.Module, x: Tensor) -> Side:
    """Return the model compiled by inductor, which folds BN into weights that are constants."""
    torch._dynamo.reset()  # noqa: SLF001
    with inductor.patch(freezing=True), warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        side: Side = torch.compile(copy.deepcopy(model))
        side(x)
    return side


def compare(sides: dict[str, Side], x: Tensor, repetitions: int) -> dict[str, float]:
    """Return the median seconds of one call of each network."""
    with torch.no_grad():
        return medians(alternating({name: wall(partial(side, x)) for name, side in sides.items()}, repetitions))


def conv_bn(inputs: int, outputs: int, kernel: int, stride: int = 1, groups: int = 1) -> list[nn.Module]:
    """Return a convolution without bias and its BN."""
    conv = nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, groups=groups, bias=False)
    return [conv, nn.BatchNorm2d(outputs)]


class InvertedResidual(nn.Module):
    """The block of MobileNet-v2: a wider layer, a depthwise convolution, a narrower layer."""

    def __init__(self, inputs: int, outputs: int, stride: int, expansion: int) -> None:
        super().__init__()
        hidden = inputs * expansion
        wider = [*conv_bn(inputs, hidden, 1), nn.ReLU6(inplace=True)] if expansion > 1 else []
        self.body = nn.Sequential(
            *wider, *conv_bn(hidden, hidden, 3, stride, hidden), nn.ReLU6(inplace=True), *conv_bn(hidden, outputs, 1)
        )
        self.is_residual = stride == 1 and inputs == outputs

    def forward(self, x: Tensor) -> Tensor:
        """Return body(x), plus x where the shapes agree."""
        y: Tensor = self.body(x)
        return x + y if self.is_residual else y


def mobilenet_v2() -> nn.Sequential:
    """Return a network with the layers of MobileNet-v2: 52 convolutions with BN, 3.5 million parameters."""
    blocks, inputs = [], 32
    stages = ((1, 16, 1, 1), (6, 24, 2, 2), (6, 32, 3, 2), (6, 64, 4, 2), (6, 96, 3, 1), (6, 160, 3, 2), (6, 320, 1, 1))
    for expansion, outputs, count, stride in stages:
        for index in range(count):
            blocks.append(InvertedResidual(inputs, outputs, stride if index == 0 else 1, expansion))
            inputs = outputs
    stem = [*conv_bn(3, 32, 3, 2), nn.ReLU6(inplace=True)]
    head = [*conv_bn(inputs, 1280, 1), nn.ReLU6(inplace=True), nn.AdaptiveAvgPool2d(1), nn.Flatten()]
    return nn.Sequential(*stem, *blocks, *head, nn.Linear(1280, 1000))


NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "ResNet-50": lambda: resnet50(classifier()),
    "MobileNet-v2": mobilenet_v2,
}


if __name__ == "__main__":
    main()
