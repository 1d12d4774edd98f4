"""Discovery: declared, diffusers' metadata, structure; nested, doubled, wrong and unknown declarations."""

from __future__ import annotations

from typing import Any, ClassVar

import pytest
from torch import nn

from penstock.errors import DeclarationError
from penstock.models.components import Discovery, discover, resolve_path
from tests import zoo
from tests.models.toys import Decoder, Denoiser, Embedder, Pipeline


def names(discovery: Discovery, role: Any) -> list[str]:
    return [component.name for component in discovery.by_role(role)]


class Declared(Pipeline):
    """Declares the three required lists only, and calls its encoder a denoiser to see who is believed."""

    _dit_modules: ClassVar[list[str]] = ["gen_transformer", "mllm"]
    _encoder_modules: ClassVar[list[str]] = []
    _vae_modules: ClassVar[list[str]] = ["decoder"]


class Nested:
    """Two stages: a pipeline inside, and modules of its own."""

    _dit_modules: ClassVar[list[str]] = ["pipe.gen_transformer", "refiner"]
    _encoder_modules: ClassVar[list[str]] = ["pipe.mllm.layers.0"]
    _vae_modules: ClassVar[list[str]] = ["pipe.decoder", "audio_vae"]
    _resident_modules: ClassVar[list[str]] = ["pipe.time_embedder"]

    def __init__(self) -> None:
        self.pipe = Pipeline()
        self.refiner = Denoiser()
        self.audio_vae = Decoder()


def test_structure_alone_finds_roles_whatever_the_names() -> None:
    discovery = discover(Pipeline())
    assert names(discovery, "denoiser") == ["gen_transformer"]
    assert names(discovery, "encoder") == ["mllm"]
    assert names(discovery, "vae") == ["decoder"]
    assert names(discovery, "resident") == ["time_embedder"]
    assert {component.fact.origin for component in discovery.components} == {"structure"}


def test_a_forward_of_the_instance_counts() -> None:
    pipeline, other = Pipeline(), Pipeline()
    discover(other)  # what is known of the class is not what is true of each
    forward = pipeline.gen_transformer.forward
    pipeline.gen_transformer.forward = lambda input_ids: forward(input_ids, 0)
    assert set(names(discover(pipeline), "encoder")) == {"gen_transformer", "mllm"}
    assert names(discover(other), "denoiser") == ["gen_transformer"]


def test_declarations_are_believed_first() -> None:
    discovery = discover(Declared())
    assert names(discovery, "denoiser") == ["gen_transformer", "mllm"]
    assert names(discovery, "resident") == ["time_embedder"]  # undeclared: found all the same
    facts = {component.name: component.fact for component in discovery.components}
    assert facts["mllm"].origin == "declared"
    assert facts["mllm"].detail == "Declared._dit_modules"


def test_dotted_paths_several_denoisers_and_vaes() -> None:
    discovery = discover(Nested())
    assert names(discovery, "denoiser") == ["pipe.gen_transformer", "refiner"]
    assert names(discovery, "encoder") == ["pipe.mllm.layers.0"]
    assert names(discovery, "vae") == ["pipe.decoder", "audio_vae"]
    assert names(discovery, "resident") == ["pipe.time_embedder"]


def test_a_module_counts_once_under_its_first_name() -> None:
    class Twice(Declared):
        _dit_modules: ClassVar[list[str]] = ["gen_transformer", "alias"]

        def __init__(self) -> None:
            super().__init__()
            self.alias = self.gen_transformer

    assert names(discover(Twice()), "denoiser") == ["gen_transformer"]


def test_unknown_path_names_class_and_path() -> None:
    class Wrong(Declared):
        _vae_modules: ClassVar[list[str]] = ["decoder.post.norm"]

    with pytest.raises(DeclarationError, match=r"Wrong declares 'decoder\.post\.norm', but decoder .* has no 'post'"):
        discover(Wrong())


def test_declared_object_that_is_no_module_is_skipped_with_a_warning() -> None:
    class Odd(Declared):
        _vae_modules: ClassVar[list[str]] = ["decoder", "name"]

    with pytest.warns(UserWarning, match=r"Odd\._vae_modules names 'name', a str and no module: skipped"):
        discovery = discover(Odd())
    assert names(discovery, "vae") == ["decoder"]
    assert len(discovery.notes) == 1


def test_nested_pipelines_are_entered_without_declarations() -> None:
    inner = zoo.build("flux")

    class TwoStage:
        def __init__(self) -> None:
            self.pipe = inner
            self.upsampler = Embedder()

    discovery = discover(TwoStage())
    assert names(discovery, "denoiser") == ["pipe.transformer"]
    assert names(discovery, "vae") == ["pipe.vae"]
    assert names(discovery, "encoder") == ["pipe.text_encoder", "pipe.text_encoder_2"]
    assert names(discovery, "resident") == ["upsampler"]


@pytest.mark.parametrize(
    ("name", "denoisers", "vaes"),
    [
        ("flux", ["transformer"], ["vae"]),
        ("wan22", ["transformer", "transformer_2"], ["vae"]),
        ("ltx2", ["transformer"], ["vae", "audio_vae", "vocoder"]),
        ("sdxl", ["unet"], ["vae"]),
        ("stable_audio", ["transformer"], ["vae"]),
        ("stranger", ["painter"], []),
    ],
)
def test_stock_pipelines(name: str, denoisers: list[str], vaes: list[str]) -> None:
    discovery = discover(zoo.build(name))
    assert names(discovery, "denoiser") == denoisers
    assert names(discovery, "vae") == vaes


def test_order_of_diffusers_offload_tells_encoders_from_decoders() -> None:
    facts = {component.name: component for component in discover(zoo.build("ltx2")).components}
    assert facts["connectors"].role == "encoder"
    assert facts["vocoder"].role == "vae"
    assert facts["vocoder"].fact.detail == "LTX2Pipeline.model_cpu_offload_seq"


def test_unregistered_modules_and_cycles() -> None:
    pipeline = zoo.build("flux")
    pipeline.extra = Embedder()
    pipeline._private = Embedder()

    class Outer:
        def __init__(self) -> None:
            self.pipe = pipeline
            self.components = {"pipe": pipeline}
            self.me = self

    found = names(discover(Outer()), "resident")
    assert found == ["pipe.extra", "pipe._private"]


@pytest.mark.parametrize("paths", ["gen_transformer", [3], {"a": 1}])
def test_declaration_that_is_no_list_of_paths(paths: Any) -> None:
    class Wrong(Declared):
        _dit_modules = paths

    with pytest.raises(DeclarationError, match=r"Wrong\._dit_modules is .* not a list of attribute paths"):
        discover(Wrong())


def test_absent_optional_component_is_skipped_in_silence() -> None:
    class Optional(Declared):
        _encoder_modules: ClassVar[list[str]] = ["image_encoder"]
        image_encoder = None

    assert names(discover(Optional()), "encoder") == []


@pytest.mark.parametrize("name", zoo.NAMES)
def test_every_module_of_every_pipeline_is_found_once(name: str) -> None:
    pipeline = zoo.build(name)
    modules = {id(part) for part in pipeline.components.values() if isinstance(part, nn.Module)}
    discovery = discover(pipeline)
    found = [id(component.module) for component in discovery.components]
    assert sorted(found) == sorted(modules)
    assert discovery.by_role("denoiser")


@pytest.mark.parametrize(("path", "expected"), [("blocks.1", 1), ("blocks.-1", None), ("blocks.9", None)])
def test_paths_into_lists(path: str, expected: int | None) -> None:
    denoiser = Denoiser()
    if expected is None:
        with pytest.raises(DeclarationError):
            resolve_path(denoiser, path)
    else:
        assert resolve_path(denoiser, path) is denoiser.blocks[expected]
