"""Loading: the stock class, each weight once, progress, defaults of the maker, and clear failures."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from diffusers import FluxPipeline, FluxTransformer2DModel, ModelMixin
from safetensors.torch import load_file, save_file

import penstock
from penstock.engine.build import LoadEvent
from penstock.errors import ConfigError, WeightsError
from tests import zoo


@pytest.fixture
def flux(zoo_folder: Callable[[str], Path], tmp_path: Path) -> Path:
    return Path(shutil.copytree(zoo_folder("flux"), tmp_path / "flux"))


def test_class_is_the_stock_one(flux: Path) -> None:
    pipeline = penstock.load(flux)
    assert type(pipeline) is FluxPipeline
    assert pipeline.transformer.dtype is torch.float32
    assert not any(parameter.is_meta for parameter in pipeline.transformer.parameters())


def test_dtype_and_float32_islands(tmp_path: Path) -> None:
    pipeline = penstock.load(zoo.folder("wan21", tmp_path), dtype="bfloat16")
    assert {p.dtype for p in pipeline.transformer.parameters()} == {torch.bfloat16, torch.float32}
    assert pipeline.transformer.scale_shift_table.dtype is torch.float32


@pytest.mark.parametrize("name", ["flux", "wan22"])
def test_each_component_is_loaded_once(
    name: str, zoo_folder: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded: list[str] = []
    stock = ModelMixin.from_pretrained.__func__

    def counted(cls: type, path: str, **options: object) -> object:
        loaded.append(Path(path).name)
        return stock(cls, path, **options)

    monkeypatch.setattr(ModelMixin, "from_pretrained", classmethod(counted))
    pipeline = penstock.load(zoo_folder(name))
    expected = [part for part, value in pipeline.components.items() if isinstance(value, ModelMixin)]
    assert sorted(loaded) == sorted(expected)


def test_progress_counts_the_bytes_of_the_files(flux: Path) -> None:
    events: list[LoadEvent] = []
    penstock.load(flux, on_progress=events.append)
    total = penstock.inspect(flux).num_bytes
    assert sorted(event.component for event in events) == ["", "text_encoder", "text_encoder_2", "transformer", "vae"]
    assert [event.done_bytes for event in events] == sorted(event.done_bytes for event in events)
    assert events[0].done_bytes == 0
    assert events[-1].done_bytes == events[-1].total_bytes
    assert events[-1].total_bytes >= total  # tied weights may be in the files twice


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="only Linux tells what is mapped")
def test_same_dtype_weights_stay_mapped_from_the_checkpoint(flux: Path) -> None:
    """What the streamer will stand on: nothing is copied that need not be."""
    pipeline = penstock.load(flux)
    maps = Path("/proc/self/maps")
    ranges = [
        tuple(int(bound, 16) for bound in line.split()[0].split("-"))
        for line in maps.read_text().splitlines()
        if line.endswith("transformer/diffusion_pytorch_model.safetensors")
    ]
    for parameter in pipeline.transformer.parameters():
        assert any(begin <= parameter.data_ptr() < end for begin, end in ranges)


def test_makers_size_is_the_default_size(flux: Path) -> None:
    (flux / "penstock.json").write_text(json.dumps({"defaults": {"height": 64, "width": 64}}))
    pipeline = penstock.load(flux)
    assert pipeline.default_sample_size * pipeline.vae_scale_factor == 64


def test_unknown_option_is_refused(flux: Path) -> None:
    with pytest.raises(ConfigError, match="did you mean 'dtype'"):
        penstock.load(flux, dtpye="float32")


def test_weights_that_are_not_there(flux: Path) -> None:
    (flux / "vae" / "diffusion_pytorch_model.safetensors").unlink()
    with pytest.raises(WeightsError, match="vae: "):
        penstock.load(flux)


@pytest.mark.parametrize(
    ("file", "name"),
    [
        ("transformer/diffusion_pytorch_model.safetensors", "x_embedder.weight"),
        ("text_encoder_2/model.safetensors", "encoder.final_layer_norm.weight"),
    ],
)
def test_no_weight_is_made_up(file: str, name: str, flux: Path) -> None:
    """Both libraries would log a warning and go on with random values."""
    tensors = load_file(flux / file)
    save_file({key: value for key, value in tensors.items() if key != name}, flux / file, metadata={"format": "pt"})
    with pytest.raises(WeightsError, match=rf"its files lack {name}"):
        penstock.load(flux)


def test_full_device_says_what_to_do(flux: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*args: object, **kwargs: object) -> None:
        raise torch.OutOfMemoryError("no")

    monkeypatch.setattr(FluxTransformer2DModel, "to", full)
    with pytest.raises(penstock.ModelError, match="cpu is full while transformer is loaded: .* --dtype bfloat16"):
        penstock.load(flux)


def test_variant_where_there_is_one_and_plain_files_elsewhere(flux: Path) -> None:
    plain = flux / "transformer" / "diffusion_pytorch_model.safetensors"
    doubled = {key: value * 2 for key, value in load_file(plain).items()}
    save_file(doubled, plain.with_name("diffusion_pytorch_model.two.safetensors"), metadata={"format": "pt"})
    stock, variant = penstock.load(flux), penstock.load(flux, variant="two")
    assert torch.equal(variant.transformer.proj_out.weight, stock.transformer.proj_out.weight * 2)
    assert torch.equal(variant.vae.decoder.conv_in.weight, stock.vae.decoder.conv_in.weight)


CODE = """
from diffusers import FluxPipeline

class TrustedPipeline(FluxPipeline):
    answer = 42
"""


def test_code_of_a_trusted_folder_runs(flux: Path) -> None:
    index = json.loads((flux / "model_index.json").read_text())
    (flux / "trusted.py").write_text(CODE)
    (flux / "model_index.json").write_text(json.dumps({**index, "_class_name": ["trusted", "TrustedPipeline"]}))
    with pytest.raises(penstock.NotAPipelineError, match="trust"):
        penstock.load(flux)
    pipeline = penstock.load(flux, trust_remote_code=True)
    assert pipeline.answer == 42
