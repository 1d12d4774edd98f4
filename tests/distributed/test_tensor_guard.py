"""A cut denoiser refuses what comes too late for the cut, and a cut that fails leaves nothing behind."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import FluxPipeline
from peft import LoraConfig, get_peft_model_state_dict, inject_adapter_in_model
from torch import Tensor, nn

from penstock.distributed.slices import Slicing
from penstock.distributed.tensor import apply_tensor
from penstock.distributed.whole import refuse_while_split
from penstock.errors import ConfigError, GenerationError, ModelError
from penstock.undo import Undo
from tests import zoo
from tests.distributed.cuts import Silent, alone, state
from tests.zoo.denoisers import CASES


def in_block(name: str) -> LoraConfig:
    return LoraConfig(r=2, target_modules=[name])


@pytest.mark.parametrize("name", ["to_q", "to_out.0", "ff.net.2"])
def test_adapters_are_refused_while_a_denoiser_is_cut(name: str) -> None:
    denoiser: Any = CASES["flux"].build().to("meta")
    undo = apply_tensor(denoiser, alone())
    before = list(denoiser.named_modules())
    with pytest.raises(ConfigError, match=r"FluxTransformer2DModel\.add_adapter: .*Load or fuse adapters before"):
        denoiser.add_adapter(in_block(name))
    assert list(denoiser.named_modules()) == before and not hasattr(denoiser, "peft_config")
    undo.run()
    denoiser.add_adapter(in_block(name))
    assert denoiser.peft_config


def pipeline() -> Any:
    pipe: Any = zoo.build("flux")
    pipe.transformer = CASES["flux"].build()  # whose heads two ranks can share
    return pipe


def saved_adapter(folder: Path, name: str) -> Path:
    pipe = pipeline()
    pipe.transformer.add_adapter(in_block(name))
    FluxPipeline.save_lora_weights(folder, transformer_lora_layers=get_peft_model_state_dict(pipe.transformer))
    return folder


@pytest.mark.parametrize("name", ["attn.to_out.0", "ff.net.2"])
def test_a_pipeline_loads_no_adapters_while_its_denoiser_is_cut(name: str, tmp_path: Path) -> None:
    folder, pipe = saved_adapter(tmp_path, name), pipeline()
    denoiser = pipe.transformer
    whole = state(denoiser)
    undo = apply_tensor(denoiser, alone(), lambda weight: True)
    before = [(path, id(module)) for path, module in denoiser.named_modules()]
    with pytest.raises(ConfigError, match=r"load_lora_adapter: .*Load or fuse adapters before it is split"):
        pipe.load_lora_weights(folder)
    assert [(path, id(module)) for path, module in denoiser.named_modules()] == before  # though diffusers widens some
    undo.run()
    assert state(denoiser) == whole
    pipe.load_lora_weights(folder)
    assert denoiser.peft_config


def test_a_pipeline_may_refuse_adapters_itself(tmp_path: Path) -> None:
    pipe, undo = pipeline(), Undo()
    refuse_while_split(pipe, "over 2 ranks", undo)
    with pytest.raises(ConfigError, match=r"FluxPipeline\.load_lora_weights: the denoiser is split over 2 ranks"):
        pipe.load_lora_weights(tmp_path)
    undo.run()
    pipe.load_lora_weights(saved_adapter(tmp_path, "attn.to_q"))
    assert pipe.transformer.peft_config


def prompted(denoiser: Any) -> None:
    denoiser.transformer_blocks[0].attn.processor = nn.Linear(2, 2)


def injected(denoiser: Any) -> None:
    inject_adapter_in_model(in_block("to_q"), denoiser)


def widened(denoiser: Any) -> None:
    denoiser.transformer_blocks[1].attn.to_out[0] = nn.Linear(64, 64)


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (injected, r"transformer_blocks\.0\.attn\.to_q was replaced after Flux.* was cut for 2 ranks.*load it again"),
        (widened, r"transformer_blocks\.1\.attn\.to_out\.0 was replaced"),
        (prompted, "an attention processor got weights of its own"),
    ],
)
def test_layers_that_came_after_the_cut_do_not_run(change: Callable[[Any], None], expected: str) -> None:
    denoiser: Any = CASES["flux"].build()
    undo = apply_tensor(denoiser, Silent("tensor", 1, (0, 1), None), lambda weight: True)
    with torch.inference_mode():
        denoiser(**CASES["flux"].inputs("odd"))
        change(denoiser)
        with pytest.raises(GenerationError, match=expected):
            denoiser(**CASES["flux"].inputs("odd"))
    undo.run()
    assert type(denoiser.transformer_blocks[1].attn.to_out[0]) is nn.Linear


def test_a_cut_that_fails_half_way_leaves_nothing_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    denoiser: Any = CASES["flux"].build()
    before, calls = state(denoiser), iter(range(20))

    def interrupted(inner: Slicing, whole: Tensor, cut: Any = Slicing.cut) -> Tensor:
        if next(calls) == 9:
            raise KeyboardInterrupt
        return cut(inner, whole)

    monkeypatch.setattr(Slicing, "cut", interrupted)
    with pytest.raises(KeyboardInterrupt):
        apply_tensor(denoiser, alone(), lambda weight: True)
    assert state(denoiser) == before
    calls = iter(range(20))
    with pytest.raises(KeyboardInterrupt):
        apply_tensor(denoiser, alone())  # a group in which nothing can be gathered
    with torch.inference_mode(), pytest.raises(ModelError, match="half-way.*Load the pipeline again"):
        denoiser(**CASES["flux"].inputs("odd"))
