"""`penstock.inspect`: the same facts from a folder without weights as from the loaded object."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import diffusers
import pytest
import safetensors
import torch
import transformers
from safetensors.torch import load_file

import penstock
from penstock.profile import Profile
from tests import zoo
from tests.models.toys import Pipeline

KNOWN = [name for name in zoo.NAMES if name != "stranger"]


@pytest.mark.parametrize("name", KNOWN)
def test_folder_and_object_agree(name: str, zoo_folder: Callable[[str], Path]) -> None:
    folder, live = penstock.inspect(zoo_folder(name)), penstock.inspect(zoo.build(name))
    assert folder.model == str(zoo_folder(name)) and live.model == "object"
    for one, other in zip(folder.components, live.components, strict=True):
        assert one == other
    assert folder.num_bytes == live.num_bytes
    assert Profile.from_json(folder.to_json()) == folder


@pytest.mark.parametrize("name", KNOWN)
def test_bytes_are_those_of_the_files(name: str, zoo_folder: Callable[[str], Path]) -> None:
    path = zoo_folder(name)
    for component in penstock.inspect(path).components:
        on_disk = sum(file.stat().st_size for file in (path / component.name).glob("*.safetensors"))
        headers = 64 * 2**10
        assert component.num_bytes <= on_disk <= component.num_bytes + headers
        assert component.other_bytes >= 0


def test_mixed_dtypes_are_told_apart(tmp_path: Path) -> None:
    folder = zoo.folder("wan21", tmp_path, torch.bfloat16)
    (transformer,) = penstock.inspect(folder).by_role("denoiser")
    assert set(transformer.dtype_bytes) == {"BF16", "F32"}  # Wan keeps some modules in float32


def test_no_weight_is_read(zoo_folder: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing that could load weights is called."""

    def refuse(*args: object, **kwargs: object) -> None:
        raise AssertionError("weights are read")

    for owner in (diffusers.ModelMixin, transformers.PreTrainedModel):
        monkeypatch.setattr(owner, "from_pretrained", refuse)
    for name in ("safe_open", "load_file"):
        for module in (safetensors, safetensors.torch, diffusers.models.model_loading_utils):
            monkeypatch.setattr(module, name, refuse, raising=False)
    monkeypatch.setattr(torch, "load", refuse)
    assert penstock.inspect(zoo_folder("flux")).num_bytes > 0
    with pytest.raises(AssertionError, match="weights are read"):
        penstock.load(zoo_folder("flux"))  # the negative control


def test_stranger_as_an_object() -> None:
    profile = penstock.inspect(zoo.build("stranger"))
    (painter,) = profile.components
    assert painter.role == "denoiser" and painter.fact.origin == "structure"
    assert [stack.path for stack in painter.stacks] == ["layers_of_stone", "towers.0", "towers.1"]
    assert painter.other_bytes > 0


class Split(Pipeline):
    """Declares a part of its encoder; the rest of that encoder is counted apart."""

    _dit_modules: ClassVar[list[str]] = ["gen_transformer"]
    _encoder_modules: ClassVar[list[str]] = ["mllm.layers"]
    _vae_modules: ClassVar[list[str]] = ["decoder"]


def test_no_byte_is_counted_twice() -> None:
    profile = penstock.inspect(Split())
    by_name = {component.name: component for component in profile.components}
    assert by_name["mllm.layers"].num_bytes == 2 * 64
    assert by_name["mllm"].num_bytes == 0
    pipeline: Any = Split()
    parts = [value for value in vars(pipeline).values() if isinstance(value, torch.nn.Module)]
    live = sum(tensor.nbytes for part in parts for tensor in part.state_dict().values())
    assert profile.num_bytes == live


def test_component_without_safetensors_is_noted(zoo_folder: Callable[[str], Path], tmp_path: Path) -> None:
    folder = Path(shutil.copytree(zoo_folder("flux"), tmp_path / "flux"))
    safe = folder / "vae" / "diffusion_pytorch_model.safetensors"
    torch.save(load_file(safe), safe.with_suffix(".bin"))
    safe.unlink()
    profile = penstock.inspect(folder)
    assert profile.notes == ("vae has no safetensors files; its bytes are counted at float32",)


def test_declares_names_the_plans_of_the_class() -> None:
    (transformer,) = penstock.inspect(zoo.build("flux")).by_role("denoiser")
    assert "_repeated_blocks" in transformer.declares and "_cp_plan" in transformer.declares


@pytest.mark.parametrize("thing", [None, 3, torch.nn.Linear(1, 1), dict])
def test_what_is_no_pipeline(thing: object) -> None:
    with pytest.raises(penstock.NotAPipelineError, match="is no pipeline"):
        penstock.inspect(thing)
