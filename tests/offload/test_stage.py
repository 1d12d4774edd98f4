"""A component while it runs: what is asked for, when, and what happens where it does not go as foreseen."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from penstock.errors import GenerationError, WeightsError
from penstock.offload.residency import State
from penstock.offload.streamer import Streamer
from tests.offload.toys import WIDTH, Pipeline, streamed

X = torch.linspace(-1, 1, WIDTH)[None]
T = torch.tensor(500.0)


def stays(streamer: Streamer) -> list[int]:
    """Blocks in the order in which they took their places."""
    assert streamer.timeline is not None
    return [int(stay.unit.split(".")[-1]) for stay in streamer.timeline.residences if ".blocks." in stay.unit]


@pytest.mark.parametrize("budget", ["least", "24KiB", "1MiB"])
@pytest.mark.parametrize("prefetch", [0, 1, 2, 3, 64])
def test_the_result_is_the_plain_one_at_any_prefetch_and_budget(prefetch: int, budget: str) -> None:
    expected = Pipeline()()
    pipeline = Pipeline()
    with streamed(pipeline, prefetch, "least", is_checked=True) as streamer:
        budget = budget if budget != "24KiB" else str(streamer.plan.least_bytes + 8192)
    with streamed(pipeline, prefetch, budget, is_checked=True) as streamer:
        assert torch.equal(pipeline(), expected)
        assert torch.equal(pipeline(), expected)
        assert streamer.residency.peak_bytes <= streamer.plan.arena_bytes


@pytest.mark.parametrize("prefetch", [0, 1, 2, 3])
def test_blocks_take_their_places_in_order_ahead_of_use_around_the_end_and_not_after_the_last(prefetch: int) -> None:
    pipeline = Pipeline(num_blocks=12)
    with streamed(pipeline, prefetch) as streamer:
        pipeline(num_steps=3)
        assert stays(streamer) == [*range(12)] * 3
        assert streamer.residency.num_demanded == 1  # the decoder's, which has no forward
        assert streamer.timeline is not None
        computed = [span for span in streamer.timeline.spans if span.kind == "compute" and ".blocks." in span.unit]
        entries = [stay for stay in streamer.timeline.residences if ".blocks." in stay.unit]
        assert [span.unit for span in computed] == [stay.unit for stay in entries]
        for number, (stay, span) in enumerate(zip(entries, computed, strict=True)):
            assert stay.begin_s <= span.begin_s and (stay.end_s is None or stay.end_s >= span.end_s)
            ahead = sum(other.begin_s <= span.begin_s for other in entries) - number - 1
            assert ahead == min(prefetch, len(entries) - number - 1)


@pytest.mark.parametrize("num_blocks", [5, 6, 7])
def test_a_block_whose_slot_nobody_else_needs_stays(num_blocks: int) -> None:
    pipeline = Pipeline(num_blocks)
    with streamed(pipeline, 3) as streamer:  # four slots: the first of the blocks beyond them share theirs
        pipeline(num_steps=2)
        alone = [*range(num_blocks - 4, 4)]
        assert [stays(streamer).count(number) for number in range(num_blocks)] == [
            1 if number in alone else 2 for number in range(num_blocks)
        ]


def test_guidance_that_calls_twice_streams_twice_and_wraps_in_between() -> None:
    pipeline = Pipeline(calls=2)
    with streamed(pipeline, 1) as streamer:
        pipeline(num_steps=2)
        assert stays(streamer) == [*range(6)] * 4


def test_resident_blocks_are_filled_once_and_streamed_ones_in_every_step() -> None:
    pipeline = Pipeline()
    with streamed(pipeline, 1) as least:
        budget = str(least.plan.least_bytes + 2 * 4096)
    with streamed(pipeline, 1, budget) as streamer:
        pipeline(num_steps=4)
        resident = {tenant.name[-1] for tenant in streamer.tenants if tenant.plan.slot is None and tenant.unit.is_block}
        assert len(resident) == 2
        assert [stays(streamer).count(n) for n in range(6)] == [1 if str(n) in resident else 4 for n in range(6)]


@pytest.mark.parametrize(
    "order",
    [[0, 2, 3, 5], [5, 4, 3, 2, 1, 0], [0, 0, 1, 2, 3, 4, 5], [0, 1, 0, 1, 2, 3], [3], [1, 0, 3, 2, 5, 4], []],
    ids=str,
)
@pytest.mark.parametrize("prefetch", [0, 1, 2])
def test_blocks_may_run_in_any_order_and_number(order: list[int], prefetch: int) -> None:
    plain, pipeline = Pipeline(), Pipeline()
    with streamed(pipeline, prefetch, is_checked=True) as streamer:
        pipeline.transformer.order = plain.transformer.order = order
        assert torch.equal(pipeline(), plain())
        demanded = streamer.residency.num_demanded
        assert torch.equal(pipeline(), plain())
        if len(set(order)) == len(order):  # the order is known by now
            assert streamer.residency.num_demanded <= demanded + 1  # the decoder's


def test_a_block_that_comes_again_soon_is_not_driven_out_in_between() -> None:
    pipeline = Pipeline()
    pipeline.transformer.order = [0, 1, 0, 2, 3]  # 0 and 2 have the same slot
    with streamed(pipeline, 1) as streamer:
        for _ in range(2):  # the order is learnt, and what was asked for in vain is gone
            pipeline(num_steps=1)
        before = stays(streamer)
        pipeline(num_steps=1)
        assert stays(streamer)[len(before) :] == [0, 1, 2, 3]


def test_an_unforeseen_block_is_filled_on_demand_and_the_next_one_beside_it() -> None:
    pipeline = Pipeline()
    with streamed(pipeline, 1) as streamer:
        pipeline(num_steps=1)
        tenants = {tenant.name: tenant for tenant in streamer.tenants}
        demanded, seen = streamer.residency.num_demanded, []
        block = pipeline.transformer.blocks[1]
        block.register_forward_pre_hook(lambda *_: seen.append(tenants["transformer.blocks.2"].state))
        block(X)
        assert streamer.residency.num_demanded == demanded + 1
        assert seen == [State.FILLING]


def test_blocks_that_a_step_leaves_out_are_neither_waited_for_nor_forgotten() -> None:
    plain, pipeline = Pipeline(), Pipeline()
    with streamed(pipeline, 1, is_checked=True) as streamer:
        for order in (range(6), [0, 5], [0, 5], range(6), [], range(6), [2], range(6)):
            pipeline.transformer.order = plain.transformer.order = order
            assert torch.equal(pipeline.transformer(X, T), plain.transformer(X, T))
        assert [tenant.name[-1] for tenant in streamer._stages["transformer"].schedule.order] == [*"012345"]


def test_a_block_may_run_outside_of_its_component() -> None:
    plain, pipeline = Pipeline(), Pipeline()
    with streamed(pipeline, 1, is_checked=True):
        for number in (3, 3, 0, 5):
            assert torch.equal(pipeline.transformer.blocks[number](X), plain.transformer.blocks[number](X))
        assert torch.equal(pipeline.transformer.head(X), plain.transformer.head(X))
        assert torch.equal(pipeline.transformer.blocks[2].linear(X), plain.transformer.blocks[2].linear(X))
        assert torch.equal(pipeline(), plain())


@pytest.mark.parametrize("prefetch", [0, 1])
def test_a_block_that_runs_inside_another_one(prefetch: int) -> None:
    plain, pipeline = Pipeline(), Pipeline()
    for model in (plain.transformer, pipeline.transformer):
        model.blocks[0].__dict__["inner"] = model.blocks[1]
        model.order = [0, 2]
    with streamed(pipeline, prefetch, is_checked=True):
        if prefetch:  # two slots: both have a place
            assert torch.equal(pipeline(), plain())
        else:
            with pytest.raises(GenerationError, match="blocks.1 runs inside transformer.blocks.0"):
                pipeline()
            del pipeline.transformer.blocks[0].__dict__["inner"], plain.transformer.blocks[0].__dict__["inner"]
            pipeline.transformer.blocks[0].inner = plain.transformer.blocks[0].inner = None
            assert torch.equal(pipeline(), plain())


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
@pytest.mark.parametrize("prefetch", [0, 1, 2])
@pytest.mark.parametrize("number", [0, 3, 5])
def test_an_exception_inside_a_block_leaves_all_usable(error: type[BaseException], prefetch: int, number: int) -> None:
    expected = Pipeline()()
    pipeline = Pipeline()

    def fail(x: torch.Tensor) -> Any:
        raise error

    with streamed(pipeline, prefetch, is_checked=True) as streamer:
        for _ in range(2):
            pipeline.transformer.blocks[number].inner = fail
            with pytest.raises(error):
                pipeline()
            if error is ValueError:  # torch runs the last hooks, but not after an interrupt
                assert not any(tenant.state is State.IN_USE for tenant in streamer.tenants)
            pipeline.transformer.blocks[number].inner = None
            assert torch.equal(pipeline.vae.decode(X), Pipeline().vae.decode(X))
            assert torch.equal(pipeline(), expected)
        assert not any(tenant.state is State.IN_USE for tenant in streamer.tenants)


def test_a_reader_that_fails_is_told_and_the_next_run_works() -> None:
    expected = Pipeline()()
    pipeline = Pipeline()
    with streamed(pipeline, 1) as streamer:
        tenant = next(tenant for tenant in streamer.tenants if tenant.name.endswith("blocks.4"))
        source, tenant.source = tenant.source, Broken()
        with pytest.raises(WeightsError, match="the disk is gone"):
            pipeline()
        tenant.source = source
        assert torch.equal(pipeline(), expected)


class Broken:
    """A source whose files changed."""

    kind = "file"
    parts = ()

    def check(self) -> None:
        """Refuse."""
        raise WeightsError("the disk is gone")


def test_components_take_turns() -> None:
    pipeline = Pipeline()
    with streamed(pipeline, None, offload="sequential") as streamer:
        assert torch.equal(pipeline(), Pipeline()())
        assert streamer.timeline is not None
        assert [stay.unit for stay in streamer.timeline.residences] == ["transformer", "vae"]
        assert [span.unit for span in streamer.timeline.spans if span.kind == "compute"] == ["transformer"] * 3


def test_compute_is_measured() -> None:
    pipeline = Pipeline()
    with streamed(pipeline, 1) as streamer:
        assert streamer.measured("transformer") is None and streamer.measured("unknown") is None
        pipeline(num_steps=2)
        measured = streamer.measured("transformer")
        assert measured is not None and all(0 < seconds < 1 for seconds in measured)
        stage = streamer._stages["transformer"]
        assert stage.num_computed == 12 and stage.block_bytes == 4096
