"""The path of a layer in the running network."""

import pytest
import torch
from torch import nn

from bnlab.nn.layer_path import layer_path


class Telling(nn.Module):
    def forward(self, x):
        raise LookupError(layer_path(self))


@pytest.mark.parametrize(
    ("model", "path"),
    [(Telling(), "Telling"), (nn.Sequential(nn.Identity(), nn.Sequential(Telling())), "1.0")],
)
def test_it_is_the_path_from_the_outermost_module_that_runs(model, path, device):
    with pytest.raises(LookupError) as error:
        model(torch.zeros(1, device=device))
    assert error.value.args == (path,)
