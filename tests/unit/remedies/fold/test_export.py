import io

import pytest
import torch
from tests.architectures import build, images
from tests.unit.remedies.fold.samples import Pair, trained
from torch.testing import assert_close

from bnlab.errors import UsageError
from bnlab.remedies.fold.export import exported
from bnlab.remedies.fold.fold import fold


def loaded(data):
    return torch.export.load(io.BytesIO(data)).module()


@pytest.mark.parametrize("batch", [1, 3])
def test_a_file_computes_the_same_for_batches_of_any_size(batch, device):
    model, x = fold(build("resnet").to(device), images(batch).to(device)).model, images(batch).to(device)
    data, note = exported(model, x)
    assert note == "the batch may have any size"
    for other in (x, images(5).to(device), images(1).to(device)):
        assert_close(loaded(data)(other), model(other))


class Fixed(Pair):
    def forward(self, image, scale):
        return self.bn(self.conv(image)).reshape(2, -1) * scale


def test_a_file_for_one_size_only_says_so(device):
    batch = {"image": images(2).to(device), "scale": torch.tensor(2.0).to(device)}
    model = fold(trained(Fixed()).to(device), batch).model
    data, note = exported(model, batch)
    assert note.startswith("the batch must have 2 samples, because torch.export raises ")
    assert_close(loaded(data)(**batch), model(**batch))


class NotExportable(Pair):
    def forward(self, x):
        return self.bn(self.conv(x)) if float(x.flatten()[0]) > -1e9 else x


def test_a_model_that_torch_cannot_export(device):
    model = fold(trained(NotExportable()).to(device), images(2).to(device)).model
    with pytest.raises(UsageError, match=r"^model: torch.export must take it, got \w+: "):
        exported(model, images(2).to(device))
