import torch
from torch import nn
from torch.optim.swa_utils import update_bn

from bnlab.watching.update_bn import in_update_bn


def test_update_bn_is_recognised_from_inside_alone():
    seen = []
    model = nn.Sequential(nn.BatchNorm1d(2))
    model.register_forward_hook(lambda *_: seen.append(in_update_bn()))
    model(torch.randn(4, 2))
    update_bn([torch.randn(4, 2)], model)
    assert seen == [False, True]
