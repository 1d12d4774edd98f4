"""What others do to placed weights: replaced ones are used as on a plain module, all else is refused by name."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize

from penstock.errors import UsageError
from penstock.offload import stage
from tests.offload.toys import WIDTH, Pipeline, streamed

Change = Callable[[Pipeline], Any]


def linear(pipeline: Pipeline, number: int) -> nn.Linear:
    found: nn.Linear = pipeline.transformer.blocks[number].linear
    return found


def _parameter(pipeline: Pipeline) -> None:
    linear(pipeline, 0).weight = nn.Parameter(linear(pipeline, 0).weight.detach() * 2)


def _registered(pipeline: Pipeline) -> None:
    linear(pipeline, 1).register_parameter("weight", nn.Parameter(linear(pipeline, 1).weight.detach() * 2))


def _table(pipeline: Pipeline) -> None:
    linear(pipeline, 2)._parameters["bias"] = nn.Parameter(linear(pipeline, 2).bias.detach() + 1)


def _state(pipeline: Pipeline) -> None:
    block = pipeline.transformer.blocks[3]
    block.load_state_dict({name: value.clone() * 2 for name, value in block.state_dict().items()}, assign=True)


def _module(pipeline: Pipeline) -> None:
    other = nn.Linear(WIDTH, WIDTH)
    nn.init.constant_(other.weight, 0.1)
    nn.init.zeros_(other.bias)
    pipeline.transformer.blocks[4].linear = other


def _block(pipeline: Pipeline) -> None:
    pipeline.transformer.blocks[5] = nn.Tanh()


def _no_bias(pipeline: Pipeline) -> None:
    linear(pipeline, 0).bias = None  # type: ignore[assignment]


def _normed(pipeline: Pipeline) -> None:
    torch.nn.utils.weight_norm(linear(pipeline, 0))
    with torch.no_grad():
        linear(pipeline, 0).weight_g.mul_(2)  # type: ignore[operator]


@pytest.mark.parametrize("has_run", [True, False])
@pytest.mark.parametrize("mode", ["layerwise", "sequential"])
@pytest.mark.parametrize(
    ("change", "num_theirs"),
    [
        (_parameter, 1),
        (_registered, 1),
        (_table, 1),
        (_state, 2),
        (_module, 2),
        (_block, 0),
        (_no_bias, 0),
    ],
)
def test_what_is_put_in_the_place_of_a_weight_is_used(
    change: Change, num_theirs: int, mode: str, has_run: bool
) -> None:
    unchanged, plain = Pipeline()(), Pipeline()
    change(plain)
    expected = plain()
    assert not torch.equal(unchanged, expected)
    pipeline = Pipeline()
    with streamed(pipeline, None, offload=mode) as streamer:
        if has_run:
            pipeline()
        assert streamer.notes() == ()
        change(pipeline)
        for _ in range(2):
            assert torch.equal(pipeline(), expected)
        state = pipeline.transformer.state_dict()
        assert all(torch.equal(value, state[name]) for name, value in plain.transformer.state_dict().items())
        notes = streamer.notes()
        assert [note.split()[:2] for note in notes] == ([["transformer:", str(num_theirs)]] if num_theirs else [])
    assert torch.equal(pipeline(), expected)  # as a plain module would


class Twice(nn.Module):
    """A parametrization."""

    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        return weight * 2


def _parametrized(pipeline: Pipeline) -> None:
    parametrize.register_parametrization(linear(pipeline, 5), "weight", Twice())


def _tied(pipeline: Pipeline) -> None:
    linear(pipeline, 0).weight = linear(pipeline, 5).weight


class Own(nn.Module):
    """A layer of somebody's own around the weights of another one."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.weight = linear.weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x @ self.weight


def _wrapped(pipeline: Pipeline) -> None:
    pipeline.transformer.blocks[5].linear = Own(linear(pipeline, 5))


def _across(pipeline: Pipeline) -> None:
    pipeline.transformer.head.weight = pipeline.vae.linear.weight


def _data(pipeline: Pipeline) -> None:
    linear(pipeline, 5).weight.data = torch.ones(WIDTH, WIDTH)


def _converted(pipeline: Pipeline) -> None:
    linear(pipeline, 5).double()


@pytest.mark.filterwarnings("ignore:.*weight_norm", "ignore:.*was made of the memory")
@pytest.mark.parametrize("change", [_parametrized, _tied, _wrapped, _across, _normed, _data, _converted])
@pytest.mark.parametrize("has_run", [True, False])
def test_what_fills_would_not_reach_is_refused(change: Change, has_run: bool) -> None:
    pipeline = Pipeline()
    with streamed(pipeline):
        if has_run:
            pipeline()
        with pytest.raises(UsageError, match=r"Call remove\(\)"):
            change(pipeline)
            pipeline()
    with torch.no_grad():
        before = pipeline()
    again = Pipeline()
    if change not in (_data, _converted):  # these stay, on the very weights
        change(again)
    assert torch.equal(before, again())


def test_a_tie_to_a_weight_that_leaves_would_be_another_picture(monkeypatch: pytest.MonkeyPatch) -> None:
    plain = Pipeline()
    _tied(plain)
    expected = plain()
    monkeypatch.setattr(stage, "require_one_place", lambda *_: None)
    pipeline = Pipeline()
    with streamed(pipeline, 0):
        pipeline()
        with torch.no_grad():
            pipeline.transformer.blocks[5](torch.ones(WIDTH))
        _tied(pipeline)
        assert not torch.equal(pipeline(), expected)
