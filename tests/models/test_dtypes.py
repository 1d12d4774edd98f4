"""Weights as they are stored, then cast: the bits of stock `from_pretrained(path, dtype)`, without its copies."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
import transformers
from diffusers import AutoencoderKL, ConfigMixin, FluxTransformer2DModel, ModelMixin, WanTransformer3DModel
from diffusers.configuration_utils import register_to_config
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel, Qwen3MoeConfig, Qwen3MoeForCausalLM, T5EncoderModel

from penstock.config import SourceConfig
from penstock.errors import WeightsError
from penstock.models.dtypes import load_stored, target_dtypes
from penstock.models.folder import open_folder
from penstock.models.quiet import quiet_libraries
from tests import zoo
from tests.zoo import stranger

F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
EVERY = list(itertools.product((F32, BF16, F16), repeat=2))
DIFFUSERS_FILE, TRANSFORMERS_FILE = "diffusion_pytorch_model.safetensors", "model.safetensors"


def names_of(module: nn.Module) -> dict[str, torch.Tensor]:
    return dict([*module.named_parameters(remove_duplicate=False), *module.named_buffers(remove_duplicate=False)])


def bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().contiguous().flatten().view(torch.uint8)


def check(component_class: Any, path: Path, dtype: torch.dtype, variant: str | None = None) -> tuple[Any, Any]:
    """Compares what is stored and then cast with stock; returns the stored module and its targets."""
    with quiet_libraries():
        stock, stock_info = component_class.from_pretrained(
            str(path), dtype=dtype, variant=variant, output_loading_info=True
        )
        module, info = load_stored(component_class, path, variant, dtype)
    targets = target_dtypes(module, dtype)
    expected, stored = names_of(stock), names_of(module)
    assert type(module) is type(stock)
    assert targets.keys() == expected.keys() == stored.keys()
    for name, tensor in expected.items():
        cast = stored[name].to(targets[name])
        assert cast.dtype == tensor.dtype, name
        assert torch.equal(bits(cast), bits(tensor)), name
        assert stored[name].requires_grad == tensor.requires_grad
        assert type(stored[name].data) is torch.Tensor
    for first, second in itertools.pairwise(sorted(expected)):  # tied ones stay tied, others stay apart
        assert (stored[first] is stored[second]) == (expected[first] is expected[second])
    for kind in ("missing_keys", "unexpected_keys"):
        assert sorted(info[kind]) == sorted(stock_info[kind])
    assert not any(part.training for part in module.modules())
    assert str(module.config) == str(stock.config)
    assert str(getattr(module, "generation_config", "")) == str(getattr(stock, "generation_config", ""))
    assert getattr(module, "name_or_path", "") == getattr(stock, "name_or_path", "")
    return module, targets


def unmapped(module: nn.Module, path: Path) -> list[str]:
    """Parameters that do not lie in the mapped files; none where no system call tells."""
    maps = Path("/proc/self/maps")
    lines = maps.read_text().splitlines() if maps.exists() else []
    bounds = [line.split()[0].split("-") for line in lines if f"{path}/" in line]
    ranges = [(int(begin, 16), int(end, 16)) for begin, end in bounds]
    names = [
        name
        for name, parameter in module.named_parameters()
        if not any(begin <= parameter.data_ptr() < end for begin, end in ranges)
    ]
    return names if lines else []


def classes_of(folder: Path) -> dict[str, Any]:
    """Name to class of a zoo folder's modules."""
    homes = {"diffusers": diffusers, "transformers": transformers, "tests.zoo.stranger": stranger}
    opened = open_folder(folder, SourceConfig(trust_remote_code=True))
    found = {
        name: getattr(homes.get(library) or getattr(diffusers.pipelines, library), cls)
        for name, (library, cls) in opened.component_classes.items()
    }
    return {name: cls for name, cls in found.items() if issubclass(cls, nn.Module)}


@pytest.fixture(scope="session")
def half_folder(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Saved zoo pipelines by name, in bfloat16."""
    root = tmp_path_factory.mktemp("zoo_bfloat16")
    return lambda name: zoo.folder(name, root, BF16)


@pytest.mark.parametrize("name", zoo.NAMES)
@pytest.mark.parametrize(("stored", "asked"), [(F32, BF16), (F32, F16), (BF16, F32), (BF16, BF16)], ids=str)
def test_every_component_of_the_zoo(
    name: str,
    stored: torch.dtype,
    asked: torch.dtype,
    zoo_folder: Callable[[str], Path],
    half_folder: Callable[[str], Path],
) -> None:
    folder = zoo_folder(name) if stored is F32 else half_folder(name)
    classes = classes_of(folder)
    assert classes
    for component, component_class in classes.items():
        module, _ = check(component_class, folder / component, asked)
        assert unmapped(module, folder / component) == []
        held = load_file(next((folder / component).glob("*.safetensors")))
        assert {p.dtype for p in module.parameters()} <= {tensor.dtype for tensor in held.values()}


@pytest.mark.parametrize(("stored", "asked"), EVERY, ids=str)
def test_islands_of_both_libraries_in_every_dtype(stored: torch.dtype, asked: torch.dtype, tmp_path: Path) -> None:
    folder = zoo.folder("wan21", tmp_path, stored)
    _, targets = check(WanTransformer3DModel, folder / "transformer", asked)
    assert targets["scale_shift_table"] is F32 and targets["proj_out.weight"] is asked
    folder = zoo.folder("flux", tmp_path, stored)
    _, targets = check(T5EncoderModel, folder / "text_encoder_2", asked)
    outlet = targets["encoder.block.0.layer.1.DenseReluDense.wo.weight"]
    assert outlet is (F32 if asked is F16 else asked)
    assert targets["shared.weight"] is targets["encoder.embed_tokens.weight"] is asked


@pytest.mark.parametrize("asked", [F32, BF16, F16], ids=str)
@pytest.mark.parametrize(
    ("part", "file", "component_class"),
    [
        ("transformer", DIFFUSERS_FILE, FluxTransformer2DModel),
        ("text_encoder_2", TRANSFORMERS_FILE, T5EncoderModel),
    ],
)
def test_file_with_many_dtypes(part: str, file: str, component_class: Any, asked: torch.dtype, tmp_path: Path) -> None:
    path = zoo.folder("flux", tmp_path) / part
    dtypes = itertools.cycle((BF16, F32, F16, torch.float64))
    mixed = {name: tensor.to(next(dtypes)) for name, tensor in load_file(path / file).items()}
    save_file(mixed, path / file, metadata={"format": "pt"})
    module, _ = check(component_class, path, asked)
    assert unmapped(module, path) == []
    stored = names_of(module)
    assert all(stored[name].dtype is tensor.dtype for name, tensor in mixed.items())


class ToyModel(ModelMixin, ConfigMixin):
    """Tensors of every kind, one module and one buffer of which stay in float32."""

    _keep_in_fp32_modules = ["norm", "steps"]  # noqa: RUF012

    @register_to_config
    def __init__(self, width: int = 4) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.normal = nn.Linear(width, width)  # a name that only begins like the listed one
        self.deep = nn.ModuleDict({"norm": nn.LayerNorm(width)})
        self.exact = nn.Parameter(torch.zeros(width, dtype=torch.float32))
        self.register_buffer("steps", torch.arange(width) / 3)
        self.register_buffer("table", torch.arange(width) / 3)
        self.register_buffer("order", torch.arange(width))
        self.register_buffer("unsaved", torch.arange(width) / torch.tensor(3.0), persistent=False)
        self.register_buffer("norm_unsaved", torch.arange(width).float() / 3, persistent=False)


@pytest.mark.parametrize(("stored", "asked"), EVERY, ids=str)
def test_rules_of_diffusers(stored: torch.dtype, asked: torch.dtype, tmp_path: Path) -> None:
    ToyModel().to(stored).save_pretrained(tmp_path)
    module, targets = check(ToyModel, tmp_path, asked)
    kept = {name for name in targets if targets[name] is F32} if asked is not F32 else set()
    expected = {"norm.weight", "norm.bias", "deep.norm.weight", "deep.norm.bias", "steps", "norm_unsaved"}
    assert kept == (expected if asked is not F32 else set())
    assert targets["order"] is torch.int64
    assert targets["unsaved"] is module.unsaved.dtype is asked


class ToyConfig(PreTrainedConfig):
    model_type = "penstock_toy"


class ToyEncoder(PreTrainedModel):
    """The same for transformers, with both of its lists."""

    config_class = ToyConfig
    base_model_prefix = "toy"
    _keep_in_fp32_modules = ["wo"]  # noqa: RUF012
    _keep_in_fp32_modules_strict = ["blocks.*.gate"]  # noqa: RUF012

    def __init__(self, config: ToyConfig) -> None:
        super().__init__(config)
        self.wo = nn.Linear(4, 4)
        self.two = nn.Linear(4, 4)  # `wo` is found within it: transformers searches, and so must we
        self.plain = nn.Linear(4, 4)
        self.blocks = nn.ModuleList(nn.ModuleDict({"gate": nn.Linear(4, 4)}) for _ in range(2))
        self.exact = nn.Parameter(torch.zeros(4, dtype=torch.float32))
        self.register_buffer("table", torch.zeros(4, dtype=torch.float32))
        self.register_buffer("scale", torch.zeros(4))
        self.register_buffer("order", torch.zeros(4, dtype=torch.int64))
        self.register_buffer("unsaved", torch.zeros(4), persistent=False)
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        """Unsaved buffers are made here, after the weights were read."""
        super()._init_weights(module)
        if module is self:
            self.unsaved = (torch.arange(4) / 3).to(self.unsaved.dtype)


@pytest.mark.parametrize(("stored", "asked"), EVERY, ids=str)
def test_rules_of_transformers(stored: torch.dtype, asked: torch.dtype, tmp_path: Path) -> None:
    ToyEncoder(ToyConfig()).to(stored).save_pretrained(tmp_path)
    _, targets = check(ToyEncoder, tmp_path, asked)
    strict = {f"blocks.{number}.gate.{kind}" for number in range(2) for kind in ("weight", "bias")}
    loose = {"wo.weight", "wo.bias", "two.weight", "two.bias"}
    kept = {"exact", "table"} | strict | (loose if asked is F16 else set())
    assert asked is F32 or {name for name, dtype in targets.items() if dtype is F32} == kept
    assert targets["order"] is torch.int64


class TiedEncoder(PreTrainedModel):
    """Two names for one tensor; the list has the one that is not saved."""

    config_class = ToyConfig
    base_model_prefix = "toy"
    _tied_weights_keys = {"head.weight": "embed.weight"}  # noqa: RUF012
    _keep_in_fp32_modules_strict = ["head"]  # noqa: RUF012

    def __init__(self, config: ToyConfig) -> None:
        super().__init__(config)
        self.embed = nn.Embedding(4, 4)
        self.head = nn.Linear(4, 4)
        self.post_init()


@pytest.mark.parametrize(("stored", "asked"), EVERY, ids=str)
def test_tied_tensor_has_the_dtype_of_its_saved_name(stored: torch.dtype, asked: torch.dtype, tmp_path: Path) -> None:
    TiedEncoder(ToyConfig(tie_word_embeddings=True)).to(stored).save_pretrained(tmp_path)
    module, targets = check(TiedEncoder, tmp_path, asked)
    assert module.head.weight is module.embed.weight
    assert targets == {"embed.weight": asked, "head.weight": asked, "head.bias": F32}


@pytest.mark.parametrize("asked", [F32, F16], ids=str)
def test_shards_and_variants(asked: torch.dtype, tmp_path: Path) -> None:
    folder = zoo.folder("flux", tmp_path)
    transformer = FluxTransformer2DModel.from_pretrained(folder / "transformer")
    transformer.save_pretrained(tmp_path / "shards", max_shard_size="100KB")
    module, _ = check(FluxTransformer2DModel, tmp_path / "shards", asked)
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 1
    assert unmapped(module, tmp_path / "shards") == []
    encoder = T5EncoderModel.from_pretrained(folder / "text_encoder_2", dtype=BF16)
    encoder.save_pretrained(folder / "text_encoder_2", variant="half", max_shard_size="20KB")
    module, _ = check(T5EncoderModel, folder / "text_encoder_2", asked, variant="half")
    assert {p.dtype for p in module.parameters()} == {BF16}


@pytest.mark.parametrize("asked", [F32, BF16], ids=str)
def test_weights_that_transformers_puts_together(asked: torch.dtype, tmp_path: Path) -> None:
    sizes = dict.fromkeys(("hidden_size", "intermediate_size", "moe_intermediate_size", "vocab_size"), 16)
    counts = {"num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1, "num_experts": 3}
    config = Qwen3MoeConfig(**sizes, **counts, head_dim=8, num_experts_per_tok=2)
    made = Qwen3MoeForCausalLM(config).to(BF16)
    made.generation_config.max_new_tokens = 7
    made.save_pretrained(tmp_path)
    module, _ = check(Qwen3MoeForCausalLM, tmp_path, asked)
    assert module.generation_config.max_new_tokens == 7
    assert {p.dtype for p in module.parameters()} == {BF16}
    assert all("experts" in name for name in unmapped(module, tmp_path))  # two files' tensors in one: a copy


def test_old_names_of_attention_layers(tmp_path: Path) -> None:
    path = zoo.folder("flux", tmp_path) / "vae"
    new = {".to_q.": ".query.", ".to_k.": ".key.", ".to_v.": ".value.", ".to_out.0.": ".proj_attn."}
    old = {}
    for name, tensor in load_file(path / DIFFUSERS_FILE).items():
        for now, before in new.items():
            name = name.replace(now, before)
        old[name] = tensor
    assert any(".query." in name for name in old)
    save_file(old, path / DIFFUSERS_FILE, metadata={"format": "pt"})
    check(AutoencoderKL, path, BF16)


@pytest.mark.parametrize(
    ("part", "file", "component_class", "name"),
    [
        ("transformer", DIFFUSERS_FILE, FluxTransformer2DModel, "x_embedder.weight"),
        ("text_encoder_2", TRANSFORMERS_FILE, T5EncoderModel, "encoder.final_layer_norm.weight"),
    ],
)
def test_missing_and_unexpected_names_are_told(
    part: str, file: str, component_class: Any, name: str, tmp_path: Path
) -> None:
    path = zoo.folder("flux", tmp_path) / part
    tensors = load_file(path / file)
    tensors["stray"] = tensors.pop(name)
    save_file(tensors, path / file, metadata={"format": "pt"})
    with quiet_libraries():
        _, info = load_stored(component_class, path, None, BF16)
    assert list(info["missing_keys"]) == [name]
    assert list(info["unexpected_keys"]) == ["stray"]


def test_truncated_file_is_refused(tmp_path: Path) -> None:
    path = zoo.folder("flux", tmp_path) / "transformer"
    (path / DIFFUSERS_FILE).write_bytes((path / DIFFUSERS_FILE).read_bytes()[:-1])
    with pytest.raises(WeightsError, match="bytes, but its header describes"):
        load_stored(FluxTransformer2DModel, path, None, BF16)


class OwnLoader(ToyModel):
    """A class that loads itself, and not as diffusers would."""

    @classmethod
    def from_pretrained(cls, path: Any, **options: Any) -> Any:
        module, info = super().from_pretrained(path, **options)
        module.normal.double()
        return module, info


def test_class_with_its_own_loader_is_left_to_it(tmp_path: Path) -> None:
    ToyModel().save_pretrained(tmp_path)
    module, targets = check(OwnLoader, tmp_path, BF16)
    assert targets == {name: tensor.dtype for name, tensor in names_of(module).items()}
    assert targets["normal.weight"] is torch.float64


def test_pickled_weights_are_left_to_stock(tmp_path: Path) -> None:
    ToyModel().save_pretrained(tmp_path, safe_serialization=False)
    module, _ = check(ToyModel, tmp_path, BF16)
    assert module.normal.weight.dtype is BF16


def test_quantised_weights_are_left_to_stock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ToyModel().save_pretrained(tmp_path)
    config = tmp_path / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "quantization_config": {"quant_method": "toy"}}))
    packed = ToyModel()
    packed.register_to_config(quantization_config={"quant_method": "toy"})
    asked: list[dict[str, Any]] = []

    def stock(path: Path, **options: Any) -> tuple[nn.Module, dict[str, Any]]:
        asked.append(options)
        return packed, {"missing_keys": []}

    monkeypatch.setattr(ToyModel, "from_pretrained", stock)
    module, _ = load_stored(ToyModel, tmp_path, None, BF16)
    assert module is packed and asked[0]["dtype"] is BF16
    assert set(target_dtypes(module, BF16).values()) == {F32, torch.int64}


def test_default_dtype_is_put_back(tmp_path: Path) -> None:
    ToyModel().save_pretrained(tmp_path)
    load_stored(ToyModel, tmp_path, None, BF16)
    assert torch.get_default_dtype() is F32
    (tmp_path / "config.json").write_text('{"width": "wide"}')
    with pytest.raises(TypeError):
        load_stored(ToyModel, tmp_path, None, BF16)
    assert torch.get_default_dtype() is F32


def test_module_of_no_library() -> None:
    module = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2, dtype=BF16))
    assert list(target_dtypes(module, F16).values()) == [F32, F32, BF16, BF16]
