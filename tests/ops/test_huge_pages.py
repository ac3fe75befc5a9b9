"""Large pages are a hint: buffers are what new_empty gives, and every one of their elements can be used."""

import pytest
import torch

from fastdistil.ops.huge_pages import empty_huge


# Nothing, less than a large page of 2 MiB, and several with a ragged end.
@pytest.mark.parametrize("shape", [(0,), (3, 5), (1700, 1001)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_buffer_holds_what_is_written_to_it(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    buffer = empty_huge(torch.empty(0), shape, dtype)
    assert buffer.shape == shape
    assert buffer.dtype == dtype
    values = torch.arange(buffer.numel()).remainder(251).to(dtype).view(shape)
    assert torch.equal(buffer.copy_(values), values)


def test_opcheck() -> None:
    torch.library.opcheck(torch.ops.fastdistil.advise_huge_pages_.default, (torch.zeros(4, 5),))
