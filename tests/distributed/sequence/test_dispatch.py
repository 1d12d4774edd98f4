"""Attention comes to us while somebody needs that, and is as it was afterwards."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from diffusers.hooks import (
    HookRegistry,
    ModelHook,
    faster_cache,
    layer_skip,
    pyramid_attention_broadcast,
    taylorseer_cache,
)
from diffusers.models.attention_dispatch import _AttentionBackendRegistry, dispatch_attention_fn
from torch import Tensor, nn

from penstock.distributed.sequence import dispatch
from penstock.distributed.sequence.attention import Call, Sight
from penstock.errors import GenerationError
from tests.distributed.sequence.pieces import noise, streams_of
from tests.tolerance import difference, tolerance_of


@pytest.fixture
def installed() -> Iterator[None]:
    dispatch.install("a test")
    yield
    dispatch.uninstall("a test")


def sight(ring: int = 1) -> Sight:
    return Sight(streams_of(0, 1, ring, img=6 * ring), ("img",), ("img",))


def test_all_is_as_it_was_after_the_last_user() -> None:
    plain, backends = F.scaled_dot_product_attention, dict(_AttentionBackendRegistry._backends)
    dispatch.install("one")
    dispatch.install("other")
    assert F.scaled_dot_product_attention is not plain
    dispatch.uninstall("one")
    dispatch.uninstall("one")  # as after Ctrl-C
    assert F.scaled_dot_product_attention is not plain
    dispatch.uninstall("other")
    assert F.scaled_dot_product_attention is plain
    assert dict(_AttentionBackendRegistry._backends) == backends


class Counting:
    """Attention of somebody's own, by what was there before."""

    def __init__(self, before: Callable[..., Tensor]) -> None:
        self.before = before
        self.num_calls = 0

    def __call__(self, *args: Any, **options: Any) -> Tensor:
        self.num_calls += 1
        return self.before(*args, **options)


def test_functions_of_somebodys_own_are_called_and_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    registry = _AttentionBackendRegistry._backends
    name = _AttentionBackendRegistry.get_active_backend()[0]
    function, backend = Counting(F.scaled_dot_product_attention), Counting(registry[name])
    monkeypatch.setattr(F, "scaled_dot_product_attention", function)
    monkeypatch.setitem(registry, name, backend)
    tensor = noise(2, 6, 2, 8)
    dispatch.install("a test")
    look = dispatch.attending(sight())
    F.scaled_dot_product_attention(*[tensor.transpose(1, 2)] * 3)
    dispatch_attention_fn(tensor, tensor, tensor)
    dispatch.done_attending(look)
    dispatch.uninstall("a test")
    assert (function.num_calls, backend.num_calls) == (2, 1), "the backend calls torch's function"
    assert F.scaled_dot_product_attention is function
    assert registry[name] is backend


def test_what_others_put_in_our_place_stays_and_works(monkeypatch: pytest.MonkeyPatch) -> None:
    registry, plain = _AttentionBackendRegistry._backends, F.scaled_dot_product_attention
    name = _AttentionBackendRegistry.get_active_backend()[0]
    monkeypatch.setattr(F, "scaled_dot_product_attention", plain)  # put back at the end
    monkeypatch.setitem(registry, name, registry[name])
    dispatch.install("one")
    function, backend = Counting(F.scaled_dot_product_attention), Counting(registry[name])
    F.scaled_dot_product_attention, registry[name] = function, backend
    tensor = noise(2, 6, 2, 8)
    heads = [tensor.transpose(1, 2)] * 3
    dispatch.install("other")
    look = dispatch.attending(sight())
    assert torch.equal(F.scaled_dot_product_attention(*heads), plain(*heads))
    dispatch.done_attending(look)
    assert look.was_attended
    dispatch.uninstall("one")
    dispatch.uninstall("other")
    assert F.scaled_dot_product_attention is function
    assert registry[name] is backend
    assert torch.equal(function(*heads), plain(*heads))
    assert function.num_calls == 2


@pytest.mark.usefixtures("installed")
@pytest.mark.parametrize("shape", [(6, 6), (1, 6), (2, 6, 6), (1, 2, 6, 6), (3, 1, 1, 6)])
def test_masks_are_read_as_torch_reads_them(shape: tuple[int, ...]) -> None:
    query, mask = noise(3, 2, 6, 8), noise(*shape, seed=1)
    expected = F.scaled_dot_product_attention(query, query, query, mask)
    look = dispatch.attending(sight())
    found = F.scaled_dot_product_attention(query, query, query, mask)
    dispatch.done_attending(look)
    allowed = tolerance_of([query], lambda: [F.scaled_dot_product_attention(query, query, query, mask)], [expected])
    assert difference([found], [expected]) < allowed


@pytest.mark.usefixtures("installed")
@pytest.mark.parametrize("shape", [(6, 6), (3, 6), (1, 6)])
def test_masks_are_read_as_backends_read_them(shape: tuple[int, ...]) -> None:
    query, mask = noise(3, 6, 2, 8), noise(*shape, seed=1)
    expected = dispatch_attention_fn(query, query, query, mask)
    look = dispatch.attending(sight())
    found = dispatch_attention_fn(query, query, query, mask)
    dispatch.done_attending(look)
    assert torch.equal(found, expected)


def test_only_hooks_that_skip_a_module_excuse_it() -> None:
    module = nn.Linear(2, 2)
    assert not dispatch.may_skip(module)
    registry = HookRegistry.check_if_exists_or_initialize(module)
    registry.register_hook(ModelHook(), "layerwise_casting")
    assert not dispatch.may_skip(module)
    registry.register_hook(ModelHook(), pyramid_attention_broadcast._PYRAMID_ATTENTION_BROADCAST_HOOK)
    assert dispatch.may_skip(module)


def test_names_of_hooks_are_those_of_diffusers() -> None:
    assert set(dispatch._SKIPPING_HOOKS) == {
        pyramid_attention_broadcast._PYRAMID_ATTENTION_BROADCAST_HOOK,
        faster_cache._FASTER_CACHE_BLOCK_HOOK,
        taylorseer_cache._TAYLORSEER_CACHE_HOOK,
        layer_skip._LAYER_SKIP_HOOK,
    }


@pytest.mark.usefixtures("installed")
@pytest.mark.parametrize("is_seeing", [False, True])
def test_both_ways_to_attention_give_what_they_gave(is_seeing: bool) -> None:
    tensor = noise(2, 6, 2, 8)
    expected = F.scaled_dot_product_attention(*[tensor.transpose(1, 2)] * 3, scale=0.3)
    look = dispatch.attending(sight()) if is_seeing else None
    function = F.scaled_dot_product_attention(*[tensor.transpose(1, 2)] * 3, scale=0.3)
    backend = dispatch_attention_fn(tensor, tensor, tensor, scale=0.3)
    if look is not None:
        dispatch.done_attending(look)
        assert look.was_attended
    assert torch.equal(function, expected)
    assert torch.equal(backend, expected.transpose(1, 2))


@pytest.mark.usefixtures("installed")
def test_a_sight_may_be_told_from_the_call() -> None:
    seen: list[tuple[int, ...]] = []

    def look(call: Call) -> Sight | None:
        seen.append(tuple(call.query.shape))
        return None

    tensor = noise(2, 6, 2, 8)
    looking = dispatch.attending(look)
    F.scaled_dot_product_attention(*[tensor.transpose(1, 2)] * 3)
    dispatch.done_attending(looking)
    assert seen == [(2, 6, 2, 8)]


def attend_by_function(tensor: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(*[tensor.transpose(1, 2)] * 3, dropout_p=0.5)


def attend_by_window(tensor: Tensor) -> Tensor:
    return dispatch._over_ranks(lambda **_: tensor, tensor, tensor, tensor, attention_kwargs={"window_size": (2, 2)})


@pytest.mark.usefixtures("installed")
@pytest.mark.parametrize(
    ("call", "ring", "message"),
    [
        (attend_by_function, 1, r"dropout_p=0\.5 differs from rank to rank"),
        (attend_by_window, 2, r"'window_size': \(2, 2\).* cannot go around a ring of 2"),
    ],
)
def test_what_would_be_wrong_is_refused_and_the_sight_stays(call, ring: int, message: str) -> None:
    look = dispatch.attending(sight(ring))
    try:
        with pytest.raises(GenerationError, match=message):
            call(noise(2, 6, 2, 8))
        assert dispatch._LOOK.get() is look
    finally:
        dispatch.done_attending(look)
    assert dispatch._LOOK.get() is None
