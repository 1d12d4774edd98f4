from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from penstock.config import SourceConfig
from penstock.models.folder import open_folder
from penstock.models.skeleton import build_skeleton
from penstock.models.stored import as_stored
from tests import zoo


@pytest.mark.parametrize("name", ["flux", "wan22", "sd15"])
def test_module_takes_the_dtypes_of_its_files_and_every_weight_has_its_record(name: str, tmp_path: Path) -> None:
    skeleton = build_skeleton(open_folder(zoo.folder(name, tmp_path, torch.bfloat16), SourceConfig()), SourceConfig())
    for part in skeleton.classes:
        module, index = getattr(skeleton.pipeline, part), skeleton.indexes[part]
        records = as_stored(module, index)
        for key, tensor in module.named_parameters():
            record = records[id(tensor)]
            assert tensor.is_meta and record.num_bytes == tensor.numel() * tensor.itemsize, key
            assert record.shape == tuple(tensor.shape)


def test_ties_stay_ties(zoo_folder: Callable[[str], Path]) -> None:
    skeleton = build_skeleton(open_folder(zoo_folder("flux"), SourceConfig()), SourceConfig())
    encoder = skeleton.pipeline.text_encoder_2
    as_stored(encoder, skeleton.indexes["text_encoder_2"])
    assert encoder.shared.weight is encoder.encoder.embed_tokens.weight


def test_without_files_there_is_nothing_to_say() -> None:
    module = torch.nn.Linear(2, 2, device="meta")
    before = module.weight
    assert as_stored(module, None) == {} and module.weight is before
