"""Lightning: modules after a fit, a module in a Fabric, and a callback that recalibrates."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

lightning = pytest.importorskip("lightning", reason="make test-integration installs lightning", exc_type=ImportError)

from tests.integration.case import Case, images  # noqa: E402
from tests.integration.cells import CELLS, judge, run_lines  # noqa: E402
from tests.integration.networks import network  # noqa: E402

import bnlab  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore:.*treespec:FutureWarning:lightning")  # of its own use of torch


class Classifier(lightning.LightningModule):
    """A classifier as in the documentation of Lightning."""

    def __init__(self):
        super().__init__()
        self.network = network()

    def forward(self, x):
        return self.network(x)

    def training_step(self, batch, index):
        return nn.functional.cross_entropy(self(batch[0]), batch[1])

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.05)


class Recalibrate(lightning.Callback):
    """Recomputes the running statistics with the final weights."""

    def on_fit_end(self, trainer, pl_module):
        self.receipt = bnlab.recalibrate(pl_module, trainer.train_dataloader)


def loader():
    return DataLoader(TensorDataset(torch.cat(images()), torch.arange(16) % 10), batch_size=4)


def trainer(*callbacks):
    return lightning.Trainer(
        accelerator="cpu", max_epochs=1, callbacks=list(callbacks), logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip


def fitted(*callbacks):
    model = Classifier()
    trainer(*callbacks).fit(model, loader())
    model.trainer = None
    return model


def in_a_fabric():
    fabric = lightning.Fabric(accelerator="cpu", devices=1)
    return fabric.setup(network())


def case(name, build):
    return Case(
        name, build, lambda: [(batch,) for batch in images()], label=lambda batch, output: (batch[0], output.argmax(1))
    )


CASES = [case("LightningModule after Trainer.fit", fitted), case("module in a Fabric", in_a_fabric)]


LINES = """
trainer.fit(model, loader)
print(bnlab.check(model, data=loader).conclusion)
bnlab.recalibrate(model, loader)  # or in on_fit_end of a callback
"""


@pytest.mark.parametrize("action", CELLS)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_cell(case, action, record_property):
    judge("lightning", case, action, record_property)


def test_a_callback_recalibrates_at_the_end_of_the_fit():
    callback = Recalibrate()
    model = fitted(callback)
    first = model.network[1]
    values = torch.cat([model.network[0](batch) for batch, _ in loader()]).detach().double()
    torch.testing.assert_close(first.running_mean.double(), values.mean((0, 2, 3)), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(first.running_var.double(), values.var((0, 2, 3)), rtol=1e-4, atol=1e-5)
    assert len({change.layer for change in callback.receipt.changes.changes}) == 5


def test_lines(record_property):
    namespace = run_lines("lightning", LINES, record_property, loader=loader(), trainer=trainer(), model=Classifier())
    assert namespace["model"].network[1].num_batches_tracked > 4
