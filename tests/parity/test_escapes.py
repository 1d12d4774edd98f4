"""Ways around the streamer: each gives the plain result, or an error that says what to do. Never another picture."""

from __future__ import annotations

import copy
import gc
import os
import pickle
import threading
import weakref
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from diffusers import DiffusionPipeline, FirstBlockCacheConfig
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import penstock
from penstock.errors import ConfigError, GenerationError, NotAPipelineError, UsageError
from penstock.offload.cold import ColdTensor
from tests import zoo
from tests.parity.test_offload import is_equal
from tests.processes import forked


@pytest.fixture
def flux(zoo_folder: Callable[[str], Path]) -> Any:
    return DiffusionPipeline.from_pretrained(zoo_folder("flux"))


def made(pipeline: Any, **arguments: Any) -> tuple[torch.Tensor, ...]:
    return zoo.tensors(zoo.run(pipeline, "flux", **arguments))


def denoise(pipeline: Any, latents: torch.Tensor) -> torch.Tensor:
    """One call of the denoiser with gradients."""
    text = torch.randn(
        1, 3, pipeline.transformer.config.joint_attention_dim, generator=torch.Generator().manual_seed(1)
    )
    pooled = torch.ones(1, pipeline.transformer.config.pooled_projection_dim)
    result = pipeline.transformer(
        hidden_states=latents,
        encoder_hidden_states=text,
        pooled_projections=pooled,
        timestep=torch.ones(1),
        guidance=torch.ones(1) if pipeline.transformer.config.guidance_embeds else None,
        img_ids=torch.zeros(4, 3),
        txt_ids=torch.zeros(3, 3),
        return_dict=False,
    )
    return torch.as_tensor(result[0])


def test_gradients_through_streamed_weights_are_an_error_and_not_wrong(flux: Any) -> None:
    latents = torch.randn(1, 4, flux.transformer.config.in_channels, requires_grad=True)
    with penstock.apply(flux, offload="layerwise"):
        loss = denoise(flux, latents).pow(2).sum()
        with pytest.raises(UsageError, match="backward needs the weights of .*offload='none'"):
            loss.backward()


class Nulls(nn.Module):
    """An encoder that hands out its own parameter, as those do that have learnt an empty prompt."""

    def __init__(self) -> None:
        super().__init__()
        self.null = nn.Parameter(torch.arange(2000.0), requires_grad=False)

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        return self.null


def test_parameter_that_a_component_returns_outlives_its_turn(flux: Any) -> None:
    holder = SimpleNamespace(transformer=flux.transformer, vae=flux.vae, text_encoder=Nulls())
    with penstock.apply(holder, offload="sequential", max_weight_memory="least"):
        given = holder.text_encoder(torch.ones(1))
        denoise(flux, torch.randn(1, 4, flux.transformer.config.in_channels))
        assert torch.equal(given, torch.arange(2000.0))
        assert torch.equal(holder.text_encoder.null, torch.arange(2000.0))
        denoise(flux, torch.randn(1, 4, flux.transformer.config.in_channels))
        parts = [part for weight in (holder.text_encoder.null,) for part in weight.chunk(2)]
        denoise(flux, torch.randn(1, 4, flux.transformer.config.in_channels))
        assert torch.equal(torch.cat(parts), torch.arange(2000.0))


def test_modules_of_a_placed_pipeline_are_not_placed_twice_but_may_be_used(flux: Any) -> None:
    plain = made(flux)
    other = type(flux)(**flux.components)
    with penstock.apply(flux, offload="layerwise"):
        made(flux)
        with pytest.raises(ConfigError, match="placed already, as part of another FluxPipeline"):
            penstock.apply(other, offload="layerwise")
        assert is_equal(plain, made(other))
    with penstock.apply(other, offload="layerwise"):
        assert is_equal(plain, made(other))


def test_writing_to_a_weight_that_is_on_the_device_is_told(flux: Any) -> None:
    plain = made(flux)
    with pytest.warns(UserWarning, match="changed in place"), penstock.apply(flux, offload="layerwise"):
        made(flux)
        with torch.no_grad():
            flux.vae.decoder.conv_in.weight.mul_(3)
        with pytest.raises(UsageError, match="changed in place"):
            made(flux)
        assert is_equal(plain, made(flux))  # brought anew
        with torch.no_grad():
            flux.vae.decoder.conv_in.weight.mul_(3)


def test_two_threads_on_one_placed_pipeline_are_an_error(flux: Any) -> None:
    errors: list[BaseException] = []
    inside, go_on = threading.Event(), threading.Event()

    def pause(*_: object) -> None:
        inside.set()
        assert go_on.wait(60)

    with penstock.apply(flux, offload="layerwise"):
        handle = flux.transformer.single_transformer_blocks[1].norm.register_forward_hook(pause)
        worker = threading.Thread(target=made, args=(flux,))
        worker.start()
        assert inside.wait(60)
        cold = next(weight for weight in flux.transformer.parameters() if isinstance(weight, ColdTensor))
        for attempt in (
            lambda: flux.text_encoder(torch.ones(1, 4, dtype=torch.long)),
            lambda: cold.sum(),  # a weight that is read beside the run
        ):
            try:
                attempt()
            except GenerationError as error:
                errors.append(error)
        handle.remove()
        go_on.set()
        worker.join(60)
        assert len(errors) == 2 and all("another thread" in str(error) for error in errors)
        made(flux)  # afterwards this thread may


@pytest.mark.parametrize("mode", ["sequential", "layerwise"])
def test_loaded_with_a_cast_it_keeps_its_dtype_when_removed(mode: str, zoo_folder: Callable[[str], Path]) -> None:
    folder = zoo_folder("flux")
    plain = DiffusionPipeline.from_pretrained(folder, dtype=torch.bfloat16)
    pipeline = penstock.load(folder, dtype="bfloat16", offload=mode)
    placed = penstock.placed_on(pipeline)
    assert placed is not None
    placed.remove()
    for (name, one), (_, other) in zip(
        plain.text_encoder_2.named_parameters(), pipeline.text_encoder_2.named_parameters(), strict=True
    ):
        assert one.dtype == other.dtype and torch.equal(one, other), name
    assert pipeline.text_encoder_2.shared.weight is pipeline.text_encoder_2.encoder.embed_tokens.weight
    assert is_equal(made(plain), made(pipeline))


def test_what_others_hang_on_a_block_survives_remove(flux: Any) -> None:
    placed = penstock.apply(flux, offload="layerwise")
    block = flux.transformer.transformer_blocks[0]
    theirs = block.forward
    block.forward = lambda *args, **kwargs: theirs(*args, **kwargs)
    mine = block.forward
    placed.remove()
    assert block.forward is mine


def test_child_process_of_a_fork_runs_on(flux: Any) -> None:
    plain = made(flux)
    with penstock.apply(flux, offload="layerwise", max_weight_memory="1.5MiB"):
        made(flux)
        assert forked(lambda: 0 if is_equal(plain, made(flux)) else 1) == 0
        assert is_equal(plain, made(flux))


def test_interrupted_remove_goes_on_where_it_was(flux: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    placed = penstock.apply(flux, offload="layerwise")
    plain = made(flux)
    handle = torch.utils.hooks.RemovableHandle
    remove, calls = handle.remove, 0

    def interrupted(self: Any) -> None:
        nonlocal calls
        calls += 1
        if calls == 7:
            raise KeyboardInterrupt
        remove(self)

    with monkeypatch.context() as patch:
        patch.setattr(handle, "remove", interrupted)
        with pytest.raises(KeyboardInterrupt):
            placed.remove()
    placed.remove()
    assert penstock.placed_on(flux) is None
    assert not any(module._forward_pre_hooks for module in flux.transformer.modules())
    assert is_equal(plain, made(flux))


def test_files_are_closed_with_the_last_reference(zoo_folder: Callable[[str], Path]) -> None:
    def open_files() -> int:
        gc.collect()
        return len(os.listdir("/proc/self/fd"))

    counts = []
    for _ in range(3):
        pipeline = DiffusionPipeline.from_pretrained(zoo_folder("flux"))
        penstock.apply(pipeline, offload="layerwise")
        del pipeline
        counts.append(open_files())
    assert len(set(counts)) == 1


def test_copies_of_what_is_placed_are_refused(flux: Any) -> None:
    with penstock.apply(flux, offload="layerwise"):
        for attempt in (copy.deepcopy, pickle.dumps):
            for thing in (flux, flux.transformer):
                with pytest.raises(ConfigError, match="remove"):
                    attempt(thing)
    assert is_equal(made(flux), made(copy.deepcopy(flux)))


def test_a_shallow_copy_is_another_pipeline_of_the_same_modules(flux: Any) -> None:
    plain = made(flux)
    with penstock.apply(flux, offload="layerwise", prompt_cache="1MiB"):
        other = copy.copy(flux)
        assert type(other) is type(flux) and other.transformer is flux.transformer
        assert penstock.placed_on(flux) is not None and "encode_prompt" not in vars(other)
        for _ in range(2):
            assert is_equal(plain, made(other)) and is_equal(plain, made(flux))
        for attempt in (copy.deepcopy, pickle.dumps):
            with pytest.raises(ConfigError, match="remove"):
                attempt(other)
    assert vars(other).keys() == vars(flux).keys()
    assert is_equal(plain, made(other.to("cpu")))


def test_what_is_no_pipeline_is_refused(flux: Any) -> None:
    for thing in (None, "demo", flux.transformer, type(flux)):
        with pytest.raises(NotAPipelineError):
            penstock.apply(thing, offload="layerwise")


def test_option_without_effect_is_noted(flux: Any) -> None:
    with penstock.apply(flux, check=True, prefetch=3) as placed:
        assert [note.split()[0] for note in placed.report().notes] == ["check", "prefetch"]


class Reads(TorchDispatchMode):
    """Counts copies whose source lies in the arena."""

    def __init__(self, arena: torch.Tensor) -> None:
        super().__init__()
        self._arena = arena.untyped_storage().data_ptr()
        self.copies: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func._schema.name
        if name in ("aten::copy_", "aten::_to_copy", "aten::clone"):
            source = args[1] if name == "aten::copy_" else args[0]
            if source.untyped_storage().data_ptr() == self._arena:
                self.copies.append(name)
        return func(*args, **(kwargs or {}))


def test_weights_are_never_copied_off_the_device_nor_written_to_disk(flux: Any) -> None:
    def written_bytes() -> int:
        lines = Path("/proc/self/io").read_text().splitlines()
        return int(next(line for line in lines if line.startswith("write_bytes")).split()[1])

    plain = made(flux)
    with penstock.apply(flux, offload="layerwise") as placed:
        assert placed._streamer is not None
        before = written_bytes()
        with Reads(placed._streamer.arena.tensor) as reads:
            assert is_equal(plain, made(flux))
        assert reads.copies == []
        assert written_bytes() - before < 4096
    with Reads(torch.ones(4)) as control:  # the count can tell
        control._arena = flux.vae.decoder.conv_in.weight.untyped_storage().data_ptr()
        flux.vae.decoder.conv_in.weight.clone()
    assert control.copies == ["aten::clone"]


def test_blocks_that_a_cache_skips_stay_right(zoo_folder: Callable[[str], Path]) -> None:
    pictures = []
    for mode in ("none", "layerwise"):
        pipeline = DiffusionPipeline.from_pretrained(zoo_folder("flux"))
        ran: list[int] = []
        block = pipeline.transformer.single_transformer_blocks[1]
        block.norm.register_forward_hook(lambda *_, ran=ran: ran.append(1))
        with penstock.apply(pipeline, offload=mode):
            pipeline.transformer.enable_cache(FirstBlockCacheConfig(threshold=10.0))
            pictures.append((made(pipeline, num_inference_steps=8), len(ran)))
            pipeline.transformer.disable_cache()
    assert is_equal(pictures[0][0], pictures[1][0]) and pictures[0][1] == pictures[1][1]
    assert 0 < pictures[0][1] < 8  # some steps were skipped


def test_child_process_does_not_touch_the_weights_of_its_parent(flux: Any) -> None:
    latents = torch.randn(1, flux.vae.config.latent_channels, 4, 4)
    with penstock.apply(flux, offload="sequential", max_weight_memory="least", check=True), torch.no_grad():
        plain = flux.vae.decode(latents).sample

        def denoise_in_child() -> None:
            denoise(flux, torch.randn(1, 4, flux.transformer.config.in_channels))

        assert forked(denoise_in_child) == 0
        assert torch.equal(plain, flux.vae.decode(latents).sample)


def test_what_exchanges_weights_is_refused(flux: Any) -> None:
    with penstock.apply(flux, offload="layerwise"):
        for attempt in (
            lambda: flux.load_textual_inversion("nowhere"),
            lambda: flux.text_encoder.resize_token_embeddings(9),
            lambda: flux.transformer.proj_out.weight.data.zero_(),
        ):
            with pytest.raises((ConfigError, UsageError), match="remove"):
                attempt()


def test_module_inside_a_wrapper_is_not_placed_twice(flux: Any) -> None:
    wrapper = nn.Module()
    wrapper.inner = flux.vae
    other = SimpleNamespace(transformer=zoo.build("flux").transformer, vae=wrapper)
    with penstock.apply(flux, offload="layerwise"), pytest.raises(ConfigError, match="placed already"):
        penstock.apply(other, offload="layerwise")


@pytest.mark.parametrize("number", [1, 7, 60])
def test_interrupted_apply_leaves_the_pipeline_as_it_was(
    flux: Any, number: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = made(flux)
    make, calls = ColdTensor.of, 0

    def interrupted(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == number:
            raise KeyboardInterrupt
        return make(*args, **kwargs)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(ColdTensor, "of", interrupted)
        penstock.apply(flux, offload="layerwise")
    assert penstock.placed_on(flux) is None and is_equal(plain, made(flux))
    with penstock.apply(flux, offload="layerwise"):
        assert is_equal(plain, made(flux))


def test_removing_frees_the_device_while_the_handle_is_kept(flux: Any) -> None:
    placed = penstock.apply(flux, offload="layerwise")
    assert placed._streamer is not None
    arena = weakref.ref(placed._streamer.arena)
    made(flux)
    placed.remove()
    gc.collect()
    assert arena() is None
    assert placed.report().num_fills > 0
