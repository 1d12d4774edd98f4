"""Who holds which blocks: by bytes, before weights load, and in what is freed, kept and put back."""

from __future__ import annotations

import gc
import weakref
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from diffusers import DiffusionPipeline, HunyuanDiT2DModel
from peft import LoraConfig
from torch import Tensor, nn

from penstock.distributed.group import Group
from penstock.distributed.stages import apply_stages, check_stages, deal
from penstock.errors import ConfigError, DeclarationError, ModelError
from penstock.models.rows.row import Row, StackRow
from penstock.models.rows.table import blocks_of, row_of
from penstock.models.stacks import find_stacks
from penstock.weights.maps import MappedFiles
from tests import zoo
from tests.distributed.stages import (
    BLOCKS,
    REFINERS,
    ROW,
    Denoiser,
    are_equal,
    forward,
    hold,
    num_bytes,
    row_for,
    stages,
)
from tests.ranks import run_ranks
from tests.zoo.denoisers import CASES


def live_bytes() -> int:
    gc.collect()
    storages = {}
    for thing in gc.get_objects():
        if type(thing) in (Tensor, nn.Parameter, nn.Buffer) and not thing.is_meta:
            storages[thing.untyped_storage().data_ptr()] = thing.untyped_storage().nbytes()
    return sum(storages.values())


def run_memory(name: str, size: int) -> float:
    group = stages(size)
    inputs = CASES[name].inputs("odd")
    before = live_bytes()
    denoiser = CASES[name].build()
    blocks = [block for stack in row_for(denoiser).stacks for block in blocks_of(denoiser, stack)]
    total = num_bytes(blocks)
    rest = num_bytes([denoiser]) - total
    whole = live_bytes() - before
    assert whole >= total + rest
    own = deal(denoiser, row_for(denoiser), size)[group.rank]
    own_bytes = num_bytes(denoiser.get_submodule(path) for path in own)
    own_ids = {id(denoiser.get_submodule(path)) for path in own}
    foreign = [weakref.ref(weight) for block in blocks if id(block) not in own_ids for weight in block.parameters()]
    del blocks
    apply_stages(denoiser, row_for(denoiser), group)
    assert foreign and not any(weight is not None and weight.numel() for weight in (ref() for ref in foreign))
    assert whole - (live_bytes() - before) == total - own_bytes
    forward(denoiser, inputs)
    assert num_bytes([denoiser]) == rest + own_bytes
    return own_bytes / total


@pytest.mark.parametrize(("name", "size"), [("flux", 2), ("wan", 2), ("wan", 3)])
def test_each_rank_has_its_share_of_the_blocks(name: str, size: int) -> None:
    shares = run_ranks(size, run_memory, name, size)
    assert sum(shares) == pytest.approx(1)
    assert max(shares) < 1 / size + 0.2


def run_mapped(path: Path) -> None:
    pipe = DiffusionPipeline.from_pretrained(path)
    files = MappedFiles()

    def lies_in_file(block: nn.Module) -> bool:
        return all(files.locate(p.data_ptr(), p.nbytes, p.dtype) is not None for p in block.parameters())

    plain = zoo.tensors(zoo.run(pipe, "flux"))
    denoiser = pipe.transformer
    weights = dict(denoiser.named_parameters())
    group = stages(2)
    own = deal(denoiser, row_for(denoiser), 2)[group.rank]
    undo = apply_stages(denoiser, row_for(denoiser), group, lies_in_file)
    held = {name for name, _ in denoiser.named_parameters() if "blocks." in name}
    assert held == {name for name in weights if name.startswith(tuple(f"{path}." for path in own))}
    assert are_equal(list(zoo.tensors(zoo.run(pipe, "flux"))), list(plain))
    undo.run()
    undo.run()
    restored = dict(denoiser.named_parameters())
    assert list(restored) == list(weights) and all(restored[name] is weights[name] for name in weights)
    assert are_equal(list(zoo.tensors(zoo.run(pipe, "flux"))), list(plain))


def test_what_lies_in_a_file_is_put_back(tmp_path: Path) -> None:
    run_ranks(2, run_mapped, zoo.folder("flux", tmp_path))


def run_let_go() -> None:
    denoiser = CASES["flux"].build()
    inputs = CASES["flux"].inputs("odd")
    group = stages(2)
    plain, weights = forward(denoiser, inputs), dict(denoiser.named_parameters())
    copies = {name: weight.clone() for name, weight in weights.items()}
    undo = apply_stages(denoiser, row_for(denoiser), group)
    with pytest.raises(ModelError, match=r"a state_dict\(\) would lack it"):
        denoiser.state_dict()
    undo.run()
    undo.run()
    assert all(weight is weights[name] for name, weight in denoiser.named_parameters())
    assert all(torch.equal(weight, copies[name]) for name, weight in weights.items())
    assert are_equal(forward(denoiser, inputs), plain)


def test_what_was_let_go_comes_back_from_the_rank_that_has_it() -> None:
    run_ranks(2, run_let_go)


def test_adapters_are_refused_while_blocks_are_elsewhere() -> None:
    denoiser = CASES["flux"].build()
    undo = apply_stages(denoiser, row_for(denoiser), Group("pipeline", 1, (0, 1), None), hold)
    before = list(denoiser.named_modules())
    for name in ("to_q", "to_out.0", "ff.net.2"):
        with pytest.raises(ConfigError, match=r"add_adapter: the denoiser is split in 2 stages.*before it is split"):
            denoiser.add_adapter(LoraConfig(r=2, target_modules=[name]))
    with pytest.raises(ConfigError, match="load_lora_adapter: the denoiser is split in 2 stages"):
        denoiser.load_lora_adapter({})
    assert list(denoiser.named_modules()) == before
    undo.run()
    denoiser.add_adapter(LoraConfig(r=2, target_modules=["to_q"]))


def test_stages_that_fail_half_way_leave_nothing_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    denoiser = CASES["flux"].build()
    before = list(denoiser.named_modules())
    calls = iter(range(9))

    def interrupted(self: nn.Module, hook: object) -> None:
        if next(calls) == 1:
            raise KeyboardInterrupt

    monkeypatch.setattr(nn.Module, "register_state_dict_pre_hook", interrupted)
    with pytest.raises(KeyboardInterrupt):
        apply_stages(denoiser, row_for(denoiser), Group("pipeline", 1, (0, 1), None))
    assert list(denoiser.named_modules()) == before
    assert not any("forward" in vars(module) for module in denoiser.modules())
    assert forward(denoiser, CASES["flux"].inputs("odd"))


def run_surface() -> None:
    denoiser = CASES["sd3"].build()
    found = [(stack.path, len(stack.blocks)) for stack in find_stacks(denoiser)]
    group = stages(3)
    apply_stages(denoiser, row_for(denoiser), group)
    for index, block in enumerate(denoiser.transformer_blocks):
        assert type(block).__name__ == "JointTransformerBlock"
        assert block.context_pre_only is (index == 2)
        assert bool(list(block.modules())[1:]) is (index == group.rank)
    assert [(stack.path, len(stack.blocks)) for stack in find_stacks(denoiser)] == found
    assert denoiser.dtype == torch.float32


def test_a_shell_looks_like_its_block() -> None:
    run_ranks(3, run_surface)


# ---- who holds what ----


def test_runs_have_about_equal_bytes() -> None:
    denoiser = Denoiser(400, 4, 4, 4, 4, 4)
    assert [len(run) for run in deal(denoiser, ROW, 2)] == [1, 5]
    assert [len(run) for run in deal(Denoiser(4, 4, 4, 4, 4, 400), ROW, 2)] == [5, 1]
    assert [len(run) for run in deal(Denoiser(*[4] * 6), ROW, 3)] == [2, 2, 2]
    assert deal(Denoiser(4, 4), ROW, 2) == (("blocks.0",), ("blocks.1",))
    assert deal(denoiser, ROW, 1) == ((),)


def test_blocks_are_dealt_out_before_weights_load() -> None:
    with torch.device("meta"):
        denoiser = Denoiser(4, 4, 4)
    assert [len(run) for run in deal(denoiser, ROW, 3)] == [1, 1, 1]
    check_stages(denoiser, ROW, 3)
    with pytest.raises(ConfigError, match="in 4 stages.* there are 3"):
        check_stages(denoiser, ROW, 4)


def test_a_stack_whose_streams_do_not_go_on_is_on_every_rank() -> None:
    denoiser = Denoiser(4, 4, num_refiners=2)
    assert deal(denoiser, ROW, 2) == (("blocks.0",), ("blocks.1",))
    joint = StackRow("blocks", takes={"hidden_states": "txt+img"}, gives=("txt+img",))
    assert deal(denoiser, Row(stacks=(REFINERS, joint), attention={}), 2) == (
        ("refiners.0", "refiners.1"),
        ("blocks.0", "blocks.1"),
    )


def test_a_stack_that_gives_two_of_a_kind_is_on_every_rank() -> None:
    hints = StackRow("refiners", takes={"hidden_states": "img"}, gives=("img", "img"))
    denoiser = Denoiser(4, 4, num_refiners=2)
    assert deal(denoiser, Row(stacks=(hints, BLOCKS), attention={}), 2) == (("blocks.0",), ("blocks.1",))
    with pytest.raises(ConfigError, match="give two tensors of one stream"):
        deal(denoiser, Row(stacks=(hints,), attention={}), 2)


@pytest.mark.parametrize("size", [4, 9])
def test_more_stages_than_blocks_are_refused(size: int) -> None:
    denoiser = CASES["sd3"].build()
    with pytest.raises(ConfigError, match=f"in {size} stages.* there are 3. Use pipeline_parallel_size=3 or less"):
        check_stages(denoiser, row_for(denoiser), size)


def test_what_cannot_run_in_stages_is_refused_with_the_reason() -> None:
    check_stages(Denoiser(4), None, 1)
    with pytest.raises(ConfigError, match="Denoiser cannot run in 2 stages: no row"):
        check_stages(Denoiser(4, 4), None, 2)
    with torch.device("meta"):
        keeper = HunyuanDiT2DModel(sample_size=8, patch_size=2, in_channels=4, num_layers=4)
    with pytest.raises(ConfigError, match="its later blocks take what the first ones returned"):
        check_stages(keeper, ROW, 2)
    mute = StackRow("blocks", takes={"temb": "img:0"}, gives=("img",))
    with pytest.raises(DeclarationError, match="blocks give 'img', which no argument of theirs carries"):
        check_stages(Denoiser(4, 4), Row(stacks=(mute,), attention={}), 2)


def test_one_stage_is_no_stage() -> None:
    denoiser = Denoiser(4)
    before = dict(denoiser.named_modules())
    apply_stages(denoiser, None, Group("pipeline", 0, (0,), None)).run()
    assert dict(denoiser.named_modules()) == before and "forward" not in vars(denoiser.blocks[0])


class Packed(Tensor):
    """Several tensors that pass for one weight, as quantised ones do: a part of it cannot be let go."""

    packed: Tensor

    @staticmethod
    def __new__(cls, weight: Tensor) -> Packed:
        made: Any = Tensor._make_wrapper_subclass(cls, weight.shape, dtype=weight.dtype, requires_grad=False)
        made.packed = weight
        return cast(Packed, made)

    @classmethod
    def __torch_dispatch__(cls, function: Any, kinds: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function is torch.ops.aten.detach.default:
            return cls(args[0].packed)
        raise NotImplementedError(f"{function} of a packed weight")


@pytest.mark.parametrize("path", ["transformer_blocks.1.attn.to_q", "single_transformer_blocks.0.proj_out"])
def test_weights_that_are_no_plain_tensors_are_refused_before_anything_changes(path: str) -> None:
    flux = zoo.build("flux").transformer
    check_stages(flux, row_of(flux), 2)
    layer = flux.get_submodule(path)
    layer.weight = nn.Parameter(Packed(layer.weight.detach()), requires_grad=False)
    before = [dict(vars(module)) for module in flux.modules()]
    with pytest.raises(ConfigError, match=rf"the weight {path}\.weight is no plain tensor \(Packed\)"):
        check_stages(flux, row_of(flux), 2)
    with pytest.raises(ConfigError, match="no plain tensor"):
        apply_stages(flux, row_of(flux), Group("pipeline", 0, (0, 1), None))
    assert [dict(vars(module)) for module in flux.modules()] == before
