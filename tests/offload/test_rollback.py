"""An adapter is loaded as a whole, or the pipeline is as it was: structure, flags, attributes, weights and picture."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict
from safetensors.torch import save_file
from torch import nn

import penstock
from penstock.errors import ConfigError
from penstock.offload.rollback import Snapshot
from tests import zoo
from tests.parity.test_offload import is_equal, stock

pytestmark = pytest.mark.filterwarnings(
    "ignore:No LoRA keys", "ignore:Already found a", "ignore:Adapter .* was active which is now deleted"
)
_TEXT = "text_encoder.text_model.encoder.layers.0.self_attn.q_proj.lora"
_NARROW = {f"{_TEXT}_A.weight": torch.ones(2, 99), f"{_TEXT}_B.weight": torch.ones(77, 2)}
KINDS: dict[str, Callable[[dict[str, torch.Tensor]], Any]] = {
    "shape": lambda state: state.update({max(state): torch.ones(7, 3)}),
    "norm": lambda state: state.update({"transformer.transformer_blocks.0.attn.norm_q.weight": torch.ones(0)}),
    "text": lambda state: state.update(_NARROW),
}


def adapter_files(pipeline: Any, folder: Path) -> dict[str, Path]:
    """One that fits, and one of each kind that does not."""
    sizes = {name: weight.shape for name, weight in pipeline.transformer.named_parameters()}
    torch.manual_seed(0)
    pipeline.transformer.add_adapter(
        LoraConfig(r=2, init_lora_weights=False, target_modules=["to_q", "to_v", "norm.linear"])
    )
    good = {f"transformer.{name}": value for name, value in get_peft_model_state_dict(pipeline.transformer).items()}
    files = {}
    for kind, spoil in {"good": lambda state: None, **KINDS}.items():
        state = {name: value.clone().contiguous() for name, value in good.items()}
        spoil(state)
        for name, value in state.items():
            if not value.numel():
                state[name] = torch.full(sizes[name.removeprefix("transformer.")], 0.5)
        files[kind] = folder / f"{kind}.safetensors"
        save_file(state, files[kind])
    return files


def facts(pipeline: Any) -> list[Any]:
    modules = [part for part in pipeline.components.values() if isinstance(part, nn.Module)]
    found: list[Any] = [sorted(vars(pipeline))]
    for module in modules:
        found.append([(name, sorted(vars(inner))) for name, inner in module.named_modules()])
        found.append([(name, weight.requires_grad, weight.shape) for name, weight in module.named_parameters()])
    return found


def is_same_state(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(value, other[name]) for name, value in one.items())


@pytest.mark.parametrize("mode", ["none", "layerwise", "all"])
def test_a_file_that_does_not_fit_leaves_nothing_behind(
    mode: str, zoo_folder: Callable[[str], Path], tmp_path: Path
) -> None:
    files = adapter_files(stock("flux", zoo_folder("flux")), tmp_path)
    options = {"offload": "layerwise", "max_weight_memory": "1GiB"} if mode == "all" else {"offload": mode}
    for has_first in (False, True):
        pipeline = stock("flux", zoo_folder("flux"))
        with penstock.apply(pipeline, **options):
            if has_first:
                pipeline.load_lora_weights(str(files["good"]), adapter_name="first")
            picture = zoo.tensors(zoo.run(pipeline, "flux"))
            before = facts(pipeline), pipeline.transformer.state_dict()
            for kind in KINDS:
                if kind == "norm" and mode == "none":
                    continue  # may be changed in place there
                error = ConfigError if kind == "norm" else RuntimeError
                with pytest.raises(error):
                    pipeline.load_lora_weights(str(files[kind]), adapter_name="second")
                assert facts(pipeline) == before[0] and is_same_state(before[1], pipeline.transformer.state_dict())
            assert is_equal(picture, zoo.tensors(zoo.run(pipeline, "flux")))
            pipeline.load_lora_weights(str(files["good"]), adapter_name="second")
            assert facts(pipeline) != before[0]
        assert "load_lora_weights" not in vars(pipeline)


def test_stock_leaves_half_an_adapter(zoo_folder: Callable[[str], Path], tmp_path: Path) -> None:
    """The comparison can fail."""
    files = adapter_files(stock("flux", zoo_folder("flux")), tmp_path)
    pipeline = stock("flux", zoo_folder("flux"))
    before = facts(pipeline)
    with pytest.raises(RuntimeError):
        pipeline.load_lora_weights(str(files["text"]))
    assert facts(pipeline) != before


def test_a_snapshot_puts_back_what_was_added_removed_and_changed() -> None:
    module = nn.Sequential(nn.Linear(2, 2), nn.ReLU())
    module.names = ["one"]  # type: ignore[assignment]
    weight = module[0].weight
    snapshot = Snapshot([module])
    module.names.append("two")  # type: ignore[operator, union-attr]
    module.more = 1  # type: ignore[assignment]
    module[0] = nn.Identity()
    weight.requires_grad_(False)
    snapshot.restore()
    snapshot.restore_flags()
    assert module[0].weight is weight and weight.requires_grad
    assert module.names == ["one"] and not hasattr(module, "more")
