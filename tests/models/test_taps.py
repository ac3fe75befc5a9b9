import platform

import pytest
import torch

from fastdistil.models.taps import fast_dtype


@pytest.mark.skipif(platform.machine().lower() not in ("x86_64", "amd64"), reason="flags of x86 CPUs")
@pytest.mark.parametrize(
    ("avx512_bf16", "amx", "expected"),
    [(True, False, torch.bfloat16), (False, True, torch.bfloat16), (False, False, None)],
)
def test_bfloat16_is_fast_only_with_its_instructions(monkeypatch, avx512_bf16, amx, expected):
    """AVX-512 alone emulates it, though oneDNN calls it supported there."""
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: True)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: avx512_bf16)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: amx)
    assert fast_dtype(torch.device("cpu")) == expected
