"""Pipelines without weights: real classes, meta tensors, and refusals before anything is loaded."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file
from torch import nn

import penstock
from penstock.config import SourceConfig
from penstock.errors import ConfigError, ModelError, NotAPipelineError, WeightsError
from penstock.models.folder import open_folder
from penstock.models.skeleton import Skeleton, build_skeleton
from tests import zoo

KNOWN = [name for name in zoo.NAMES if name != "stranger"]


def skeleton_of(path: Path, **options: object) -> Skeleton:
    source = SourceConfig(**options)
    return build_skeleton(open_folder(path, source), source)


@pytest.fixture
def flux(zoo_folder: Callable[[str], Path], tmp_path: Path) -> Path:
    return Path(shutil.copytree(zoo_folder("flux"), tmp_path / "flux"))


@pytest.mark.parametrize("name", KNOWN)
def test_real_class_with_all_weights_on_meta(name: str, zoo_folder: Callable[[str], Path]) -> None:
    skeleton = skeleton_of(zoo_folder(name))
    stock = zoo.build(name)
    assert type(skeleton.pipeline) is type(stock)
    for part, value in stock.components.items():
        found = getattr(skeleton.pipeline, part)
        assert type(found) is type(value)
        if isinstance(value, nn.Module):
            assert all(parameter.is_meta for parameter in found.parameters())
            assert shapes(found) == shapes(value)  # tied weights have one name only
            assert part in skeleton.indexes


def shapes(module: nn.Module) -> dict[str, tuple[int, ...]]:
    return {name: tuple(parameter.shape) for name, parameter in module.named_parameters()}


def edit(path: Path, **changes: object) -> None:
    values = json.loads(path.read_text())
    path.write_text(json.dumps({**values, **changes}))


def test_unknown_pipeline_class(flux: Path) -> None:
    edit(flux / "model_index.json", _class_name="FluxxPipeline")
    with pytest.raises(NotAPipelineError, match="has no pipeline class 'FluxxPipeline'"):
        skeleton_of(flux)


def test_unknown_component_class(flux: Path) -> None:
    edit(flux / "model_index.json", vae=["diffusers", "AutoencoderXL"])
    with pytest.raises(ModelError, match=r"component 'vae' is a diffusers\.AutoencoderXL"):
        skeleton_of(flux)


def test_unknown_library(flux: Path) -> None:
    edit(flux / "model_index.json", vae=["no_such_library", "V"])
    with pytest.raises(NotAPipelineError, match="in the module 'no_such_library', which .* --trust-remote-code"):
        skeleton_of(flux)
    with pytest.raises(ModelError, match="component 'vae' needs the library 'no_such_library'"):
        skeleton_of(flux, trust_remote_code=True)


def test_no_module_of_this_machine_is_imported_untrusted(
    flux: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "lying_in_wait.py").write_text("raise SystemExit('this ran')")
    monkeypatch.syspath_prepend(tmp_path)
    edit(flux / "model_index.json", vae=["lying_in_wait", "V"])
    with pytest.raises(NotAPipelineError, match="trust"):
        skeleton_of(flux)
    with pytest.raises(SystemExit):  # the negative control: trusted, it runs
        skeleton_of(flux, trust_remote_code=True)


def test_component_without_any_weights(flux: Path) -> None:
    file = flux / "transformer" / "diffusion_pytorch_model.safetensors"
    file.rename(file.with_name("diffusion_pytorch_model.bf16.safetensors"))
    with pytest.raises(WeightsError, match=r"no weight files .* There is diffusion_pytorch_model\.bf16\.safetensors"):
        skeleton_of(flux)


def test_attention_names_of_older_checkpoints_are_known(zoo_folder: Callable[[str], Path], tmp_path: Path) -> None:
    folder = Path(shutil.copytree(zoo_folder("sd15"), tmp_path / "sd15"))
    file = folder / "vae" / "diffusion_pytorch_model.safetensors"
    old_names = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    tensors = load_file(file)
    renamed = {}
    for name, tensor in tensors.items():
        for new, old in old_names.items():
            if "attentions" in name:
                name = name.replace(f".{new}.", f".{old}.")
        renamed[name] = tensor
    assert renamed.keys() != tensors.keys()
    save_file(renamed, file, metadata={"format": "pt"})
    assert skeleton_of(folder).notes == ()


def test_tensors_without_a_place_are_noted(flux: Path) -> None:
    config = flux / "transformer" / "config.json"
    edit(config, num_layers=json.loads(config.read_text())["num_layers"] - 1)
    (note,) = skeleton_of(flux).notes
    assert note.startswith("transformer: ") and "are not used, such as transformer_blocks." in note
    with pytest.warns(UserWarning, match="are not used, such as transformer_blocks"):
        penstock.load(flux)


@pytest.mark.parametrize("text", ["no json", '{"hidden_size": "many"}', '{"num_attention_heads": 7}'])
def test_config_that_fits_no_module(flux: Path, text: str) -> None:
    (flux / "text_encoder" / "config.json").write_text(text)
    with pytest.raises(ModelError, match="text_encoder: no CLIPTextModel fits this config"):
        skeleton_of(flux)


def test_config_of_another_model(flux: Path) -> None:
    edit(flux / "transformer" / "config.json", in_channels=128)
    with pytest.raises(WeightsError, match=r"x_embedder\.weight has shape .* describes \(\d+, 128\)"):
        skeleton_of(flux)


def test_missing_component(flux: Path) -> None:
    shutil.rmtree(flux / "tokenizer")
    with pytest.raises(ModelError, match="component 'tokenizer' has no folder"):
        skeleton_of(flux)


def test_truncated_weights(flux: Path) -> None:
    file = flux / "transformer" / "diffusion_pytorch_model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(WeightsError, match="its header describes"):
        skeleton_of(flux)


def test_variant_that_no_component_has(flux: Path) -> None:
    with pytest.raises(ConfigError, match="variant='fp16' is not in"):
        skeleton_of(flux, variant="fp16")


def test_code_in_the_folder_needs_trust(flux: Path) -> None:
    edit(flux / "model_index.json", _class_name=["pipeline", "Mine"])
    with pytest.raises(NotAPipelineError, match="--trust-remote-code"):
        skeleton_of(flux)


def test_code_of_a_component_needs_trust(flux: Path) -> None:
    edit(flux / "model_index.json", transformer=["mine", "Mine"])
    (flux / "transformer" / "mine.py").write_text("raise SystemExit('this ran')")
    with pytest.raises(NotAPipelineError, match="the class of 'transformer' is Python code"):
        skeleton_of(flux)
