"""scale_grad_: scales in place, all rows or each, and leaves what is scaled by 1."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("scale", [3.0, 1.0, [1.0, -2.0, 0.0]], ids=str)
@pytest.mark.parametrize("vocabulary", [96, 101])
@pytest.mark.usefixtures("implementation")
def test_the_gradient_is_multiplied(
    dtype: torch.dtype,
    scale: float | list[float],
    vocabulary: int,
    make_logits: Callable[..., Tensor],
    device: torch.device,
) -> None:
    grad = make_logits(3, vocabulary, dtype, pitch=112)
    factor = torch.tensor(
        scale, dtype=torch.float64 if dtype == torch.float64 else torch.float32, device=device
    )
    expected = (grad.double() * factor.double().unsqueeze(-1)).to(dtype)
    torch.ops.fastdistil.scale_grad_(grad, factor)
    # One unit in the last place of bfloat16: Triton's interpreter cuts where a GPU rounds.
    tolerance = 2**-7 if dtype == torch.bfloat16 else 0.0
    torch.testing.assert_close(grad, expected, rtol=tolerance, atol=0)


@pytest.mark.usefixtures("implementation")
def test_opcheck(make_logits: Callable[..., Tensor], device: torch.device) -> None:
    for scale in (torch.tensor(2.0, device=device), torch.ones(3, device=device)):
        arguments = (make_logits(3, 24, torch.float32), scale)
        torch.library.opcheck(torch.ops.fastdistil.scale_grad_.default, arguments)
