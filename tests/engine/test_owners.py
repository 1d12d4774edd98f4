"""Who owns the modules of placed pipelines."""

from __future__ import annotations

import copy
import gc
import pickle
import weakref
from typing import Any

import pytest
import torch
from diffusers import FluxImg2ImgPipeline, FluxPipeline
from torch import nn

import penstock
from penstock.config import ParallelConfig
from penstock.engine.owners import disown, own, owner_of
from penstock.errors import ConfigError
from tests import zoo
from tests.ranks import run_ranks


class Holder:
    """Holds a module."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module


class Owner:
    """Owns something."""


def test_an_owner_is_found_and_lives_as_long_as_what_it_owns() -> None:
    holder, owner = Holder(nn.Sequential(nn.Linear(1, 1))), Owner()
    assert owner_of(holder) is None
    own(holder, owner)
    alive = weakref.ref(owner)
    del owner
    gc.collect()
    found = owner_of(Holder(holder.module[0]))  # type: ignore[index]
    assert found is not None and found[0].name == "module" and found[1] is alive()
    for twin in (copy.deepcopy(holder.module), pickle.loads(pickle.dumps(holder.module))):
        assert owner_of(Holder(twin)) is None
    del found, holder
    gc.collect()
    assert alive() is None


def test_what_is_disowned_is_free() -> None:
    holder, owner = Holder(nn.Linear(1, 1)), Owner()
    names = set(vars(holder.module))
    own(holder, owner)
    disown(owner)
    assert owner_of(holder) is None and set(vars(holder.module)) == names


@pytest.mark.parametrize("options", [{}, {"share_blocks": True}])
def test_a_pipeline_in_place_of_the_first_leads_to_what_is_placed(options: dict[str, Any]) -> None:
    pipeline: Any = zoo.build("flux")
    modules = list(pipeline.transformer.modules())
    before = [set(vars(module)) for module in modules]
    classes = {name: type(part) for name, part in {"": pipeline, **pipeline.components}.items()}
    penstock.apply(pipeline, offload="layerwise", max_weight_memory="least", **options)
    assert {name: type(part) for name, part in {"": pipeline, **pipeline.components}.items()} == classes
    pipeline = FluxImg2ImgPipeline.from_pipe(pipeline)
    gc.collect()
    placed = penstock.placed_on(pipeline)
    assert placed is not None and placed.report().plan.offload == "layerwise"
    with pytest.raises(ConfigError, match=r"call penstock\.placed_on\(pipeline\)\.remove\(\) first"):
        penstock.apply(pipeline, offload="layerwise")
    placed.remove()
    assert penstock.placed_on(pipeline) is None
    assert [set(vars(module)) for module in modules] == before
    penstock.apply(pipeline, offload="layerwise").remove()


def over_ranks(degrees: dict[str, int]) -> bool:
    pipeline: Any = zoo.build("flux")
    stock = {name: type(part) for name, part in pipeline.components.items()}
    parallel = ParallelConfig(**degrees)
    placed = penstock.apply(pipeline, parallel=parallel, device="cpu", offload="none")
    mine = {name: type(part) for name, part in pipeline.components.items()}
    names = set(vars(pipeline.transformer))
    placed.remove()
    penstock.apply(pipeline, parallel=parallel, device="cpu", offload="none")
    other: Any = FluxImg2ImgPipeline.from_pipe(pipeline)
    del pipeline, placed
    gc.collect()
    found = penstock.placed_on(other)
    assert found is not None
    found.remove()
    back = FluxPipeline.from_pipe(other)
    with torch.no_grad():
        zoo.run(back, "flux", num_inference_steps=1)
    return (
        stock == mine
        and "_penstock_keeper" in names
        and not {name for name in vars(other.transformer) if "penstock" in name}
    )


@pytest.mark.parametrize("degrees", [{"cfg_parallel_size": 2}, {"ulysses_degree": 2}])
def test_a_pipeline_over_ranks_lives_on_in_another(degrees: dict[str, int]) -> None:
    assert run_ranks(2, over_ranks, degrees, timeout_s=60) == [True, True]
