"""What of a call belongs to its batch: cut where it does, and the call left whole where nobody can know."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from diffusers.models.attention_processor import IPAdapterAttnProcessor2_0, PAGCFGIdentitySelfAttnProcessor2_0
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from torch import Tensor

from penstock.config import ParallelConfig
from penstock.distributed.group import Group
from penstock.distributed.guidance.batches import Batch, UnsplittableError, batch_of, mixes_samples
from penstock.distributed.mesh import build_mesh
from penstock.errors import GenerationError
from tests import zoo
from tests.ranks import run_ranks

B = 4
SECOND = Group("cfg", 1, (0, 1), None)


def rows(*shape: int) -> Tensor:
    return torch.arange(float(torch.Size(shape).numel())).reshape(shape)


CUT: dict[str, Any] = {
    "hidden_states": rows(B, 3, 2),
    "timestep": rows(B),
    "img_ids": rows(B, 5, 3),
    "time_ids": rows(B, 6),
    "position_ids": rows(B, 7),
    "attention_mask": rows(B, 3) > 2,
    "img_shapes": [[(1, 2, 2)], [(1, 2, 3)], [(1, 2, 4)], [(1, 2, 5)]],
    "texts": [rows(7, 2), rows(5, 2), rows(6, 2), rows(9, 2)],
}
WHOLE: dict[str, Any] = {
    "guidance": rows(1),
    "fps": torch.tensor(24),
    "img_ids": rows(B, 3),
    "txt_ids": rows(7, 3),
    "position_ids": rows(9, 3),
    "image_rotary_emb": (rows(B, 2), rows(B, 2)),
    "rotary_embedding": (rows(3, 2),) * B,
    "visual_rope_pos": [rows(3), rows(3), rows(3), rows(3)],
    "indices_latents": rows(B),
    "skip_layers": [1, 2, 3, 4],
    "spatio_temporal_guidance_blocks": [1, 2, 3, 4],
    "attention_kwargs": {"scale": 0.5, "mode": None},
    "return_dict": False,
    "dtype": torch.float32,
    "empty": [],
    "nothing": (None,) * B,
    "coordinates": (0, 0),
    "img_shapes": [[(1, 2, 2)], [(1, 2, 2)]],
}
UNKNOWN: dict[str, Any] = {
    "control_hidden_states_scale": rows(B),
    "encoder_hidden_states": rows(2 * B, 3),
    "stacked": (rows(B, 2),) * B,
    "by_sample": [rows(1, 2, 2)] * B,
    "numbers": [1, 2, 3, 4],
    "img_shapes": [(1, 2, 2), (1, 2, 3)],
    "ragged": [rows(5), rows(6)],
    "attention_kwargs": {"cache": object()},
    "kv_cache": object(),
}


def share(value: Any) -> Any:
    """What the second rank of two should get of four samples."""
    return value[2:]


def same(left: Any, right: Any) -> bool:
    if isinstance(left, Tensor):
        return left.dtype == right.dtype and torch.equal(left, right)
    if isinstance(left, (list, tuple)):
        return type(left) is type(right) and len(left) == len(right) and all(map(same, left, right))
    return bool(left == right)


class Frames:
    """A processor from elsewhere, which may look from one sample to another."""


def second() -> Batch:
    batch = batch_of(rows(B, 1), SECOND)
    assert batch is not None
    return batch


@pytest.mark.parametrize("name", CUT)
def test_what_belongs_to_the_batch_is_cut(name: str) -> None:
    assert same(second().cut(name, CUT[name]), share(CUT[name]))


@pytest.mark.parametrize("name", WHOLE)
def test_what_does_not_stays_whole_even_if_it_is_as_long(name: str) -> None:
    assert same(second().cut(name, WHOLE[name]), WHOLE[name])


@pytest.mark.parametrize("name", UNKNOWN)
def test_what_nobody_can_know_is_not_guessed(name: str) -> None:
    with pytest.raises(UnsplittableError, match="cache" if "cache" in str(UNKNOWN[name]) else name):
        second().cut(name, UNKNOWN[name])


def test_layers_of_a_control_net_are_cut_one_by_one() -> None:
    layers = tuple(rows(B, 2) + layer for layer in range(B))
    assert same(second().cut("controlnet_block_samples", layers), tuple(map(share, layers)))
    given = {"text_embeds": rows(B, 2), "image_embeds": [rows(B, 1, 2)]}
    cut = second().cut("added_cond_kwargs", given)
    assert same(cut["text_embeds"], rows(B, 2)[2:])
    assert same(cut["image_embeds"], [rows(B, 1, 2)[2:]])


def test_a_list_of_samples_makes_lists_of_everything() -> None:
    batch = batch_of([rows(3, 2)] * B, SECOND)
    assert batch is not None and batch.is_list
    captions = [rows(1, 2), rows(B, 2), rows(2, 2), rows(3, 2)]
    assert same(batch.cut("cap_feats", captions), captions[2:])
    assert same(batch.cut("t", rows(B)), rows(B)[2:])


@pytest.mark.parametrize(
    "sample", [rows(1, 4), rows(3, 4), torch.tensor(2.0), 4, None, [1, 2], [rows(2), rows(3)], [rows(2)] * 3]
)
def test_what_the_ranks_do_not_divide_is_no_batch(sample: Any) -> None:
    assert batch_of(sample, SECOND) is None


def joined() -> Any:
    group = build_mesh(ParallelConfig(cfg_parallel_size=2), "cpu")["cfg"]
    group.traffic.clear()
    whole = rows(B, 3)
    batch, listed = batch_of(whole, group), batch_of([*whole], group)
    assert batch and listed
    part = whole[batch.start : batch.stop]
    output = batch.join(Transformer2DModelOutput(sample=part), group)
    pair = batch.join((part, part.t().contiguous().t(), None), group)
    (samples,) = listed.join(([*part],), group)
    assert type(output) is Transformer2DModelOutput and type(samples) is list
    assert all(torch.equal(tensor, whole) for tensor in (output.sample, *pair[:2], torch.stack(samples)))
    with pytest.raises(GenerationError, match=r"shape \(7,\) for 2 samples of 4.*--cfg-parallel-size 1"):
        batch.join((part, torch.zeros(7)), group)
    return group.traffic.received_bytes["all_gather"]


def test_outputs_are_put_together_in_order() -> None:
    share_bytes = 2 * 3 * 4
    assert run_ranks(2, joined) == [share_bytes * 5] * 2


@pytest.mark.parametrize(
    ("processor", "mixes"),
    [
        (PAGCFGIdentitySelfAttnProcessor2_0(), True),
        (Frames(), True),
        (IPAdapterAttnProcessor2_0(16, 16), False),
        (None, False),
    ],
)
def test_processors_that_look_at_other_samples(processor: Any, mixes: bool) -> None:
    unet = zoo.build("sd15").unet
    assert not mixes_samples(unet)
    if processor is not None:
        unet.down_blocks[1].attentions[0].transformer_blocks[0].attn1.processor = processor
    assert mixes_samples(unet) is mixes


def test_layers_of_an_encoder_are_cut_behind_the_layers() -> None:
    """As many layers as samples, by accident: each is cut, and the layers stay."""
    share = Batch(B, False, 2, 4)
    stacked = rows(B, B, 3, 2)
    assert torch.equal(share.cut("encoder_hidden_states_llama3", stacked), stacked[:, 2:4])
    layers = [rows(B, 3) + number for number in range(B)]
    for layer, whole in zip(share.cut("text_encoder_layers", layers), layers, strict=True):
        assert torch.equal(layer, whole[2:4])
