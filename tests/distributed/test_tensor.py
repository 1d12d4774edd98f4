"""A denoiser cut for several ranks gives what it gave whole, holds less, sends what it says, and comes back."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from diffusers import LTXVideoTransformer3DModel
from peft import LoraConfig
from torch import Tensor, nn

import penstock
from penstock.config import ParallelConfig
from penstock.distributed.group import Group
from penstock.distributed.mesh import build_mesh
from penstock.distributed.tensor import apply_tensor, check_tensor
from penstock.errors import ConfigError
from penstock.models.rows.tensor import PLANS, tensor_plan_of
from penstock.weights.maps import MappedFiles
from tests import zoo
from tests.distributed.cuts import Silent, alone, state
from tests.ranks import run_ranks
from tests.tolerance import difference, tolerance_of, tolerance_of_pipeline
from tests.zoo import denoisers
from tests.zoo.denoisers import Case, others

CASES: dict[str, Case] = {**denoisers.CASES, **{case.name: case for case in others.CASES if case.name == "mochi"}}
MAIN = ("flux", "flux2", "qwen_image", "sd3", "wan", "hunyuan_video", "ltx", "ltx2", "z_image", "lumina2")
"""Families that four ranks are tried with."""
HEADS = {"lumina2": 8, "mochi": 12, "z_image": 12}  # whose keys and values, or widths, four ranks can share
EXACT = ("kandinsky5",)  # rounds to bfloat16 on its way: in float64 no difference between ranks reaches a rounding edge
WHOLE = re.compile(r"norm|modulat|adaLN|img_mod|txt_mod|proj_in|(blocks|vace_blocks)\.\d+\.proj_out")
"""Matrices of blocks that stay whole: of modulations, and what a VACE block gives to the main stack."""


def meta(name: str, heads: int | None = None) -> nn.Module:
    return CASES[name].build(heads or HEADS.get(name, 4)).to("meta")


CLASSES = {name: meta(name) for name in CASES}
"""One denoiser of each case, without weights."""
SUPPORTED = [name for name, denoiser in CLASSES.items() if tensor_plan_of(denoiser) is not None]
REFUSED = [name for name in CASES if name not in SUPPORTED]


def tensor_group(size: int) -> Group:
    return build_mesh(ParallelConfig(tensor_parallel_size=size), "cpu")["tensor"]


def tensors(output: Any) -> list[Tensor]:
    return [output] if isinstance(output, Tensor) else [tensor for part in output for tensor in tensors(part)]


def doubled(value: Any) -> Any:
    return value.double() if isinstance(value, Tensor) and value.is_floating_point() else value


@dataclass
class Subject:
    """A case, ready to run."""

    name: str
    denoiser: nn.Module = field(init=False)

    def __post_init__(self) -> None:
        self.denoiser = CASES[self.name].build(HEADS.get(self.name, 4))
        if self.name in EXACT:
            self.denoiser.double()
            for layer in self.denoiser.modules():
                if isinstance(layer, nn.Linear):
                    layer.register_forward_pre_hook(lambda layer, args: (args[0].double(),))

    def run(self, size: str) -> list[Tensor]:
        given = CASES[self.name].inputs(size)
        if self.name in EXACT:
            given = {key: doubled(value) for key, value in given.items()}
        with torch.inference_mode():
            return [tensor.clone() for tensor in tensors(self.denoiser(**given))]


def expect_traffic(denoiser: nn.Module, shapes: dict[str, torch.Size], size: int) -> list[int]:
    """Note the bytes that each layer with fewer inputs, and each narrower norm, must exchange when it runs."""
    expected: list[int] = []

    def after(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
        summed = output.nbytes if isinstance(module, nn.Linear) else args[0][..., 0].numel() * 4
        expected.append(2 * summed * (size - 1) // size)

    for path, module in denoiser.named_modules():
        shape = shapes.get(f"{path}.weight")
        is_narrower = isinstance(module, nn.Linear) and shape and module.in_features < shape[1]
        if is_narrower or (isinstance(module, nn.RMSNorm) and shape and module.weight.shape != shape):
            module.register_forward_hook(after)
    return expected


def measure(name: str, size: int) -> dict[str, Any]:
    """Cut a case, run it, and put it back: what all the tests of parity look at."""
    subject, group = Subject(name), tensor_group(size)
    variants = CASES[name].variants
    denoiser, sizes = subject.denoiser, dict.fromkeys((variants[0], variants[-1])) if size == 2 else variants[-1:]
    before, plain = state(denoiser), [subject.run(variant) for variant in sizes]
    allowed = [
        tolerance_of(denoiser, lambda size=size: subject.run(size), made)
        for size, made in zip(sizes, plain, strict=True)
    ]
    weights = {key: value.clone() for key, value in denoiser.named_parameters()}
    undo = apply_tensor(denoiser, group)
    cut = {key: value.shape for key, value in denoiser.named_parameters() if value.shape != weights[key].shape}
    whole = [
        key
        for key, value in denoiser.named_parameters()
        if value.ndim == 2
        and key.endswith(".weight")
        and key not in cut
        and key.startswith(CASES[name].stacks)
        and not WHOLE.search(key)
    ]
    group.traffic.clear()
    results = [subject.run(variant) for variant in sizes]
    calls, received = group.traffic.num_calls["all_reduce"], group.traffic.received_bytes["all_reduce"]
    expected = expect_traffic(denoiser, {key: value.shape for key, value in weights.items()}, size)
    for variant in sizes:  # once more, with hooks that count
        subject.run(variant)
    for module in denoiser.modules():
        module._forward_hooks.clear()
    undo.run()
    return {
        "share": max(difference(*pair) / most for *pair, most in zip(results, plain, allowed, strict=True)),
        "results": results[-1],
        "shares": {weights[key].numel() / shape.numel() for key, shape in cut.items()},
        "forgotten": whole,
        "traffic": (calls, received, set(group.traffic.num_calls) - {"all_reduce", "all_gather"}),
        "expected": (len(expected), sum(expected), set()),
        "is_restored": state(denoiser) == before
        and all(torch.equal(value, weights[key]) for key, value in denoiser.named_parameters()),
    }


@pytest.mark.parametrize(("name", "size"), [*((name, 2) for name in SUPPORTED), *((name, 4) for name in MAIN)])
def test_every_rank_gives_what_one_gave(name: str, size: int) -> None:
    ranks = run_ranks(size, measure, name, size)
    for found in ranks:
        assert found["share"] < 1  # of what is allowed
        assert all(map(torch.equal, found["results"], ranks[0]["results"]))
        assert found["shares"] == {size}
        assert found["forgotten"] == []
        assert found["traffic"] == found["expected"]
        assert found["expected"][0] > 0
        assert found["is_restored"]


def unsummed(name: str) -> float:
    subject, group = Subject(name), tensor_group(2)
    plain = subject.run("odd")
    allowed = tolerance_of(subject.denoiser, lambda: subject.run("odd"), plain)
    apply_tensor(subject.denoiser, Silent(group.name, group.rank, group.ranks, group.process_group))
    return difference(subject.run("odd"), plain) / allowed


@pytest.mark.parametrize("name", ["flux", "wan", "ltx2"])
def test_without_the_sum_the_result_is_another(name: str) -> None:
    assert min(run_ranks(2, unsummed, name)) > 100  # times what is allowed


def test_every_class_of_the_table_is_proven() -> None:
    proven = {type(CLASSES[name]).__name__ for name in SUPPORTED}
    assert set(PLANS) <= proven
    declared = {type(denoiser).__name__ for denoiser in CLASSES.values() if getattr(denoiser, "_tp_plan", None)}
    assert declared >= {"FluxTransformer2DModel", "Flux2Transformer2DModel", "QwenImageTransformer2DModel"}


def half_precision() -> tuple[float, torch.dtype]:
    subject = Subject("wan")
    subject.denoiser.bfloat16()
    given = {key: value.bfloat16() for key, value in CASES["wan"].inputs("odd").items() if isinstance(value, Tensor)}
    with torch.inference_mode():
        plain = subject.denoiser(**given, return_dict=False)
        allowed = tolerance_of(subject.denoiser, lambda: subject.denoiser(**given, return_dict=False), plain)
        apply_tensor(subject.denoiser, tensor_group(2))
        cut = subject.denoiser(**given, return_dict=False)
    return difference(cut, plain) / allowed, cut[0].dtype


def test_half_precision_stays_half_precision() -> None:
    for share, dtype in run_ranks(2, half_precision):
        assert dtype == torch.bfloat16
        assert share < 1


def test_weights_in_memory_are_let_go() -> None:
    denoiser = CASES["wan"].build()
    whole = sum(value.nbytes for value in denoiser.blocks.parameters())
    apply_tensor(denoiser, alone())
    held = {value.untyped_storage().data_ptr(): value.untyped_storage().nbytes() for value in denoiser.parameters()}
    assert sum(held.values()) == sum(value.nbytes for value in denoiser.parameters())
    assert sum(value.nbytes for value in denoiser.blocks.parameters()) < 0.52 * whole


def mapped() -> Callable[[Tensor], bool]:
    files = MappedFiles()
    return lambda weight: files.locate(weight.data_ptr(), weight.nbytes, weight.dtype) is not None


def test_weights_of_files_stay_where_they_are(tmp_path: Path) -> None:
    path = zoo.folder("ltx", tmp_path)
    denoiser: Any = LTXVideoTransformer3DModel.from_pretrained(path, subfolder="transformer")
    is_mapped, files = mapped(), MappedFiles()
    places = {key: value.data_ptr() for key, value in denoiser.named_parameters()}
    undo = apply_tensor(denoiser, alone(), is_mapped)
    attention = denoiser.transformer_blocks[0].attn1
    query, out = attention.to_q.weight, attention.to_out[0].weight
    assert query.data_ptr() == places["transformer_blocks.0.attn1.to_q.weight"] + query.nbytes
    assert files.locate(query.data_ptr(), query.nbytes, query.dtype) is not None
    assert files.locate(out.data_ptr(), out.nbytes, out.dtype) is None
    assert out.is_contiguous() and out.untyped_storage().nbytes() == out.nbytes
    undo.run()
    assert {key: value.data_ptr() for key, value in denoiser.named_parameters()} == places


def test_weights_may_come_later() -> None:
    denoiser = meta("flux2")
    shapes = {key: value.shape for key, value in denoiser.named_parameters()}
    undo = apply_tensor(denoiser, alone())
    assert denoiser.transformer_blocks[0].attn.to_q.weight.shape == (32, 64)
    assert denoiser.single_transformer_blocks[0].attn.to_out.weight.device.type == "meta"
    undo.run()
    assert {key: value.shape for key, value in denoiser.named_parameters()} == shapes


def test_one_rank_changes_nothing() -> None:
    denoiser = meta("flux")
    before = state(denoiser)
    undo = apply_tensor(denoiser, alone(rank=0, size=1))
    assert state(denoiser) == before
    undo.run()


def stream(name: str, folder: str) -> dict[str, Any]:
    """Run a pipeline whole, then cut and streamed, then put back."""
    group, built = tensor_group(2), zoo.build(name)
    pipe = type(built).from_pretrained(zoo.folder(name, folder), dtype=torch.float32) if folder else built
    plain = list(zoo.tensors(zoo.run(pipe, name)))
    options: dict[str, Any] = {"offload": "layerwise", "max_weight_memory": "least"}
    with penstock.apply(pipe, **options, parallel=ParallelConfig(data_parallel_size=2)) as whole:
        whole_bytes = whole.report().plan.weight_bytes
    placed = penstock.apply(pipe, **options, parallel=ParallelConfig(tensor_parallel_size=2))
    group.traffic.clear()
    streamed = list(zoo.tensors(zoo.run(pipe, name)))
    calls = group.traffic.num_calls["all_reduce"]
    report = placed.report()
    placed.remove()
    back = list(zoo.tensors(zoo.run(pipe, name)))
    return {
        "share": difference(streamed, plain) / tolerance_of_pipeline(name),
        "calls": calls,
        "is_least": report.peak_bytes <= report.plan.promised_bytes < report.plan.weight_bytes,
        "is_less": report.plan.weight_bytes < whole_bytes,
        "is_back": all(map(torch.equal, plain, back)),
    }


@pytest.mark.parametrize("name", ["ltx", "qwen_image", "sd3"])
@pytest.mark.parametrize("is_loaded", [False, True], ids=["built", "loaded"])
def test_slices_stream(name: str, is_loaded: bool, tmp_path: Path) -> None:
    if is_loaded:
        zoo.folder(name, tmp_path)
    for found in run_ranks(2, stream, name, str(tmp_path) if is_loaded else ""):
        assert found["share"] < 1
        assert found["calls"] > 0
        assert found["is_least"]
        assert found["is_less"]
        assert found["is_back"]


@pytest.mark.parametrize("name", REFUSED)
def test_a_class_without_a_plan_is_refused(name: str) -> None:
    kind = type(CLASSES[name]).__name__
    with pytest.raises(ConfigError, match=rf"tensor\(2\) cannot cut {kind}: .*`_tp_plan`.*WanTransformer3DModel"):
        check_tensor(CLASSES[name], 2)
    check_tensor(CLASSES[name], 1)


@pytest.mark.parametrize("name", [name for name in SUPPORTED])
def test_heads_that_do_not_divide_are_named(name: str) -> None:
    denoiser = meta(name, heads=3)
    with pytest.raises(ConfigError, match=r"tensor\(2\) does not divide heads of \S+ \(3\)") as caught:
        check_tensor(denoiser, 2)
    (nearest,) = re.findall(r"Try --tensor-parallel-size (\d+)\.", str(caught.value))
    check_tensor(denoiser, int(nearest))


def test_heads_of_keys_and_values_count() -> None:
    expected = r"tensor\(8\) does not divide heads of keys and values of \S+ \(4\).*size 4\."
    with pytest.raises(ConfigError, match=expected):
        check_tensor(meta("lumina2", heads=8), 8)


def test_widths_count() -> None:
    denoiser = meta("wan")
    denoiser.blocks[1].ffn.net[0].proj = nn.Linear(64, 66, device="meta")
    denoiser.blocks[1].ffn.net[2] = nn.Linear(66, 64, device="meta")
    with pytest.raises(ConfigError, match=r"width of blocks\.1\.ffn\.net\.0\.proj \(66\).*size 2\."):
        check_tensor(denoiser, 4)


def test_a_refusal_changes_nothing() -> None:
    denoiser = meta("flux", heads=3)
    before = state(denoiser)
    with pytest.raises(ConfigError):
        apply_tensor(denoiser, alone())
    assert state(denoiser) == before


def with_adapter(denoiser: Any) -> None:
    denoiser.add_adapter(LoraConfig(r=2, target_modules=["to_q"]))


def with_fused_projections(denoiser: Any) -> None:
    denoiser.fuse_qkv_projections()


def with_image_prompt(denoiser: Any) -> None:
    denoiser.transformer_blocks[0].attn.processor = nn.Linear(2, 2)


def with_eight_bits(denoiser: Any) -> None:
    layer = denoiser.transformer_blocks[0].ff.net[2]
    layer.weight = nn.Parameter(layer.weight.to(torch.float8_e4m3fn), requires_grad=False)


def with_another_layer(denoiser: Any) -> None:
    denoiser.transformer_blocks[0].attn.to_k = nn.Bilinear(64, 64, 64)


def with_casting(denoiser: Any) -> None:
    denoiser.enable_layerwise_casting(torch.float8_e4m3fn, torch.bfloat16)


def with_tied_weights(denoiser: Any) -> None:
    denoiser.transformer_blocks[1].attn.to_q.weight = denoiser.transformer_blocks[0].attn.to_q.weight


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (with_adapter, r"attn\.to_q: it carries an adapter \(LoRA\).*fuse_lora"),
        (with_fused_projections, r"projections beside it are fused.*unfuse_qkv_projections"),
        (with_image_prompt, r"transformer_blocks\.0\.attn\.to_q: .*IP-Adapter.*unload_ip_adapter"),
        (with_eight_bits, r"ff\.net\.2: its weight is no plain tensor \(Tensor of float8_e4m3fn\)"),
        (with_another_layer, r"attn\.to_k: it is a Bilinear, no Linear"),
        (with_casting, r"its forward was replaced.*layerwise casting"),
        (with_tied_weights, r"attn\.to_q: it shares its weight with another layer"),
    ],
)
def test_layers_that_are_not_plain_are_refused(change: Callable[[Any], None], expected: str) -> None:
    denoiser = CASES["flux"].build()
    check_tensor(denoiser, 2)
    change(denoiser)
    with pytest.raises(ConfigError, match=expected):
        check_tensor(denoiser, 2)


def test_a_plan_that_names_nothing_is_refused() -> None:
    denoiser: Any = nn.Module()
    denoiser._tp_plan = {"layers.*.up": "colwise"}
    denoiser.config = SimpleNamespace()
    with pytest.raises(ConfigError, match="would cut nothing of Module"):
        check_tensor(denoiser, 2)
    apply_tensor(denoiser, alone()).run()  # the blocks may be on the ranks of another stage
