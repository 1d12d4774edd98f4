"""Something of ours runs in the place of one module's forward."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from penstock.distributed.forwards import wrap_forward


def doubled(forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    return 2 * forward(*args, **kwargs)


def test_it_runs_within_the_hooks_and_is_taken_back() -> None:
    layer, other, seen = nn.Softmax(0), nn.Softmax(0), []
    plain = layer(torch.ones(4))
    layer.register_forward_hook(lambda module, args, output: seen.append(output))
    undo = wrap_forward(layer, doubled)
    assert torch.equal(layer(torch.ones(4)), 2 * plain) and torch.equal(seen[-1], 2 * plain)
    assert torch.equal(other(torch.ones(4)), plain)
    assert list(inspect.signature(layer.forward).parameters) == ["input"]
    undo.run()
    undo.run()
    assert torch.equal(layer(torch.ones(4)), plain) and "forward" not in vars(layer)


def test_a_forward_of_somebodys_own_comes_back() -> None:
    layer = nn.Softmax(0)

    def own(input: Tensor) -> Tensor:
        return input + 1

    vars(layer)["forward"] = own
    undo = wrap_forward(layer, doubled)
    assert float(layer(torch.ones(1))) == 4
    undo.run()
    assert vars(layer)["forward"] is own
    undo = wrap_forward(layer, doubled)
    vars(layer)["forward"] = own
    undo.run()
    assert vars(layer)["forward"] is own, "what somebody has put there since stays"
