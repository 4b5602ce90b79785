"""Operators that read the running statistics before their update."""

import pytest
import torch


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_opcheck_of_the_correction_of_renormalization(dtype):
    statistics = [torch.rand(3).to(wide) for wide in (torch.float64, torch.float64, dtype, dtype)]
    torch.library.opcheck(torch.ops.bnlab.renorm_correction.default, (*statistics, torch.tensor([3.0, 5.0]), 1e-5))
