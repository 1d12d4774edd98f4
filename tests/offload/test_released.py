"""Weights that memory alone had: gone while shards of them stream, back to the last bit in the end."""

from __future__ import annotations

import gc
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from penstock.errors import UsageError
from penstock.offload.released import is_in_memory
from penstock.weights.ranges import PAGE_BYTES
from tests.offload.toys import Pipeline, streamed
from tests.weights.test_maps import private_bytes


class Alone:
    """The only one of the ranks that hold weights together."""

    rank = 0
    size = 1

    def all_gather_into(self, whole: torch.Tensor, own: torch.Tensor, is_async: bool = False) -> None:
        if whole.data_ptr() != own.data_ptr():
            whole.copy_(own)


def live_bytes() -> int:
    """Bytes of all tensors' memory in this process, each once."""
    gc.collect()
    found: dict[int, int] = {}
    for item in gc.get_objects():
        if type(item) in (torch.Tensor, torch.nn.Parameter):
            storage = item.untyped_storage()
            found[storage.data_ptr()] = storage.nbytes()
    return sum(found.values())


@pytest.mark.parametrize("is_checked", [False, True])
def test_whole_weights_are_gone_while_shards_stream(is_checked: bool) -> None:
    pipeline = Pipeline()
    wanted = pipeline()
    originals = [(name, weight, weight.clone()) for name, weight in pipeline.transformer.named_parameters()]
    whole = sum(weight.nbytes for _, weight, _ in originals)
    with streamed(pipeline, sharers=Alone(), is_checked=is_checked) as streamer:
        assert all(weight.numel() == 0 for _, weight, _ in originals)
        assert not any(is_in_memory(tenant.unit) for tenant in streamer.tenants)
        assert streamer.host_bytes >= whole
        assert torch.equal(pipeline(), wanted)
    for name, weight, copy in originals:
        assert pipeline.transformer.get_parameter(name) is weight
        assert torch.equal(weight, copy)
    assert torch.equal(pipeline(), wanted)


def test_memory_is_really_free() -> None:
    pipeline = Pipeline(num_blocks=64)
    before = live_bytes()
    whole = sum(weight.nbytes for weight in pipeline.transformer.parameters())
    with streamed(pipeline, sharers=Alone()) as streamer:
        pinned = streamer.host_bytes + streamer.plan.arena_bytes
        assert live_bytes() - before <= pinned - whole + 4096
    with streamed(pipeline) as streamer:  # nothing is shared: the originals stay, as the measure must see
        assert live_bytes() - before > streamer.plan.arena_bytes - 4096


def test_weights_that_share_memory_do_so_again() -> None:
    pipeline = Pipeline()
    blocks: Any = pipeline.transformer.blocks
    room = torch.randn(2, 16, 16)
    blocks[0].linear.weight = torch.nn.Parameter(room[0].t())
    pipeline.transformer.head.weight = pipeline.transformer.entry.weight
    wanted, strides = pipeline(), blocks[0].linear.weight.stride()
    with streamed(pipeline, sharers=Alone()):
        assert torch.equal(pipeline(), wanted)
    assert pipeline.transformer.head.weight is pipeline.transformer.entry.weight
    assert blocks[0].linear.weight.stride() == strides
    assert torch.equal(blocks[0].linear.weight, room[0].t())


def test_its_state_is_nobodys_alone() -> None:
    pipeline = Pipeline()
    with streamed(pipeline, sharers=Alone()), pytest.raises(UsageError, match=r"sharded over ranks.*call remove"):
        pipeline.transformer.state_dict()
    assert pipeline.transformer.state_dict()["entry.weight"].numel()


@pytest.mark.parametrize("is_made_so", [True, False])
@pytest.mark.parametrize("is_placed_so", [True, False])
def test_what_was_made_or_placed_in_inference_mode_is_afterwards_what_it_was(
    is_made_so: bool, is_placed_so: bool
) -> None:
    with torch.inference_mode(is_made_so):
        pipeline = Pipeline()
    wanted = Pipeline()()
    with torch.inference_mode(is_placed_so), streamed(pipeline, sharers=Alone()):
        assert torch.equal(pipeline(), wanted)
    for weight in pipeline.transformer.parameters():
        assert weight.is_inference() == weight.data.is_inference() == is_made_so
    assert torch.equal(pipeline(), wanted)
    with torch.inference_mode(is_made_so), torch.no_grad():
        pipeline.transformer.head.weight.mul_(0)
    assert not torch.equal(pipeline(), wanted)


def test_changed_pages_of_a_mapped_file_are_given_back(tmp_path: Path) -> None:
    pipeline, file = Pipeline(), tmp_path / "1.safetensors"
    save_file({"table": torch.arange(50_000.0), "other": torch.ones(3)}, file)
    mapped = load_file(file)  # as a whole, as long as anybody has any of it
    pipeline.transformer.table = torch.nn.Parameter(mapped.pop("table"), requires_grad=False)
    pipeline.transformer.table += 1
    assert private_bytes(file) >= 200_000
    with streamed(pipeline, sharers=Alone()):
        assert private_bytes(file) <= 2 * PAGE_BYTES
    assert torch.equal(pipeline.transformer.table, torch.arange(50_000.0) + 1)
    assert torch.equal(mapped["other"], torch.ones(3))
