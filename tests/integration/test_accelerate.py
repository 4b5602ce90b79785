"""accelerate: prepared models, and models with weights that lie elsewhere until they are needed."""

from __future__ import annotations

import pytest

accelerate = pytest.importorskip("accelerate", reason="make test-integration installs accelerate", exc_type=ImportError)

from tests.integration.case import Case, Limit, images  # noqa: E402
from tests.integration.cells import CELLS, judge, run_lines  # noqa: E402
from tests.integration.networks import network  # noqa: E402


def prepared():
    return accelerate.Accelerator(cpu=True).prepare(network())


def offloaded():
    return accelerate.cpu_offload(network(), execution_device="cpu")


OWN_FORWARD = "accelerate gives each layer a forward of its own to fetch the weights: {} before you offload."
OFFLOADED = {
    action: Limit(OWN_FORWARD.format(verb), "forward of its own")
    for action, verb in {"freeze": "freeze", "convert": "convert", "fuse": "fuse", "export": "convert"}.items()
}
OFFLOADED["fold"] = Limit("The weights are on the meta device: fold before you offload.", "tensors on the meta device")


def case(name, build, **settings):
    return Case(
        name,
        build,
        lambda: [(batch,) for batch in images()],
        label=lambda batch, output: (batch[0], output.argmax(1)),
        **settings,
    )


CASES = [
    case("Accelerator.prepare", prepared),
    case("cpu_offload", offloaded, limits=OFFLOADED),
]


LINES = """
model, loader = accelerator.prepare(model, loader)
bnlab.recalibrate(model, loader)
print(bnlab.check(model, data=loader).conclusion)
"""


@pytest.mark.parametrize("action", CELLS)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_cell(case, action, record_property):
    judge("accelerate", case, action, record_property)


def test_lines(record_property):
    namespace = run_lines(
        "accelerate",
        LINES,
        record_property,
        loader=CASES[0].data,
        accelerator=accelerate.Accelerator(cpu=True),
        model=network(),
    )
    assert namespace["model"][1].num_batches_tracked > 0
