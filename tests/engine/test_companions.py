"""ControlNets beside a denoiser that is split: whole on every rank, and the picture is the plain one's."""

from __future__ import annotations

import types
from collections.abc import Iterator
from typing import Any

import pytest
from torch import Tensor, nn

import penstock
from penstock.config import ParallelConfig
from penstock.distributed import parallel_state
from penstock.distributed.sequence import blocks
from penstock.engine import companions
from penstock.engine.companions import check_denoisers, denoisers_of, is_split, notes_of_companions
from penstock.errors import ConfigError
from tests import zoo
from tests.ranks import run_ranks
from tests.tolerance import difference, tolerance_of
from tests.zoo import controlnets

AXES: dict[str, dict[str, int]] = {
    "ulysses": {"ulysses_degree": 2},
    "ring": {"ring_degree": 2},
    "tensor": {"tensor_parallel_size": 2},
    "stages": {"pipeline_parallel_size": 2},
}
OF_ALL = {  # the axes that are tried; where heads do not divide, or a class has no plan, fewer
    "flux_two": AXES,
    "sd3_one": AXES,
    "qwen_one": AXES,
    "flux_one": ("ulysses", "stages"),
    "flux_union": ("ring",),
    "sd3_two": ("ulysses",),
    "qwen_union": ("ring", "tensor"),
    "z_image_one": ("ulysses", "stages"),
    "hunyuan_one": ("ulysses", "ring"),
}
FAST = {
    *(("flux_two", "ulysses"), ("flux_two", "stages"), ("sd3_one", "tensor"), ("qwen_one", "ring")),
}


def picture(pipe: Any, name: str, **overrides: Any) -> list[Tensor]:
    return list(zoo.tensors(controlnets.run(pipe, name, seed=5, **overrides)))


def traffic(placed: Any) -> dict[str, int]:
    axes = ("ulysses", "ring", "sequence", "tensor", "pipeline")
    return {f"{item.axis} {item.operation}": item.num_calls for item in placed.report().traffic if item.axis in axes}


def split(name: str, degrees: dict[str, int]) -> dict[str, Any]:
    """On every rank: how far its picture is from the plain one, and may be; and what is exchanged."""
    parallel_state.set_mesh(None)
    pipe = controlnets.build(name)
    plain = picture(pipe, name)
    allowed = tolerance_of(pipe, lambda: picture(pipe, name), plain)
    without = difference(picture(silenced(controlnets.build(name), name), name), plain)
    with penstock.apply(pipe, device="cpu", offload="none", parallel=ParallelConfig(**degrees)) as placed:
        far, again = difference(picture(pipe, name), plain), difference(picture(pipe, name), plain)
        exchanged, notes = traffic(placed), placed.report().notes
    assert difference(picture(pipe, name), plain) == 0
    pipe = silenced(controlnets.build(name), name)
    with penstock.apply(pipe, device="cpu", offload="none", parallel=ParallelConfig(**degrees)) as placed:
        picture(pipe, name), picture(pipe, name)
        assert exchanged == traffic(placed), "without a ControlNet as much is exchanged"
    return {"far": max(far, again), "allowed": allowed, "without": without, "notes": notes, "exchanged": exchanged}


def silenced(pipe: Any, name: str) -> Any:
    """The pipeline whose ControlNet is not run, and adds nothing."""
    nothing = {"flux": (None, None), "sd3": (None,), "hunyuan": (None,)}.get(name.split("_")[0])
    vars(pipe.controlnet)["forward"] = lambda *args, **kwargs: nothing
    return pipe


def cases() -> Iterator[Any]:
    for name, axes in OF_ALL.items():
        for axis in axes:
            yield pytest.param(name, axis, marks=() if (name, axis) in FAST else pytest.mark.thorough)


@pytest.mark.parametrize(("name", "axis"), list(cases()))
def test_the_picture_is_the_plain_one(name: str, axis: str) -> None:
    for found in run_ranks(2, split, name, AXES[axis]):
        bound = 0 if axis == "stages" else found["allowed"]  # stages run the very kernels of one rank
        assert found["far"] <= bound < found["without"] / 30
        assert found["exchanged"]
        (note,) = found["notes"]
        assert note.startswith("controlnet (") and " MiB) runs whole on every rank: nothing says how its" in note
        assert ("is cut where it enters transformer" in note) == (axis in ("ulysses", "ring"))


def uncut(name: str) -> tuple[str, float]:
    """On every rank: what is said where residuals are not cut, and how far a picture is that is made without them."""
    parallel_state.set_mesh(None)
    pipe = controlnets.build(name)
    plain = picture(pipe, name)
    begin = blocks._Split.begin

    def begin_without_cutting(self: Any, denoiser: nn.Module, args: Any, kwargs: Any) -> Any:
        begin(self, denoiser, args, kwargs)
        return None

    blocks._Split.begin = begin_without_cutting  # type: ignore[method-assign]
    try:
        with (
            penstock.apply(pipe, device="cpu", offload="none", parallel=ParallelConfig(ulysses_degree=2)),
            pytest.raises(RuntimeError) as caught,
        ):
            picture(pipe, name)
    finally:
        blocks._Split.begin = begin  # type: ignore[method-assign]
    return str(caught.value), difference(picture(silenced(pipe, name), name), plain)


def test_residuals_that_are_not_cut_do_not_fit() -> None:
    """The control: cutting is what makes the picture right, and residuals are what makes it what it is."""
    for said, without in run_ranks(2, uncut, "sd3_one"):
        assert "must match the size of tensor" in said
        assert without > 0.1


def shared_modules(is_guarded: bool) -> tuple[float, dict[str, int]]:
    """On every rank: how far Z-Image is from plain, as a part of what is allowed; and what is exchanged."""
    parallel_state.set_mesh(None)
    pipe = controlnets.build("z_image_one")
    plain = picture(pipe, "z_image_one")
    allowed = tolerance_of(pipe, lambda: picture(pipe, "z_image_one"), plain)
    while_running, is_running = blocks._Split.while_running, blocks._Split.__dict__["is_running"]
    if not is_guarded:
        always: Any = lambda self, hook, *given: hook(*given)  # noqa: E731
        always = types.FunctionType(always.__code__, vars(blocks))  # as one of our own: others' hooks are refused
        blocks._Split.while_running = always  # type: ignore[method-assign]
        blocks._Split.is_running = property(lambda self: True)  # type: ignore[method-assign, assignment]
    try:
        with penstock.apply(pipe, device="cpu", offload="none", parallel=ParallelConfig(ulysses_degree=2)) as placed:
            return difference(picture(pipe, "z_image_one"), plain) / allowed, traffic(placed)
    finally:
        if not is_guarded:
            blocks._Split.while_running = while_running  # type: ignore[method-assign]
            blocks._Split.is_running = is_running  # type: ignore[method-assign]


def test_modules_in_common_run_whole_where_the_other_model_runs_them() -> None:
    guarded = run_ranks(2, shared_modules, True)
    for (far, exchanged), (_, without) in zip(guarded, run_ranks(2, shared_modules, False), strict=True):
        assert far <= 1
        assert without["ulysses all_to_all"] > exchanged["ulysses all_to_all"], "the control: the hooks would act there"


def interrupted() -> list[float]:
    """On every rank: how far a picture is from plain that is made after Ctrl-C within the split transformer."""
    parallel_state.set_mesh(None)
    pipe = controlnets.build("z_image_one")
    plain = picture(pipe, "z_image_one")
    allowed = tolerance_of(pipe, lambda: picture(pipe, "z_image_one"), plain)
    with penstock.apply(pipe, device="cpu", offload="none", parallel=ParallelConfig(ulysses_degree=2)) as placed:
        for module in (pipe.transformer.noise_refiner[0].attention, pipe.transformer.layers[1].attention):
            handle = module.to_q.register_forward_pre_hook(_interrupt_where_it_is_split)
            with pytest.raises(KeyboardInterrupt):
                picture(pipe, "z_image_one")
            handle.remove()
            before = traffic(placed)
            far = difference(picture(pipe, "z_image_one"), plain) / allowed
            after = traffic(placed)
    return [far, after["ulysses all_to_all"] - before["ulysses all_to_all"]]


def _interrupt_where_it_is_split(module: nn.Module, args: tuple[Tensor, ...]) -> None:
    if blocks.dispatch._LOOK.get() is not None:
        raise KeyboardInterrupt


def test_after_ctrl_c_a_model_with_modules_in_common_runs_whole() -> None:
    for far, num_calls in run_ranks(2, interrupted):
        assert far <= 1
        assert num_calls == 2 * 2 * (2 + 5), "two steps, each of 7 blocks there and back"


def cfg_and_sequence(name: str, degrees: dict[str, Any]) -> float:
    """On every rank: how far from plain, as a part of what is allowed."""
    parallel_state.set_mesh(None)
    pipe = controlnets.build(name)
    plain = picture(pipe, name)
    allowed = tolerance_of(pipe, lambda: picture(pipe, name), plain)
    with penstock.apply(pipe, device="cpu", offload="layerwise", parallel=ParallelConfig(**degrees)):
        return difference(picture(pipe, name), plain) / allowed


@pytest.mark.parametrize(
    ("name", "degrees"),
    [
        ("qwen_one", {"cfg_parallel_size": 2, "ulysses_degree": 2}),
        ("sd3_one", {"tensor_parallel_size": 2, "use_hsdp": True, "hsdp_shard_size": 2}),
        ("z_image_one", {"pipeline_parallel_size": 2, "ulysses_degree": 2}),
    ],
    ids=str,
)
@pytest.mark.thorough
def test_axes_go_together(name: str, degrees: dict[str, Any]) -> None:
    assert max(run_ranks(4, cfg_and_sequence, name, degrees)) <= 1


def test_a_unet_is_named_and_not_its_controlnet() -> None:
    pipe = controlnets.build("sdxl_one")
    for degrees in AXES.values():
        with pytest.raises(ConfigError, match="UNet2DConditionModel") as caught:
            check_denoisers(pipe, ParallelConfig(**degrees))
        assert "ControlNet" not in str(caught.value)
    assert notes_of_companions(pipe, ParallelConfig(cfg_parallel_size=2)) == []


class Reversed:
    """A pipeline whose ControlNet comes first."""

    def __init__(self, pipe: Any) -> None:
        self.controlnet = pipe.controlnet
        self.unet = getattr(pipe, "unet", None) or pipe.transformer


def test_which_one_is_a_companion_says_its_class_and_not_its_name() -> None:
    pipe = Reversed(controlnets.build("sdxl_one"))
    assert [found.name for found in denoisers_of(pipe)] == ["unet", "controlnet"]
    with pytest.raises(ConfigError, match="sequence of UNet2DConditionModel"):
        check_denoisers(pipe, ParallelConfig(ulysses_degree=2))
    pipe.controlnet, pipe.unet = pipe.unet, pipe.controlnet
    assert [found.name for found in denoisers_of(pipe)] == ["controlnet", "unet"]


def test_all_denoisers_of_which_something_is_known_are_split() -> None:
    pipe = zoo.build("wan22")
    for axis in companions.AXES:
        assert all(is_split(found.module, axis) for found in denoisers_of(pipe))
    parallel = ParallelConfig(ulysses_degree=2)
    check_denoisers(pipe, parallel)
    assert notes_of_companions(pipe, parallel) == []
    assert not is_split(controlnets.build("flux_one").controlnet, "sequence")


class Pair:
    """A pipeline of a denoiser and a model beside it."""

    def __init__(self, transformer: nn.Module, beside: nn.Module) -> None:
        self.transformer, self.beside = transformer, beside


def test_a_controlnet_that_nothing_says_how_it_enters_is_refused_by_name() -> None:
    pipe = Pair(zoo.build("wan21").transformer, controlnets.build("flux_one").controlnet)
    match = r"beside \(FluxControlNetModel\) would run whole beside transformer, and nothing .* enter WanTransformer3DM"
    with pytest.raises(ConfigError, match=match):
        check_denoisers(pipe, ParallelConfig(ulysses_degree=2))
    check_denoisers(pipe, ParallelConfig(pipeline_parallel_size=2))
    pipe.transformer = controlnets.build("flux_one").transformer
    check_denoisers(pipe, ParallelConfig(ulysses_degree=2))


def test_arguments_that_the_row_does_not_know_are_refused_beside_another_model() -> None:
    transformer = zoo.build("wan21").transformer
    stock = type(transformer)

    class Controlled(stock):  # type: ignore[misc,valid-type]
        """As people make them: another model's results come in by an argument of its own."""

        def forward(self, hidden_states: Tensor, *args: Any, controlnet_states: Any = None, **kwargs: Any) -> Any:
            return stock.forward(self, hidden_states, *args, **kwargs)

    class Beside(nn.Module):
        def forward(self, hidden_states: Tensor, timestep: Tensor) -> Tensor:
            return hidden_states

    transformer.__class__ = Controlled
    pipe = Pair(transformer, Beside())
    with pytest.raises(ConfigError, match=r"beside \(Beside\) would run whole .* forward takes controlnet_states"):
        check_denoisers(pipe, ParallelConfig(ring_degree=2))
    with pytest.raises(ConfigError, match="does not divide width"):  # tensor parallelism asks for no arguments
        check_denoisers(pipe, ParallelConfig(tensor_parallel_size=3))
    transformer.__class__ = stock
    check_denoisers(pipe, ParallelConfig(ring_degree=2))


def test_weights_in_common_with_a_stage_are_refused() -> None:
    pipe = controlnets.build("flux_one")
    two = ParallelConfig(pipeline_parallel_size=2)
    check_denoisers(pipe, two)
    pipe.controlnet.transformer_blocks[0] = pipe.transformer.transformer_blocks[1]
    with pytest.raises(ConfigError, match=r"weights in common with transformer_blocks\.1 of transformer.* 2 stages"):
        check_denoisers(pipe, two)
    check_denoisers(pipe, ParallelConfig(ulysses_degree=2))
