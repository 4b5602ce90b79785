"""The correction of batch renormalization, against the formula of Ioffe 2017, Algorithm 1."""

import numpy as np
import torch
from torch.testing import assert_close

from bnlab.functional import renorm_correction


def test_r_and_d_are_those_of_the_paper_and_clipped(device):
    eps, limits = 1e-3, torch.tensor([2.0, 0.5], dtype=torch.float64, device=device)
    mean, var = np.array([0.0, 3.0, -4.0]), np.array([1.0, 9.0, 0.01])
    running_mean, running_var = np.array([0.1, 2.0, 4.0]), np.array([1.2, 1.0, 1.0])
    sigma = np.sqrt(running_var + eps)
    r = np.clip(np.sqrt(var + eps) / sigma, 1 / 2.0, 2.0)
    d = np.clip((mean - running_mean) / sigma, -0.5, 0.5)
    tensors = (torch.from_numpy(values).to(device) for values in (mean, var, running_mean, running_var))
    got_r, got_d = renorm_correction(*tensors, limits, eps)
    assert_close((got_r.cpu(), got_d.cpu()), (torch.from_numpy(r), torch.from_numpy(d)))
    assert {*r[1:], *d[1:]} == {2.0, 0.5, -0.5}
