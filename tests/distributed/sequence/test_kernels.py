"""Attention part by part is attention."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from penstock.distributed.sequence import kernels
from penstock.distributed.sequence.kernels import attend_part, merge
from penstock.errors import ConfigError
from tests.distributed.sequence.pieces import noise
from tests.tolerance import difference, tolerance_of


def attention(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float | None) -> Tensor:
    """torch's, of (batch, tokens, heads, head_dim)."""
    query, key, value = (tensor.transpose(1, 2) for tensor in (query, key, value))
    output = F.scaled_dot_product_attention(query, key, value, mask, scale=scale, enable_gqa=True)
    return output.transpose(1, 2)


def masks() -> dict[str, Tensor | None]:
    keys = torch.arange(12) < torch.tensor([[12], [9]])
    return {
        "none": None,
        "keys": keys[:, None, None],
        "later parts alone": (torch.arange(12) >= 7)[None, None, None],
        "queries and keys": noise(2, 1, 5, 12, seed=3) > 0,
        "added": noise(2, 1, 5, 12, seed=4),
        "of every head": noise(2, 4, 5, 12, seed=5),
    }


@pytest.mark.parametrize("kv_heads", [4, 2])
@pytest.mark.parametrize("scale", [None, 0.3])
@pytest.mark.parametrize("kind", masks())
def test_parts_are_merged(kind: str, scale: float | None, kv_heads: int) -> None:
    query, key, value = noise(2, 5, 4, 8), noise(2, 12, kv_heads, 8, seed=1), noise(2, 12, kv_heads, 8, seed=2)
    mask = masks()[kind]
    total = None
    for run in (slice(0, 4), slice(4, 7), slice(7, 12)):
        part_mask = None if mask is None else mask[..., run]
        part = attend_part(query, key[:, run], value[:, run], part_mask, scale)
        total = part if total is None else merge(total, part)
    assert total is not None
    plain = [attention(query, key, value, mask, scale)]
    allowed = tolerance_of([query, key, value], lambda: [attention(query, key, value, mask, scale)], plain)
    assert difference([total[0]], plain) < allowed


def test_what_sees_no_key_has_no_weight() -> None:
    query, key = noise(1, 3, 2, 8), noise(1, 4, 2, 8, seed=1)
    output, lse = attend_part(query, key, key, torch.zeros(1, 1, 1, 4, dtype=torch.bool), None)
    assert (lse == float("-inf")).all()
    assert not output.any()
    nothing, still = merge((output, lse), (output, lse))
    assert not nothing.any()
    assert not still.isnan().any()


def test_no_queries() -> None:
    output, lse = attend_part(noise(1, 0, 2, 8), noise(1, 4, 2, 8), noise(1, 4, 2, 8), None, None)
    assert (output.shape, lse.shape) == ((1, 0, 2, 8), (1, 0, 2, 1))


def test_a_device_without_such_a_kernel_is_refused() -> None:
    tensor = noise(1, 4, 2, 8).to("meta")
    with pytest.raises(ConfigError, match=r"meta has none\. Use ulysses_degree"):
        attend_part(tensor, tensor, tensor, None, None)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize(("head_dim", "scale"), [(40, None), (72, 0.3), (36, None), (81, None)])
def test_cuda_gets_heads_of_a_size_that_its_kernels_take(
    head_dim: int, scale: float | None, masked: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The kernels themselves are stood in for by the CPU's, which refuse what CUDA's refuse."""
    sizes: list[int] = []

    def kernel(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float | None) -> kernels.Part:
        assert {tensor.shape[-1] % 8 for tensor in (query, key, value)} == {0}
        sizes.append(query.shape[-1])
        return kernels._attend_cpu(query, key, value, mask, scale)

    monkeypatch.setattr(kernels, "_kernel_of_cuda", kernel)
    query, key, value = (noise(2, 4, 12, head_dim, seed=seed) for seed in range(3))  # (batch, heads, tokens, head_dim)
    mask = noise(2, 1, 12, 12, seed=3) if masked else None
    output, lse = kernels._attend_cuda(query, key, value, mask, scale)
    wanted, wanted_lse = kernels._attend_cpu(query, key, value, mask, scale)
    assert sizes == [-(-head_dim // 8) * 8]
    assert output.shape == wanted.shape
    torch.testing.assert_close(output, wanted)
    torch.testing.assert_close(lse, wanted_lse)
