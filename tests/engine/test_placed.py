"""`apply`, `report`, `remove`: what a user sees of a placed pipeline, and what is refused."""

from __future__ import annotations

import gc
import json
import os
import shutil
import signal
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DiffusionPipeline
from torch import nn

import penstock
from penstock.errors import ConfigError, GenerationError, WeightsError
from penstock.report import Report
from tests import zoo
from tests.parity.test_offload import is_equal
from tests.waiting import has_ended


@pytest.fixture
def flux(zoo_folder: Callable[[str], Path], tmp_path: Path) -> Any:
    """A loaded Flux whose files may be harmed."""
    return DiffusionPipeline.from_pretrained(shutil.copytree(zoo_folder("flux"), tmp_path / "flux"))


def made(pipeline: Any, name: str = "flux", **arguments: Any) -> tuple[torch.Tensor, ...]:
    return zoo.tensors(zoo.run(pipeline, name, **arguments))


def footprint(pipeline: Any, but: Sequence[str] = ()) -> list[Any]:
    """Everything about a pipeline's modules that placing touches: weights by identity, hooks, attributes."""
    facts: list[Any] = [sorted(vars(pipeline))]
    for part in pipeline.components.values():
        for module in part.modules() if isinstance(part, nn.Module) else ():
            facts.append([id(tensor) for table in (module._parameters, module._buffers) for tensor in table.values()])
            own = sorted(set(vars(module)) - set(but))
            facts.append([len(module._forward_hooks), len(module._forward_pre_hooks), own])
            facts.append([len(module._state_dict_hooks), len(module._state_dict_pre_hooks)])
    return facts


@pytest.mark.parametrize("mode", ["sequential", "layerwise"])
def test_remove_leaves_nothing_behind(flux: Any, mode: str) -> None:
    made(flux)  # a pipeline that has run remembers its last arguments
    before = footprint(flux)
    placed = penstock.apply(flux, offload=mode)
    made(flux)
    assert footprint(flux) != before
    placed.remove()
    placed.remove()  # a second time does nothing
    assert footprint(flux) == before and has_ended()
    assert penstock.placed_on(flux) is None
    with penstock.apply(flux, offload=mode) as again:
        assert penstock.placed_on(flux) is again


def test_report_tells_what_was_promised_and_measured(flux: Any) -> None:
    with penstock.apply(flux, offload="layerwise", max_weight_memory="1.5MiB") as placed:
        before = placed.report()
        made(flux)
        report = placed.report()
    assert before.read_bytes == before.moved_bytes == before.num_fills == 0
    assert report.read_bytes >= report.moved_bytes > report.plan.weight_bytes
    assert report.written_bytes == report.device_to_host_bytes == 0
    assert 0 < report.peak_bytes <= report.plan.promised_bytes <= 1.5 * 2**20
    assert {unit.residency for unit in report.units} == {"resident", "streamed", "turn"} - (
        {"resident"} if all(unit.residency != "resident" for unit in report.units) else set()
    )
    assert json.loads(report.to_json())["plan"]["offload"] == "layerwise"
    assert "promised at most" in str(report) and "compute would not wait: max_weight_memory=" in str(report)


def test_budget_that_the_report_recommends_works(flux: Any) -> None:
    with penstock.apply(flux, offload="layerwise") as placed:
        made(flux)
        (stall,) = [item for item in placed.report().zero_stall if item.component == "transformer"]
    assert 0 <= stall.num_resident <= stall.num_blocks == 5 or stall.num_blocks > 0
    with penstock.apply(flux, offload="layerwise", max_weight_memory=stall.budget_bytes) as placed:
        (part,) = [part for part in placed.plan.components if part.name == "transformer"]
        assert part.num_resident >= stall.num_resident


def test_everything_that_fits_is_left_alone_by_auto(flux: Any) -> None:
    before = footprint(flux)
    with penstock.apply(flux, prompt_cache=0) as placed:
        assert placed.plan.offload == "none" and placed.plan.reason == "auto: all weights fit"
        assert placed.report().notes == ()
        loads = footprint(flux, but=["load_lora_adapter"])  # an adapter is loaded as a whole or not at all
        assert loads[1:] == before[1:]  # but for the handle on the pipeline
        assert isinstance(placed.report(), Report)


def test_auto_takes_the_first_mode_that_fits_the_budget(flux: Any) -> None:
    modes = {}
    for budget in ("1MiB", "2MiB", "4MiB", "least"):
        with penstock.apply(flux, max_weight_memory=budget) as placed:
            modes[budget] = placed.plan.offload
            assert placed.plan.reason.startswith("auto: ")
    assert modes == {"1MiB": "layerwise", "2MiB": "sequential", "4MiB": "none", "least": "layerwise"}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"offload": "layerwise", "max_weight_memory": 1000}, r"below the least that works, \d+ bytes .* of \w+"),
        ({"offload": "sequential", "max_weight_memory": "1MiB"}, "as a whole.*--offload layerwise"),
        ({"offload": "sideways"}, "is no mode"),
        ({"offload": "layerwise", "prefetch": -1}, "not a whole number"),
        ({"offload": "none", "max_weight_memory": "1GiB"}, "no effect"),
        ({"offload": "none", "check": True}, "no effect"),
        ({"offload": "sequential", "prefetch": 2}, "counts blocks"),
        ({"enable_cpu_offload": True, "offload": "layerwise"}, "Give one of them"),
        ({"offlaod": "layerwise"}, "did you mean 'offload'"),
        ({"max_weight_memory": "4G"}, "no number of bytes"),
    ],
)
def test_what_cannot_work_is_refused_and_nothing_is_changed(flux: Any, options: dict[str, Any], message: str) -> None:
    before = footprint(flux)
    with pytest.raises(ConfigError, match=message):
        penstock.apply(flux, **options)
    assert footprint(flux) == before and penstock.placed_on(flux) is None


def test_least_is_the_least(flux: Any) -> None:
    with penstock.apply(flux, offload="layerwise", max_weight_memory="least") as placed:
        least = placed.plan.least_bytes
        assert placed.plan.promised_bytes == least
    with pytest.raises(ConfigError, match=f"least that works, {least} bytes"):
        penstock.apply(flux, offload="layerwise", max_weight_memory=least - 1)


def test_placing_twice_and_moving_by_others_are_refused(flux: Any) -> None:
    flux.enable_model_cpu_offload = flux.enable_model_cpu_offload
    with penstock.apply(flux, offload="layerwise"):
        with pytest.raises(ConfigError, match="placed already"):
            penstock.apply(flux, offload="sequential")
        other = type(flux)(**flux.components)  # another pipeline around the same modules
        with pytest.raises(ConfigError, match="placed already, as part of another FluxPipeline"):
            penstock.apply(other, offload="layerwise")
        assert flux.to("cpu") is flux and flux.to(torch.float32) is flux
        for move in (lambda: flux.to("cuda"), lambda: flux.to(torch.bfloat16), lambda: flux.transformer.half()):
            with pytest.raises(ConfigError, match="remove"):
                move()
        with pytest.raises(ConfigError, match="remove"):
            flux.enable_model_cpu_offload()
    assert flux.to(torch.bfloat16).transformer.dtype == torch.bfloat16


def test_pipeline_with_hooks_of_accelerate_is_refused(flux: Any) -> None:
    from accelerate.hooks import ModelHook, add_hook_to_module

    add_hook_to_module(flux.vae, ModelHook())
    with pytest.raises(ConfigError, match="vae has a hook of accelerate"):
        penstock.apply(flux, offload="layerwise")


def test_pipeline_without_denoiser_is_refused_and_auto_leaves_it_alone() -> None:
    class Odd:
        def __init__(self) -> None:
            self.decoder = nn.Sequential(nn.Linear(3, 3))

    with pytest.raises(ConfigError, match="no denoiser"):
        penstock.apply(Odd(), offload="layerwise")
    with penstock.apply(Odd()) as placed:
        assert placed.plan.offload == "none"


@pytest.mark.parametrize("harm", ["touch", "truncate", "replace", "delete"])
def test_checkpoint_that_changes_while_it_streams_is_an_error_at_that_block(flux: Any, harm: str) -> None:
    placed = penstock.apply(flux, offload="layerwise")
    plain = made(flux)
    (file,) = (Path(flux.config._name_or_path) / "transformer").glob("*.safetensors")
    saved = file.with_suffix(".saved")
    shutil.copy2(file, saved)
    if harm == "touch":
        os.utime(file, ns=(1, 1))
    elif harm == "truncate":
        shutil.copy2(saved, file.with_suffix(".new"))
        os.truncate(file.with_suffix(".new"), 4096)
        os.replace(file.with_suffix(".new"), file)
    elif harm == "replace":
        os.replace(saved, file)
    else:
        file.unlink()
    with pytest.raises(WeightsError, match=r"vanished|changed"):
        made(flux, prompt="another")
    placed.remove()
    if harm != "touch":
        return
    with penstock.apply(flux, offload="layerwise"):
        assert is_equal(plain, made(flux))


def test_error_inside_a_forward_leaves_the_pipeline_usable(flux: Any) -> None:
    plain = made(flux)
    block = flux.transformer.single_transformer_blocks[2]
    with penstock.apply(flux, offload="layerwise", check=True):
        for error in (RuntimeError("on purpose"), KeyboardInterrupt()):

            def fail(*_: object, error: BaseException = error) -> None:
                raise error

            handle = block.norm.register_forward_hook(fail)
            with pytest.raises(type(error)):
                made(flux)
            handle.remove()
            assert is_equal(plain, made(flux))
    assert is_equal(plain, made(flux))


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # Python swallows one in a `__del__`
def test_interrupt_while_weights_are_waited_for_leaves_the_pipeline_usable(flux: Any) -> None:
    plain = made(flux)
    with penstock.apply(flux, offload="layerwise", check=True):
        for delay_s in (0.01, 0.03, 0.06):
            with pytest.raises(KeyboardInterrupt):
                for _ in range(5):
                    timer = threading.Timer(delay_s, signal.raise_signal, (signal.SIGINT,))
                    timer.start()
                    while timer.is_alive():
                        made(flux)
            timer.join()
            assert is_equal(plain, made(flux))


def test_two_pipelines_stream_at_once(zoo_folder: Callable[[str], Path]) -> None:
    names = ("flux", "wan22")
    pipelines = [DiffusionPipeline.from_pretrained(zoo_folder(name)) for name in names]
    plain = [made(pipeline, name) for pipeline, name in zip(pipelines, names, strict=True)]
    results: dict[str, list[bool]] = {name: [] for name in names}

    def work(pipeline: Any, name: str, reference: tuple[torch.Tensor, ...]) -> None:
        for _ in range(3):
            results[name].append(is_equal(reference, made(pipeline, name)))

    handles = [penstock.apply(pipeline, offload="layerwise", check=True) for pipeline in pipelines]
    workers = [threading.Thread(target=work, args=arguments) for arguments in zip(pipelines, names, plain, strict=True)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(60)
    for handle in handles:
        handle.remove()
    assert results == {name: [True] * 3 for name in names}


def test_repeated_prompt_needs_no_encoder(flux: Any) -> None:
    plain = made(flux)
    with penstock.apply(flux, offload="layerwise", trace=True, prompt_cache="1MiB") as placed:
        first, second = made(flux), made(flux)
        assert placed.timeline is not None
        stays = [stay for stay in placed.timeline.residences if stay.unit.startswith("text_encoder_2")]
        assert placed.report().num_prompt_hits == 1
        assert len({stay.unit for stay in stays}) == len(stays)  # each came once
        made(flux, prompt="another")
        assert placed.report().num_prompt_hits == 1
    assert is_equal(plain, first) and is_equal(plain, second)


def test_placed_pipeline_is_freed_with_its_last_reference(zoo_folder: Callable[[str], Path]) -> None:
    pipeline = DiffusionPipeline.from_pretrained(zoo_folder("flux"))
    placed = penstock.apply(pipeline, offload="layerwise")
    made(pipeline)
    del pipeline, placed
    gc.collect()
    gc.collect()
    assert not [value for value in gc.get_objects() if type(value).__name__ == "Streamer"]
    assert has_ended()


def test_read_error_in_the_background_is_raised_at_its_block(flux: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = made(flux)
    with penstock.apply(flux, offload="layerwise"):
        calls = 0
        read = os.preadv

        def failing(*arguments: Any) -> int:
            nonlocal calls
            calls += 1
            if calls == 12:
                raise OSError(5, "Input/output error")
            return read(*arguments)

        monkeypatch.setattr(os, "preadv", failing)
        with pytest.raises((WeightsError, GenerationError), match="Input/output error"):
            made(flux)
        monkeypatch.undo()
        assert is_equal(plain, made(flux))
