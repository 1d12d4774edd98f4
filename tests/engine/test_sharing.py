"""Blocks that the calls of a step share: the same bits, half the bytes, and told where it cannot act."""

from __future__ import annotations

import threading
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import penstock
from penstock.config import LoadConfig, ParallelConfig
from penstock.engine.build import prepare
from penstock.engine.placed import Placed
from penstock.engine.sharing import check_sharing
from penstock.errors import ConfigError, GenerationError
from penstock.offload.residency import State
from tests import zoo
from tests.distributed.sequences import CASES
from tests.offload.toys import WIDTH, Denoiser, Pipeline
from tests.parity.combinations import HEADS, Guided
from tests.ranks import run_ranks

X = torch.linspace(-1, 1, 2 * WIDTH).reshape(2, WIDTH)
NUM_STEPS = 4
OFF = {"wan21": {"guidance_scale": 1.0}, "qwen_image": {"true_cfg_scale": 1.0}, "chroma": {"guidance_scale": 1.0}}


class TwoCalls(Pipeline):
    """A toy whose guidance makes calls that differ, and changes their arguments afterwards."""

    @torch.no_grad()
    def __call__(self, num_steps: int = NUM_STEPS) -> torch.Tensor:
        """Denoise."""
        x = X.clone()
        self.scheduler.set_timesteps(num_steps)
        for t in self.scheduler.timesteps:
            noises = []
            for number in range(self.calls):
                given = x * (1 + number)
                noises.append(self.transformer(given, t))
                given.zero_()
            noise = noises[0] + sum(3.0 * (other - noises[0]) for other in noises[1:])
            x = self.scheduler.step(noise, t, x, return_dict=False)[0]
        return self.vae.decode(x)


def placed_on(pipeline: Any, share: bool = True, **options: Any) -> Placed:
    given = {"offload": "layerwise", "check": True, **options}
    return penstock.apply(pipeline, device="cpu", share_blocks=share, **given)


def moved(placed: Placed, run: Callable[[], Any]) -> int:
    """Bytes that a run moves."""
    before = placed.report().moved_bytes
    run()
    return placed.report().moved_bytes - before


def of_blocks(pipeline: Pipeline) -> int:
    """Bytes of the denoiser's blocks."""
    return sum(weight.nbytes for weight in pipeline.transformer.blocks.parameters())


@pytest.mark.parametrize("prefetch", [0, 1, 2])
@pytest.mark.parametrize("calls", [2, 3])
def test_each_block_is_moved_once_per_step_not_once_per_call(calls: int, prefetch: int) -> None:
    expected = TwoCalls(calls=calls)()
    bytes_of_run = {}
    for share in (False, True):
        pipeline = TwoCalls(calls=calls)
        with placed_on(pipeline, share, prefetch=prefetch) as placed:
            assert torch.equal(pipeline(), expected)  # the first step learns what a call returns
            results: list[torch.Tensor] = []
            bytes_of_run[share] = moved(placed, lambda p=pipeline, r=results: r.append(p()))
            assert torch.equal(results[0], expected) and type(results[0]) is torch.Tensor
            blocks, report = of_blocks(pipeline), placed.report()
            assert report.peak_bytes <= report.plan.promised_bytes
            assert not any("share_blocks" in note for note in report.notes)
            assert (report.saved_bytes > 0) == share
    assert bytes_of_run[False] - bytes_of_run[True] == (calls - 1) * NUM_STEPS * blocks
    assert bytes_of_run[True] < bytes_of_run[False] / calls + blocks  # beside it only the rest and the decoder


@pytest.mark.parametrize("budget", ["least", "half", "most"])
@pytest.mark.parametrize("num_blocks", [5, 6, 9])
def test_what_is_said_to_be_saved_is_what_is_not_moved(num_blocks: int, budget: str) -> None:
    totals = {}
    expected = TwoCalls(num_blocks, calls=2)()
    for share in (False, True):
        pipeline = TwoCalls(num_blocks, calls=2)
        with placed_on(pipeline, False) as least:
            plan = least.plan
        room = plan.weight_bytes - plan.least_bytes
        memory = plan.least_bytes + {"least": 0, "half": room // 2, "most": room - 1}[budget]
        with placed_on(pipeline, share, max_weight_memory=str(memory)) as placed:
            for _ in range(2):
                assert torch.equal(pipeline(), expected)
            report = placed.report()
            totals[share] = report.moved_bytes + report.saved_bytes
    assert totals[True] == totals[False]


class Within(TwoCalls):
    """Has its scheduler in an inner pipeline: the calls are made when it is a step further."""

    @property
    def scheduler(self) -> Any:
        """The inner pipeline's."""
        return self.inner.scheduler

    @scheduler.setter
    def scheduler(self, scheduler: Any) -> None:
        self.inner = SimpleNamespace(components={}, scheduler=scheduler)


@pytest.mark.parametrize("prefetch", [0, 1, 2])
def test_a_component_that_needs_a_result_keeps_its_weights_while_the_calls_are_made(prefetch: int) -> None:
    expected = TwoCalls(calls=2)()
    pipeline = Within(calls=2)
    with placed_on(pipeline, prefetch=prefetch) as placed:
        for _ in range(2):
            assert torch.equal(pipeline(), expected)  # the decoder's weights are fetched before its argument is there
        decoder = next(tenant for tenant in placed._streamer.tenants if tenant.name == "vae")
        assert any(rival.unit.is_block for rival in decoder.rivals)


def test_the_prefetch_runs_around_the_end_and_not_after_the_last_step() -> None:
    pipeline = TwoCalls(num_blocks=12, calls=2)
    with penstock.apply(pipeline, device="cpu", offload="layerwise", share_blocks=True, trace=True) as placed:
        for num_steps in (3, 2):
            pipeline(num_steps)
        assert placed.timeline is not None
        stays = [int(stay.unit.split(".")[-1]) for stay in placed.timeline.residences if ".blocks." in stay.unit]
        assert stays == [*range(12)] * (3 + 1 + 2)  # one more for the call that was learnt
        assert placed.report().num_demanded == 2  # the decoder's


@pytest.mark.parametrize("budget", ["least", "half"])
@pytest.mark.parametrize("prefetch", [0, 1, 2])
@pytest.mark.parametrize("name", [*OFF])
def test_pictures_are_the_same_to_the_last_bit(name: str, prefetch: int, budget: str) -> None:
    for arguments in ({}, OFF[name]) if budget == "least" else ({},):
        expected = zoo.tensors(zoo.run(zoo.build(name), name, **arguments))
        pipeline = zoo.build(name)
        with placed_on(pipeline, False, prefetch=prefetch) as least:
            plan = least.plan
        memory = plan.least_bytes + (0 if budget == "least" else (plan.weight_bytes - plan.least_bytes) // 2)
        with placed_on(pipeline, prefetch=prefetch, max_weight_memory=str(memory)) as placed:
            for _ in range(2):
                result = zoo.tensors(zoo.run(pipeline, name, **arguments))
                assert all(map(torch.equal, result, expected))
            report = placed.report()
            streams = any(part.role == "denoiser" and part.num_streamed for part in report.plan.components)
            is_guided = arguments != OFF[name]
            assert (report.saved_bytes > 0) == (streams and is_guided)
            assert any("share_blocks has" in note for note in report.notes) != (report.saved_bytes > 0)
            assert streams or prefetch or budget != "least"


@pytest.mark.parametrize("name", ["flux", "sdxl", "ltx"])
def test_classes_that_batch_their_guidance_are_as_before_and_told(name: str) -> None:
    expected = zoo.tensors(zoo.run(zoo.build(name), name))
    counts = []
    for share in (False, True):
        pipeline = zoo.build(name)
        with placed_on(pipeline, share) as placed:
            for _ in range(2):
                assert all(map(torch.equal, zoo.tensors(zoo.run(pipeline, name)), expected))
            report = placed.report()
            counts.append((report.num_fills, report.saved_bytes))
            assert any("share_blocks has saved nothing so far" in note for note in report.notes) == share
    assert counts[0] == counts[1]


def test_calls_that_a_guider_makes_share_blocks() -> None:
    expected = zoo.tensors(zoo.run(zoo.build("hunyuan_video15"), "hunyuan_video15"))
    pipeline = zoo.build("hunyuan_video15")
    with placed_on(pipeline, check=False) as placed:
        assert all(map(torch.equal, zoo.tensors(zoo.run(pipeline, "hunyuan_video15")), expected))
        assert placed.report().saved_bytes > 0


def test_three_kinds_of_guidance() -> None:
    strong = {"stg_scale": 1.0, "modality_scale": 3.0, "spatio_temporal_guidance_blocks": [0], "num_inference_steps": 3}
    expected = zoo.tensors(zoo.run(zoo.build("ltx2"), "ltx2", **strong))
    pipeline = zoo.build("ltx2")
    with placed_on(pipeline) as placed:
        for _ in range(2):
            assert all(map(torch.equal, zoo.tensors(zoo.run(pipeline, "ltx2", **strong)), expected))
        assert placed._streamer is not None and placed._streamer.convoy.num_together == (2 + 3) * 3


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
@pytest.mark.parametrize("number", [0, 3, 5])
@pytest.mark.parametrize("failing", [1, 2])
def test_an_exception_in_one_call_ends_all_and_the_next_run_works(
    error: type[BaseException], number: int, failing: int
) -> None:
    expected = TwoCalls(calls=2)()
    pipeline = TwoCalls(calls=2)
    with placed_on(pipeline) as placed:
        pipeline()
        residency = placed._streamer.residency if placed._streamer else None
        assert residency is not None
        for _ in range(2):
            passes: list[int] = []

            def fail(x: torch.Tensor, passes: list[int] = passes) -> torch.Tensor:
                passes.append(number)
                if len(passes) == failing:
                    raise error("in a block")
                return x

            pipeline.transformer.blocks[number].inner = fail
            with pytest.raises(error, match="in a block"):
                pipeline()
            if error is ValueError:
                assert not any(tenant.state is State.IN_USE for tenant in residency.tenants)
                assert residency._depth == 0
            pipeline.transformer.blocks[number].inner = None
            assert torch.equal(pipeline(), expected)
        assert not any(tenant.state is State.IN_USE for tenant in residency.tenants)


def test_calls_that_leave_blocks_out_share_the_others() -> None:
    class Alternating(Denoiser):
        """Its second call of a step leaves blocks out."""

        num_calls = 0

        def forward(self, x: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
            """Compute some of the blocks."""
            self.order = [0, 2, 5] if self.num_calls % 2 else range(6)
            self.num_calls += 1
            return super().forward(x, timestep)

    class Skipping(TwoCalls):
        """Has such a denoiser."""

        def __init__(self) -> None:
            super().__init__(calls=2)
            self.transformer.__class__ = Alternating

    expected, pipeline = Skipping()(), Skipping()
    with placed_on(pipeline) as placed:
        for _ in range(2):
            assert torch.equal(pipeline(), expected)
        blocks = of_blocks(pipeline)
        assert placed.report().saved_bytes == blocks // 6 * 3 * (2 * NUM_STEPS - 1)


def test_steps_are_told_once_they_are_computed() -> None:
    pipeline = zoo.build("wan21")
    computed: list[int] = []
    with placed_on(pipeline) as placed:
        assert placed._streamer is not None
        stage = placed._streamer._stages["transformer"]
        for number in range(2):
            request = penstock.GenerationRequest(
                **{name: value for name, value in zoo.ENTRIES["wan21"].call.items() if name in ("prompt", "height")},
                width=zoo.ENTRIES["wan21"].call["width"],
                num_frames=zoo.ENTRIES["wan21"].call["num_frames"],
                num_inference_steps=3,
            )
            before = stage.num_computed
            list(penstock.generate(pipeline, request, on_step=lambda _: computed.append(stage.num_computed)))
            steps = [count - before for count in computed[-4:]]
            per_step = (steps[-1] - steps[0]) // 3
            if number:
                assert steps == [0, per_step, 2 * per_step, 3 * per_step] and per_step > 0


def test_schedulers_and_classes_are_given_back() -> None:
    pipeline = TwoCalls(calls=2)
    classes = [type(part) for part in (pipeline, pipeline.transformer, pipeline.scheduler)]
    with placed_on(pipeline):
        pipeline()
        assert [type(part) for part in (pipeline, pipeline.transformer, pipeline.scheduler)] == classes
    assert [type(part) for part in (pipeline, pipeline.transformer, pipeline.scheduler)] == classes


def test_another_thread_is_refused_and_disturbs_nobody() -> None:
    pipeline, expected = TwoCalls(calls=2), TwoCalls(calls=2)()
    refused: list[BaseException] = []

    def elsewhere() -> None:
        try:
            pipeline()
        except GenerationError as error:
            refused.append(error)

    def intrude(x: torch.Tensor) -> torch.Tensor:
        pipeline.transformer.blocks[2].inner = None
        thread = threading.Thread(target=elsewhere)
        thread.start()
        thread.join(timeout=60)
        return x

    with placed_on(pipeline):
        pipeline()
        pipeline.transformer.blocks[2].inner = intrude
        assert torch.equal(pipeline(), expected) and len(refused) == 1
        assert torch.equal(pipeline(), expected)


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"offload": "none"}, "share_blocks=True has no effect with offload='none'"),
        ({"offload": "sequential"}, "share_blocks moves a block once"),
        ({"offload": "layerwise", "share_blocks": "yes"}, "share_blocks='yes' is neither True nor False"),
    ],
)
def test_where_it_cannot_act_it_is_refused(options: dict[str, Any], reason: str) -> None:
    with pytest.raises(ConfigError, match=reason):
        penstock.apply(Pipeline(), device="cpu", **{"share_blocks": True, **options})


def test_where_it_turns_out_to_have_nothing_to_act_on_that_is_told() -> None:
    def notes(**options: Any) -> str:
        with penstock.apply(TwoCalls(calls=2), device="cpu", share_blocks=True, **options) as placed:
            placed.pipeline()
            return "\n".join(placed.report().notes)

    assert "share_blocks has nothing to act on: nothing streams" in notes(offload="auto")
    assert "no denoiser has blocks that stream" in notes(offload="layerwise", max_weight_memory="1MiB")

    class Uncallable:
        def __init__(self) -> None:
            self.transformer = Pipeline().transformer

    with placed_on(Uncallable()) as placed:
        assert "Uncallable has none" in "\n".join(placed.report().notes)


def test_calls_that_cannot_wait_are_counted_with_their_reason() -> None:
    pipeline = TwoCalls(calls=2)
    with placed_on(pipeline) as placed, torch.autocast("cpu", dtype=torch.bfloat16):
        pipeline()
        assert "share_blocks: 8 calls of the denoiser were made one by one: autocast is on" in placed.report().notes


@pytest.mark.parametrize(
    ("degrees", "reason"),
    [
        ({"cfg_parallel_size": 2}, r"nothing to act on with cfg\(2\)"),
        ({"pipeline_parallel_size": 2}, r"cannot go with pipeline\(2\)"),
    ],
)
def test_ranks_that_it_cannot_go_with(degrees: dict[str, int], reason: str, zoo_folder: Any) -> None:
    config, parallel = LoadConfig(share_blocks=True), ParallelConfig(**degrees)
    with pytest.raises(ConfigError, match=reason):
        check_sharing(config, parallel)
    with pytest.raises(ConfigError, match=reason):
        prepare(zoo_folder("wan21"), config, parallel)
    check_sharing(LoadConfig(), parallel)
    check_sharing(config, None)


def shared_over_ranks(degrees: dict[str, int]) -> tuple[bool, list[int], int]:
    """On every rank: whether sharing changed no bit, the fills without and with it, and the bytes saved."""
    case = CASES["wan"]
    inputs = case.inputs("odd")
    results, reports = [], []
    for share in (False, True):
        pipeline = Guided(case.build(heads=HEADS))
        placed = placed_on(pipeline, share, parallel=ParallelConfig(**degrees))
        for _ in range(2):
            result = pipeline(inputs, case.streams)
        results.append(result)
        reports.append(placed.report())
        placed.remove()
    fills = [report.num_fills for report in reports]
    return all(map(torch.equal, *results)), fills, reports[1].saved_bytes


@pytest.mark.parametrize("degrees", [{"ulysses_degree": 2}, {"ring_degree": 2}, {"tensor_parallel_size": 2}], ids=str)
def test_calls_share_blocks_on_ranks_that_split_each_call(degrees: dict[str, int]) -> None:
    for is_same, (apart, together), saved_bytes in run_ranks(2, shared_over_ranks, degrees):
        assert is_same and saved_bytes > 0
        assert apart - together == 2 * (2 + 1)  # two blocks share a slot; one step of the first run is learnt


@pytest.mark.parametrize(("offload", "mode"), [("auto", "none"), ("layerwise", "layerwise")])
def test_it_reaches_a_loaded_pipeline_or_is_told(zoo_folder: Any, offload: str, mode: str) -> None:
    pipeline = penstock.load(zoo_folder("wan21"), device="cpu", offload=offload, share_blocks=True)
    zoo.run(pipeline, "wan21")
    placed = penstock.placed_on(pipeline)
    assert placed is not None and placed.plan.offload == mode
    report = placed.report()
    placed.remove()
    assert (report.saved_bytes > 0) == (mode == "layerwise")
    told = "share_blocks has nothing to act on with offload=none (auto: all weights fit)"
    assert (told in report.notes) == (mode == "none")
