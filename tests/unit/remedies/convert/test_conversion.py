import torch
from torch import nn

import bnlab


def test_everything_about_a_layer_is_kept(device):
    seen = []
    layer = nn.BatchNorm2d(4, eps=1e-3, momentum=None).to(device).half().eval()
    layer.weight.requires_grad_(False)
    layer.tag = "mine"
    handle = layer.register_forward_hook(lambda module, x, y: seen.append(type(module)))
    model = nn.Sequential(layer, nn.ReLU()).to(device)
    model.alias = [layer]
    bnlab.convert(model, bnlab.nn.BatchNorm2d)
    assert model.alias[0] is model[0] is layer
    assert type(layer) is bnlab.nn.BatchNorm2d
    assert (layer.eps, layer.momentum, layer.training, layer.tag) == (1e-3, None, False, "mine")
    assert (layer.weight.requires_grad, layer.bias.requires_grad) == (False, True)
    assert {t.dtype for t in (*layer.parameters(), layer.running_mean, layer.running_var)} == {torch.float16}
    model(torch.randn(2, 4, 3, 3).to(device).half())
    assert seen == [bnlab.nn.BatchNorm2d]
    handle.remove()
    model(torch.randn(2, 4, 3, 3).to(device).half())
    assert len(seen) == 1


def test_settings_torch_does_not_know_are_listed(device):
    receipt = bnlab.convert(bnlab.nn.BatchNorm2d(3, nonfinite="propagate").to(device), nn.BatchNorm2d)
    assert "nonfinite: propagate -> -" in str(receipt)
    assert bnlab.convert(bnlab.nn.BatchNorm2d(3).to(device), nn.BatchNorm2d).changes.changes[0].layer == ""
