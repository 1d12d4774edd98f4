"""Futures: every operation gives what it gives on the value, and waits no earlier than it must."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from diffusers.pipelines.stable_diffusion import StableDiffusionPipelineOutput
from torch import Tensor

from penstock.distributed.guidance.futures import FutureTensor, wait
from penstock.errors import GenerationError

A = torch.randn(4, 6, generator=torch.Generator().manual_seed(0))
B = torch.randn(4, 6, generator=torch.Generator().manual_seed(1))
TABLE = torch.randn(6, 6, generator=torch.Generator().manual_seed(2))

RECORDED: dict[str, Callable[[Tensor, Tensor], Any]] = {
    "slice": lambda a, b: a[:, 2:5],
    "one": lambda a, b: a[0],
    "chunk": lambda a, b: a.chunk(2),
    "halves": lambda a, b: [y - 2 * x for x, y in zip(a.chunk(2), b.chunk(2), strict=True)],
    "half and half": lambda a, b: torch.sub(*a.chunk(2)) * 3 + a.chunk(2)[1],
    "unbind": lambda a, b: a.unbind(1),
    "split": lambda a, b: a.split([1, 3]),
    "guidance": lambda a, b: a + 4.0 * (b - a),
    "power": lambda a, b: (a**2).sqrt() / b.exp(),
    "bfloat16": lambda a, b: a.to(torch.bfloat16).float(),
    "to": lambda a, b: a.to("cpu", torch.float64),
    "cat": lambda a, b: torch.cat([a, b], dim=1),
    "stack": lambda a, b: torch.stack([a, b]),
    "norm": lambda a, b: torch.norm(a, dim=-1, keepdim=True),
    "std": lambda a, b: a.std(dim=list(range(1, a.ndim)), keepdim=True),
    "mean": lambda a, b: a.mean(),
    "max": lambda a, b: a.max(dim=1),
    "compare": lambda a, b: a > b,
    "where": lambda a, b: torch.where(a > 0, a, b),
    "reshape": lambda a, b: a.reshape(2, 12),
    "view": lambda a, b: a.view(24),
    "transposed": lambda a, b: a.t().contiguous().view(3, 8),
    "permute": lambda a, b: a.unsqueeze(0).permute(2, 0, 1).flatten(1),
    "expand": lambda a, b: a[:1].expand(5, 6),
    "clone": lambda a, b: a.clone(),
    "detach": lambda a, b: a.detach(),
    "data": lambda a, b: a.data,
    "clamp": lambda a, b: a.clamp(-0.5, 0.5),
    "matmul": lambda a, b: a @ b.t(),
    "like": lambda a, b: torch.zeros_like(a),
    "table": lambda a, b: a * TABLE[:4] + TABLE[0],
    "number": lambda a, b: a - torch.tensor(0.25) * b,
    "lerp": lambda a, b: torch.lerp(a, b, 0.3),
    "rounded": lambda a, b: (a + b).mul(3).round(),
}


def assigned(a: Tensor, b: Tensor) -> Tensor:
    a[1:3, 0] = b[0, :2]
    a[a > 1] = 0
    return a


def deposited(a: Tensor, b: Tensor) -> Tensor:
    into = torch.zeros(4, 6)
    into[:2] = a[:2]
    into.add_(b, alpha=2)
    return into


def augmented(a: Tensor, b: Tensor) -> Tensor:
    a += 1
    a *= b
    return a


def saved(a: Tensor, b: Tensor) -> Tensor:
    file = io.BytesIO()
    torch.save(a, file)
    file.seek(0)
    return torch.load(file)


WAITED: dict[str, Callable[[Tensor, Tensor], Any]] = {
    "add_": lambda a, b: a.add_(1),
    "add_ of a future": lambda a, b: a.add_(b),
    "augmented": augmented,
    "assigned": assigned,
    "deposited": deposited,
    "out": lambda a, b: torch.add(a, b, out=torch.empty(4, 6)),
    "item": lambda a, b: a[0, 0].item(),
    "float": lambda a, b: float(a.mean()),
    "bool": lambda a, b: bool((a > 0).any()),
    "list": lambda a, b: a.tolist(),
    "numpy": lambda a, b: a.numpy(),
    "array": lambda a, b: np.asarray(a) + 1,
    "equal": lambda a, b: torch.equal(a, b),
    "close": lambda a, b: torch.allclose(a, a + 1e-9),
    "nonzero": lambda a, b: (a > 0).nonzero(),
    "selected": lambda a, b: a[b > 0],
    "linear": lambda a, b: torch.nn.functional.linear(a, TABLE),
    "deepcopy": lambda a, b: copy.deepcopy(a),
    "pickle": lambda a, b: pickle.loads(pickle.dumps(a)),
    "saved": saved,
    "format": lambda a, b: f"{a.mean():.4f}",
    "dlpack": lambda a, b: torch.from_dlpack(a),
    "storage": lambda a, b: a.untyped_storage().nbytes(),
    "iterated": lambda a, b: [float(row.sum()) for row in a],
}


@dataclass
class Source:
    """A future and how often it was resolved."""

    tensor: Tensor
    count: int = 0

    def resolve(self) -> Tensor:
        self.count += 1
        return self.tensor.clone()

    def future(self) -> FutureTensor:
        return FutureTensor.of(self.tensor.shape, self.tensor.dtype, "cpu", self.resolve, strides=self.tensor.stride())


def same(left: Any, right: Any) -> bool:
    if isinstance(left, Tensor):
        return left.dtype == right.dtype and left.stride() == right.stride() and torch.equal(left, right)
    if isinstance(left, np.ndarray):
        return np.array_equal(left, right)
    if isinstance(left, (list, tuple)):
        return len(left) == len(right) and all(map(same, left, right))
    return bool(left == right)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("name", RECORDED)
def test_recorded_operations(name: str, mode: Callable[[], AbstractContextManager[Any]]) -> None:
    with mode():
        a, b = Source(A), Source(B)
        result = RECORDED[name](a.future(), b.future())
        assert a.count == b.count == 0, "waited"
        assert same(wait(result), RECORDED[name](A.clone(), B.clone()))


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("name", WAITED)
def test_operations_that_wait(name: str, mode: Callable[[], AbstractContextManager[Any]]) -> None:
    with mode():
        a, b = Source(A), Source(B)
        result = WAITED[name](a.future(), b.future())
        assert a.count == 1
        assert b.count <= 1
        assert same(wait(result), WAITED[name](A.clone(), B.clone()))


def test_a_wrong_result_is_noticed() -> None:
    result = RECORDED["guidance"](Source(A).future(), Source(torch.zeros_like(B)).future())
    assert not same(wait(result), RECORDED["guidance"](A, B))


def test_one_value_serves_all() -> None:
    source = Source(A)
    future = source.future()
    parts = [future[:1], future * 2, future.chunk(2)[1]]
    assert same(wait(parts), [A[:1], A * 2, A[2:]])
    assert future.value() is future.value()
    assert source.count == 1


def test_what_was_recorded_before_a_change_does_not_see_it() -> None:
    future = Source(A).future()
    doubled, first = future * 2, future[:1]
    assert future.add_(1) is future
    first.zero_()
    assert same(wait(doubled), A * 2)
    assert torch.equal(future, torch.cat([torch.zeros(1, 6), A[1:] + 1]))


def test_what_was_recorded_of_a_tensor_does_not_see_its_change() -> None:
    latents, sigma = A.clone(), torch.tensor(0.5)
    denoised = latents - Source(B).future() * sigma
    latents.add_(100)
    sigma.zero_()
    assert isinstance(denoised, FutureTensor) and denoised.is_pending
    assert same(wait(denoised), A - B * 0.5)


def test_a_change_of_one_future_waits_for_the_others_that_were_mixed_with_it() -> None:
    a, b = Source(A), Source(B)
    left = a.future()
    difference = left - b.future()
    left.zero_()
    assert (a.count, b.count) == (1, 1)
    assert same(wait(difference), A - B)


def test_weights_are_not_copied_for_later() -> None:
    source = Source(A)
    result = source.future()[:1] * torch.ones(4, 6)
    assert source.count == 1
    assert not isinstance(result, FutureTensor)


def test_random_numbers_are_drawn_in_the_order_of_the_program() -> None:
    def drawn(tensor: Tensor) -> Tensor:
        torch.manual_seed(0)
        noise, more = torch.randn_like(tensor), torch.randn(6)
        return tensor + noise + more

    assert same(wait(drawn(Source(A).future())), drawn(A))


def test_strides_are_those_of_the_value() -> None:
    turned = A.t()
    future = Source(turned).future()
    assert future.stride() == turned.stride()
    assert not future.is_contiguous()
    assert same(wait(future.contiguous()), turned.contiguous())


def test_printing_waits_for_nothing() -> None:
    source = Source(A)
    future = source.future()
    assert str(future) == "FutureTensor(pending, shape=(4, 6), dtype=torch.float32, device='cpu')"
    assert source.count == 0
    assert str(wait(future)) == str(future) == str(A)


def test_trees() -> None:
    future = Source(A).future()
    waited = wait({"a": [future, 1], "b": Transformer2DModelOutput(sample=Source(B).future()), "c": None})
    assert not isinstance(waited["a"][0], FutureTensor)
    assert torch.equal(waited["b"].sample, B)
    assert wait(A) is A


def test_a_shape_cannot_change_in_place() -> None:
    with pytest.raises(GenerationError, match=r"\(4, 6\) of a future in place.*returns a new tensor"):
        Source(A).future().unsqueeze_(0)


def test_a_wrong_shape_is_found_when_it_arrives() -> None:
    future = FutureTensor.of((2, 2), torch.float32, "cpu", lambda: A)
    with pytest.raises(GenerationError, match=r"shape \(2, 2\) and torch.float32 became \(4, 6\)"):
        future.sum().item()


def test_an_impossible_operation_says_so_at_once() -> None:
    with pytest.raises(RuntimeError, match="must match the size"):
        Source(A).future() + Source(TABLE).future()


def test_a_failure_to_resolve_reaches_whoever_asks() -> None:
    def fail() -> Tensor:
        raise ConnectionError("gone")

    doubled = FutureTensor.of((2,), torch.float32, "cpu", fail) * 2
    with pytest.raises(ConnectionError, match="gone"):
        doubled.tolist()


def test_outputs_of_pipelines_keep_fields_that_are_none() -> None:
    future = FutureTensor.of((2,), torch.float32, "cpu", lambda: torch.ones(2))
    output = StableDiffusionPipelineOutput(images=future, nsfw_content_detected=None)
    (arrived,) = wait([output])
    assert type(arrived) is StableDiffusionPipelineOutput and arrived.nsfw_content_detected is None
    assert type(arrived.images) is type(arrived["images"]) is torch.Tensor and arrived.images.tolist() == [1.0, 1.0]
    assert output.images is future
