"""Attention comes to us while somebody needs that, and is as it was afterwards."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import nullcontext
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
from torch.overrides import TorchFunctionMode

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
    ours = dict(_AttentionBackendRegistry._backends)
    assert all(ours[name] is not backend for name, backend in backends.items())
    assert F.scaled_dot_product_attention is plain, "it is not even replaced"
    dispatch.uninstall("one")
    dispatch.uninstall("one")  # as after Ctrl-C
    assert dict(_AttentionBackendRegistry._backends) == ours
    dispatch.uninstall("other")
    assert F.scaled_dot_product_attention is plain
    assert dict(_AttentionBackendRegistry._backends) == backends


def test_two_threads_come_and_go_at_once() -> None:
    backends, errors = dict(_AttentionBackendRegistry._backends), []
    function = Counting(F.scaled_dot_product_attention)

    def come_and_go(user: str) -> None:
        tensor = noise(1, 6, 2, 8)
        try:
            for _ in range(200):
                dispatch.install(user)
                look = dispatch.Look(sight())
                with dispatch.attending(look):
                    dispatch_attention_fn(tensor, tensor, tensor)
                assert look.was_attended, "another thread has taken out what this one needs"
                dispatch.uninstall(user)
        except AssertionError as error:
            errors.append(error)

    plain, F.scaled_dot_product_attention = F.scaled_dot_product_attention, function
    try:
        threads = [threading.Thread(target=come_and_go, args=(name,)) for name in ("one", "other")]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert F.scaled_dot_product_attention is function
    finally:
        F.scaled_dot_product_attention = plain
    assert not errors
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
    with dispatch.attending(dispatch.Look(sight())):
        F.scaled_dot_product_attention(*[tensor.transpose(1, 2)] * 3)
        dispatch_attention_fn(tensor, tensor, tensor)
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
    look = dispatch.Look(sight())
    with dispatch.attending(look):
        assert torch.equal(F.scaled_dot_product_attention(*heads), plain(*heads))
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
    with dispatch.attending(dispatch.Look(sight())):
        found = F.scaled_dot_product_attention(query, query, query, mask)
    allowed = tolerance_of([query], lambda: [F.scaled_dot_product_attention(query, query, query, mask)], [expected])
    assert difference([found], [expected]) < allowed


@pytest.mark.usefixtures("installed")
@pytest.mark.parametrize("shape", [(6, 6), (3, 6), (1, 6)])
def test_masks_are_read_as_backends_read_them(shape: tuple[int, ...]) -> None:
    query, mask = noise(3, 6, 2, 8), noise(*shape, seed=1)
    expected = dispatch_attention_fn(query, query, query, mask)
    with dispatch.attending(dispatch.Look(sight())):
        found = dispatch_attention_fn(query, query, query, mask)
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
    look = dispatch.Look(sight())
    with dispatch.attending(look) if is_seeing else nullcontext():
        function = F.scaled_dot_product_attention(*[tensor.transpose(1, 2)] * 3, scale=0.3)
        backend = dispatch_attention_fn(tensor, tensor, tensor, scale=0.3)
    assert look.was_attended == is_seeing
    assert torch.equal(function, expected)
    assert torch.equal(backend, expected.transpose(1, 2))


@pytest.mark.usefixtures("installed")
def test_a_sight_may_be_told_from_the_call() -> None:
    seen: list[tuple[int, ...]] = []

    def look(call: Call) -> Sight | None:
        seen.append(tuple(call.query.shape))
        return None

    tensor = noise(2, 6, 2, 8)
    with dispatch.attending(dispatch.Look(look)):
        F.scaled_dot_product_attention(*[tensor.transpose(1, 2)] * 3)
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
    look = dispatch.Look(sight(ring))
    with dispatch.attending(look):
        with pytest.raises(GenerationError, match=message):
            call(noise(2, 6, 2, 8))
        assert dispatch._LOOK.get() is look
    assert dispatch._LOOK.get() is None


TAKEN_BEFORE = F.scaled_dot_product_attention


def ways_to_call() -> list[Callable[..., Tensor]]:
    """torch's function as code may hold it."""
    return [F.scaled_dot_product_attention, TAKEN_BEFORE, torch._C._nn.scaled_dot_product_attention]


def test_code_that_took_the_function_before_is_seen() -> None:
    heads = [noise(2, 2, 6, 8)] * 3
    for call in ways_to_call():
        look = dispatch.Look(sight())
        with dispatch.attending(look):
            call(*heads)
        assert look.was_attended


def calls() -> Iterator[Callable[[Callable[..., Tensor]], Tensor]]:
    """Calls of torch's function with all kinds of arguments."""
    query, key, mask = noise(2, 4, 6, 8), noise(2, 2, 5, 8, seed=1), noise(6, 5, seed=2)
    grouped = key.repeat_interleave(2, 1)
    yield lambda call: call(query, grouped, grouped)
    yield lambda call: call(query, grouped, grouped, mask, 0.0, False)
    yield lambda call: call(query=query, key=grouped, value=grouped, attn_mask=mask > 0)
    yield lambda call: call(query, query, query, is_causal=True, scale=0.3)
    yield lambda call: call(query, key, key, enable_gqa=True)
    yield lambda call: torch.manual_seed(3) and call(query, grouped, grouped, dropout_p=0.5)
    yield lambda call: call(query.double(), grouped.double(), grouped.double())


class Noting(TorchFunctionMode):
    """Somebody else's mode, which looks for attention by the name that torch's module has for it."""

    def __init__(self) -> None:
        super().__init__()
        self.num_calls = 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.num_calls += func is F.scaled_dot_product_attention
        return func(*args, **(kwargs or {}))


def test_other_threads_see_nothing_of_it() -> None:
    """One thread is in the middle of attention that is split; another one attends, compiles, and looks around."""
    plain, expected = F.scaled_dot_product_attention, [call(TAKEN_BEFORE) for call in calls()]
    tensor, inside, done = noise(2, 6, 2, 8), threading.Event(), threading.Event()
    seen: list[Call] = []

    def look(call: Call) -> None:
        seen.append(call)
        inside.set()
        assert done.wait(60)

    def be_split() -> None:
        with dispatch.attending(dispatch.Look(look)):
            dispatch_attention_fn(tensor, tensor, tensor)

    dispatch.install("a test")
    thread = threading.Thread(target=be_split)
    thread.start()
    try:
        assert inside.wait(60)
        assert F.scaled_dot_product_attention is plain is TAKEN_BEFORE
        for way in ways_to_call():
            assert all(map(torch.equal, [call(way) for call in calls()], expected))
        with pytest.raises(TypeError, match="unheard_of"):
            F.scaled_dot_product_attention(*[tensor] * 3, unheard_of=1)
        with Noting() as noting:
            dispatch_attention_fn(tensor, tensor, tensor)
        assert noting.num_calls == 1
        whole = torch.compile(lambda heads: dispatch_attention_fn(heads, heads, heads), backend="eager", fullgraph=True)
        assert torch.equal(whole(tensor), dispatch_attention_fn(tensor, tensor, tensor))
        assert len(seen) == 1
    finally:
        done.set()
        thread.join()
        dispatch.uninstall("a test")


def test_the_calls_of_the_other_thread_would_have_been_seen() -> None:
    """The control of the test before: what it calls, called where attention is split."""
    seen: list[Call] = []
    look = dispatch.Look(lambda call: seen.append(call))
    with dispatch.attending(look):
        for way in ways_to_call():
            for call in calls():
                call(way)
    assert len(seen) == 3 * len(list(calls()))


@pytest.mark.parametrize("is_seeing", [False, True])
def test_arguments_of_later_versions_are_passed_on(monkeypatch: pytest.MonkeyPatch, is_seeing: bool) -> None:
    given: list[dict[str, Any]] = []

    def later(query: Tensor, key: Tensor, value: Tensor, *others: Any, window: int = 0, **options: Any) -> Tensor:
        given.append({"window": window})
        return TAKEN_BEFORE(query, key, value, *others, **options)

    monkeypatch.setattr(F, "scaled_dot_product_attention", later)
    dispatch.install("a test")
    heads = [noise(2, 2, 6, 8)] * 3
    with dispatch.attending(dispatch.Look(sight())) if is_seeing else nullcontext():
        F.scaled_dot_product_attention(*heads, window=3)
    with dispatch.attending(dispatch.Look(sight(2))), pytest.raises(GenerationError, match="window=3 cannot go around"):
        F.scaled_dot_product_attention(*heads, window=3)
    dispatch.uninstall("a test")
    assert given == [{"window": 3}]


class Attending(nn.Module):
    """A module that attends, and says whether that was seen."""

    def forward(self, tensor: Tensor) -> Tensor:
        return dispatch_attention_fn(tensor + 1, tensor, tensor) * 2


@pytest.mark.parametrize("first", [False, True])
@pytest.mark.usefixtures("installed")
def test_compiled_code_is_seen_where_it_must_be(first: bool) -> None:
    torch.compiler.reset()
    plain, tensor = Attending(), noise(2, 6, 2, 8)
    compiled = torch.compile(plain, backend="eager")
    for is_seeing in (first, not first, first):
        look = dispatch.Look(sight())
        with dispatch.attending(look) if is_seeing else nullcontext():
            assert torch.equal(compiled(tensor), plain(tensor))
        assert look.was_attended == is_seeing


def test_interrupted_it_leaves_nothing() -> None:
    look = dispatch.Look(lambda call: (_ for _ in ()).throw(KeyboardInterrupt))
    with Noting() as noting:
        with pytest.raises(KeyboardInterrupt), dispatch.attending(look):
            F.scaled_dot_product_attention(*[noise(2, 2, 6, 8)] * 3)
        assert dispatch._LOOK.get() is None
        F.scaled_dot_product_attention(*[noise(2, 2, 6, 8)] * 3)
    assert noting.num_calls == 1, "modes of others are the innermost again"
