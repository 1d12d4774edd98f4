"""Adapters come and go, and leave nothing behind."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers.utils import convert_state_dict_to_diffusers
from peft import LoraConfig, get_peft_model_state_dict
from safetensors.torch import save_file

import penstock
from penstock.engine.adapters import Adapters
from penstock.engine.generate import call
from penstock.errors import RequestError
from penstock.wire import Lora

ARGUMENTS = {"prompt": "a red circle", "num_inference_steps": 2, "max_sequence_length": 64, "output_type": "np"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two adapters of demo's transformer, with weights that are not zero."""
    folder = tmp_path_factory.mktemp("loras")
    for seed, name in enumerate(("one", "two")):
        pipeline = penstock.load("demo", device="cpu")
        pipeline.transformer.add_adapter(LoraConfig(r=2, target_modules=["to_q", "to_v"]), "default")
        torch.manual_seed(seed)
        state = get_peft_model_state_dict(pipeline.transformer)
        state = {f"transformer.{key}": torch.randn_like(value) / 4 for key, value in state.items()}
        save_file(convert_state_dict_to_diffusers(state), folder / f"{name}.safetensors")
    (folder / "broken.safetensors").write_bytes(b"not weights")
    return folder


def picture(pipeline: Any) -> np.ndarray:
    return np.asarray(call(pipeline, ARGUMENTS, seed=0).images[0])


@pytest.mark.parametrize("offload", ["none", "layerwise"])
def test_they_change_the_picture_and_are_gone_afterwards(folder: Path, offload: str) -> None:
    pipeline = penstock.load("demo", device="cpu", offload=offload)
    adapters = Adapters(pipeline)
    one = Lora(name="one", path=str(folder / "one.safetensors"))
    two = Lora(name="two", path=str(folder / "two.safetensors"), scale=0.5)
    plain = picture(pipeline)
    seen = []
    for wanted in ((one,), (two,), (one, two), (one,)):
        adapters.use(wanted)
        seen.append(picture(pipeline))
    assert np.array_equal(seen[0], seen[3])
    assert len({array.tobytes() for array in (plain, *seen[:3])}) == 4
    adapters.use(())
    assert np.array_equal(picture(pipeline), plain)


def test_one_that_cannot_be_loaded_is_refused_and_leaves_the_model(folder: Path) -> None:
    pipeline = penstock.load("demo", device="cpu")
    adapters = Adapters(pipeline)
    plain = picture(pipeline)
    one = Lora(name="one", path=str(folder / "one.safetensors"))
    for name in ("broken", "absent"):
        with pytest.raises(RequestError, match=f"lora one, {name} cannot be loaded") as caught:
            adapters.use((one, Lora(name=name, path=str(folder / f"{name}.safetensors"))))
        assert caught.value.param == "lora" and str(folder) not in str(caught.value)
    assert np.array_equal(picture(pipeline), plain)


def test_pipelines_without_adapters_refuse_them() -> None:
    with pytest.raises(RequestError, match="takes no LoRA"):
        Adapters(object()).use((Lora(name="one", path="one"),))
