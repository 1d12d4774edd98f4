"""A unit's stand-ins and views: one of each for each weight, tied ones included."""

from __future__ import annotations

import torch

from tests.offload.toys import Pipeline, streamed


def test_tied_weights_stay_one_object() -> None:
    pipeline = Pipeline()
    pipeline.transformer.head.weight = pipeline.transformer.entry.weight
    number = len(list(pipeline.transformer.parameters()))
    with streamed(pipeline):
        for _ in range(2):
            assert pipeline.transformer.head.weight is pipeline.transformer.entry.weight
            assert len(list(pipeline.transformer.parameters())) == number
            pipeline()
    assert pipeline.transformer.head.weight is pipeline.transformer.entry.weight


def test_flags_and_attributes_that_are_set_while_placed_stay() -> None:
    for has_run in (True, False):
        pipeline = Pipeline()
        weight = pipeline.transformer.blocks[0].linear.weight
        with streamed(pipeline):
            if has_run:
                pipeline()
            for parameter in pipeline.transformer.blocks[0].parameters():
                parameter.requires_grad = False
                parameter.mark = 7
            pipeline()
            found = pipeline.transformer.blocks[0].linear.weight
            assert not found.requires_grad and found.mark == 7 and found.stride() == weight.stride()
            assert pipeline.transformer.blocks[1].linear.weight.requires_grad
        assert pipeline.transformer.blocks[0].linear.weight is weight
        assert not weight.requires_grad and weight.mark == 7 and torch.is_tensor(weight)
