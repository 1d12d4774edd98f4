"""A loaded pipeline makes what stock diffusers makes, bit for bit, for every family of the zoo."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from diffusers import DiffusionPipeline

import penstock
from penstock.engine.parity import compare, damaged_weight, record
from tests import zoo
from tests.turns import by_turns
from tests.zoo.stranger import StrangerPipeline


@pytest.mark.parametrize("name", by_turns([name for name in zoo.NAMES if name != "stranger"], 4, 2))
def test_load_is_bit_identical_and_damage_is_noticed(name: str, zoo_folder: Callable[[str], Path]) -> None:
    call = dict(zoo.ENTRIES[name].call)
    folder = zoo_folder(name)
    reference = record(DiffusionPipeline.from_pretrained(folder), call, 0)
    pipeline = penstock.load(folder)
    assert reference
    assert all(difference.is_within(0) for difference in compare(reference, record(pipeline, call, 0)))
    with damaged_weight(pipeline):
        control = compare(reference, record(pipeline, call, 0))
    assert not any(difference.is_within(1e-6) for difference in control)


def test_pipeline_that_nobody_knows(zoo_folder: Callable[[str], Path], tmp_path: Path) -> None:
    """Its class is code in the folder: trusted, it loads and gives the same picture."""
    folder = Path(shutil.copytree(zoo_folder("stranger"), tmp_path / "stranger"))
    index = json.loads((folder / "model_index.json").read_text())
    index["_class_name"] = ["unheard_of", "StrangerPipeline"]
    (folder / "model_index.json").write_text(json.dumps(index))
    (folder / "unheard_of.py").write_text("from tests.zoo.stranger import StrangerPipeline\n")
    call = dict(zoo.ENTRIES["stranger"].call)
    reference = record(StrangerPipeline.from_pretrained(zoo_folder("stranger")), call, 0)
    pipeline = penstock.load(folder, trust_remote_code=True)
    assert all(difference.is_within(0) for difference in compare(reference, record(pipeline, call, 0)))
