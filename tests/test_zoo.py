"""The zoo's pipelines run, depend on what they should, survive a folder, and are as awkward as they say."""

from __future__ import annotations

import functools
import hashlib
import os
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DiffusionPipeline
from PIL import Image
from torch import nn

from tests import processes, zoo
from tests.tolerance import difference, tolerance_of_pipeline
from tests.zoo import tokenizers

WANTED = (
    "flux flux2 flux2_klein qwen_image z_image wan21 wan22 ltx ltx2 hunyuan_video15 sd3 sdxl sana chroma "
    "cogvideox lumina2 stable_audio stranger"
)
DENOISERS = ("transformer", "transformer_2", "unet", "painter")
DIMENSIONS = {"image": (4,), "video": (5,), "audio": (3,), "video+audio": (5, 3)}
HEADS = {
    "flux": "num_attention_heads",
    "flux2": "num_attention_heads",
    "flux2_klein": "num_attention_heads",
    "z_image": "n_heads",
    "sana": "num_attention_heads",
    "wan21": "num_attention_heads",
    "wan22": "num_attention_heads",
    "hunyuan_video15": "num_attention_heads",
    "cogvideox": "num_attention_heads",
    "ltx2": "num_attention_heads",
    "stranger": "heads",
}
CALLS = {
    "flux": [2],
    "flux_img2img": [2],
    "flux2_klein": [4],
    "qwen_image": [4],
    "z_image": [2],
    "chroma": [4],
    "lumina2": [4],
    "sdxl": [2],
    "wan21": [4],
    "wan22": [2, 2],
    "ltx": [2],
    "hunyuan_video15": [4],
    "cogvideox": [2],
}
TOKENS = {"flux": (1, 35, 16), "qwen_image": (2, 15, 16), "stable_audio": (2, 4, 62)}
TIED = {
    "flux": "text_encoder_2",
    "sd3": "text_encoder_3",
    "chroma": "text_encoder",
    "cogvideox": "text_encoder",
}

Tensors = tuple[torch.Tensor, ...]


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """Runs this file on one thread: tensors so small gain nothing from more, and lose much on busy machines."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def built() -> Callable[..., DiffusionPipeline]:
    """Gives each pipeline, built once; tests leave it as it was."""
    return functools.cache(zoo.build)


@pytest.fixture(scope="module")
def plain(built: Callable[..., DiffusionPipeline]) -> Callable[[str], Tensors]:
    """Gives the tensors of each pipeline's run with seed 0."""
    return functools.cache(lambda name: zoo.tensors(zoo.run(built(name), name)))


@pytest.fixture(scope="module")
def load(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., DiffusionPipeline]:
    """Loads a pipeline anew from its folder, saved once for each dtype."""
    root = tmp_path_factory.mktemp("zoo")

    def loaded(name: str, dtype: torch.dtype = torch.float32) -> DiffusionPipeline:
        path = zoo.folder(name, root / str(dtype), dtype)
        known = DiffusionPipeline if name != "stranger" else type(zoo.build(name))
        return known.from_pretrained(path, dtype=dtype)

    return loaded


def modules(pipe: DiffusionPipeline) -> dict[str, nn.Module]:
    """Returns the components that have weights."""
    return {key: part for key, part in pipe.components.items() if isinstance(part, nn.Module)}


def denoisers(pipe: DiffusionPipeline) -> list[nn.Module]:
    """Returns the denoisers of a pipeline."""
    return [part for key, part in modules(pipe).items() if key in DENOISERS]


def blocks(module: nn.Module) -> Iterator[nn.Module]:
    """Yields the blocks in the lists that lie directly in a denoiser, and in lists of lists."""
    for child in module.children():
        if isinstance(child, nn.ModuleList):
            for item in child:
                yield from item if isinstance(item, nn.ModuleList) else (item,)


def equal(left: Tensors, right: Tensors) -> bool:
    """Returns whether two runs gave the same bits."""
    return all(torch.equal(a, b) for a, b in zip(left, right, strict=True))


def digest(pipe: DiffusionPipeline) -> str:
    """Returns a fingerprint of all weights, names and buffers."""
    mark = hashlib.sha256()
    for key, part in modules(pipe).items():
        for name, tensor in (*part.named_parameters(), *part.named_buffers()):
            mark.update(f"{key}.{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
            mark.update(tensor.detach().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return mark.hexdigest()


def heard(pipe: DiffusionPipeline, name: str) -> list[list[dict[str, Any]]]:
    """Runs a pipeline and returns, for each denoiser, the arguments of its calls."""
    log: list[list[dict[str, Any]]] = []
    handles = []
    for module in denoisers(pipe):
        calls: list[dict[str, Any]] = []
        log.append(calls)

        def note(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], calls: Any = calls) -> None:
            calls.append({**dict(enumerate(args)), **kwargs})

        handles.append(module.register_forward_pre_hook(note, with_kwargs=True))
    zoo.run(pipe, name)
    for handle in handles:
        handle.remove()
    return log


def test_names() -> None:
    """All wanted families are there, each with one line on what is awkward in it."""
    assert set(WANTED.split()) <= set(zoo.NAMES) == set(zoo.ENTRIES)
    for name, entry in zoo.ENTRIES.items():
        assert entry.name == name
        assert entry.awkward and "\n" not in entry.awkward
        assert "generator" not in entry.call


@pytest.mark.parametrize("name", zoo.NAMES)
def test_output(name: str, plain: Callable[[str], Tensors]) -> None:
    """A run gives finite tensors of the kind the entry says, and they are not constant."""
    tensors = plain(name)
    assert tuple(tensor.ndim for tensor in tensors) == DIMENSIONS[zoo.ENTRIES[name].output]
    for tensor in tensors:
        assert tensor.isfinite().all()
        assert tensor.float().std() > 0.02 and tensor.abs().max() <= 1


@pytest.mark.parametrize("name", zoo.NAMES)
def test_seed(name: str, built: Callable[..., DiffusionPipeline], plain: Callable[[str], Tensors]) -> None:
    """The seed, and nothing else, decides on the noise."""
    assert equal(plain(name), zoo.tensors(zoo.run(built(name), name)))
    other = zoo.tensors(zoo.run(built(name), name, seed=1))
    assert all((a - b).abs().max() > 0.01 for a, b in zip(plain(name), other, strict=True))


@pytest.mark.parametrize("name", zoo.NAMES)
def test_prompt(name: str, built: Callable[..., DiffusionPipeline], plain: Callable[[str], Tensors]) -> None:
    """Another prompt gives another output."""
    prompt = "two blue boats"
    batched = isinstance(zoo.ENTRIES[name].call["prompt"], list)
    other = zoo.tensors(zoo.run(built(name), name, prompt=[prompt] * 2 if batched else prompt))
    assert all((a - b).abs().max() > 0.005 for a, b in zip(plain(name), other, strict=True))


@pytest.mark.parametrize("name", [name for name in zoo.NAMES if "image" in zoo.ENTRIES[name].call])
def test_picture(name: str, built: Callable[..., DiffusionPipeline], plain: Callable[[str], Tensors]) -> None:
    """Another picture to start from gives another output."""
    picture = Image.new("RGB", zoo.ENTRIES[name].call["image"].size, "red")
    assert not equal(plain(name), zoo.tensors(zoo.run(built(name), name, image=picture)))


@pytest.mark.parametrize("name", zoo.NAMES)
def test_blocks(name: str, built: Callable[..., DiffusionPipeline], plain: Callable[[str], Tensors]) -> None:
    """A change of one weight in any block of any denoiser changes the output."""
    found = [block for module in denoisers(built(name)) for block in blocks(module)]
    assert len(found) >= 3
    for block in found:
        weight = max(block.parameters(), key=torch.numel)
        kept = weight.detach().clone()
        with torch.no_grad():
            weight.mul_(1.5)
            tensors = zoo.tensors(zoo.run(built(name), name))
            weight.copy_(kept)
        assert all((a - b).abs().max() > 1e-4 for a, b in zip(plain(name), tensors, strict=True))


@pytest.mark.parametrize("name", zoo.NAMES)
def test_folder(name: str, load: Callable[..., DiffusionPipeline], plain: Callable[[str], Tensors]) -> None:
    """A saved pipeline comes back with the same weights, bit for bit, and gives the same output but for rounding."""
    pipe = load(name)
    assert digest(pipe) == digest(zoo.build(name))
    assert difference(zoo.tensors(zoo.run(zoo.unmap(pipe), name)), plain(name)) < tolerance_of_pipeline(name)


@pytest.mark.parametrize("name", zoo.NAMES)
def test_half(name: str, load: Callable[..., DiffusionPipeline]) -> None:
    """The same holds in bfloat16, unsaved buffers included."""
    pipe, fresh = load(name, torch.bfloat16), zoo.build(name, torch.bfloat16)
    assert digest(pipe) == digest(fresh)
    tensors = zoo.tensors(zoo.run(fresh, name))
    assert all(tensor.isfinite().all() for tensor in tensors)
    assert equal(tensors, zoo.tensors(zoo.run(zoo.unmap(pipe), name)))


def test_processes() -> None:
    """Another process builds the very same weights, in any order."""
    code = "from tests import zoo, test_zoo\nprint(*(test_zoo.digest(zoo.build(name)) for name in reversed(zoo.NAMES)))"
    done = processes.run(
        [sys.executable, "-c", code],
        cwd=Path(__file__).parents[1],
        env={**os.environ, "PYTHONHASHSEED": "7"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.split() == [digest(zoo.build(name)) for name in reversed(zoo.NAMES)]


def test_random_state() -> None:
    """Building leaves the global random state and the default dtype alone."""
    state = torch.get_rng_state()
    zoo.build("stable_audio", torch.bfloat16)
    assert torch.equal(state, torch.get_rng_state())
    assert torch.get_default_dtype() is torch.float32


def test_folder_is_made_once(tmp_path: Path) -> None:
    """Several callers at a time get one whole folder and leave nothing else; later ones change nothing."""
    with ThreadPoolExecutor(4) as pool:
        paths = set(pool.map(lambda _: zoo.folder("stranger", tmp_path), range(4)))
    assert paths == {tmp_path / "stranger"} == set(tmp_path.iterdir())
    index = tmp_path / "stranger" / "model_index.json"
    before = index.stat()
    zoo.folder("stranger", tmp_path)
    assert index.stat() == before


def test_stranger_is_unknown(tmp_path: Path) -> None:
    """Stock diffusers cannot name the stranger's class."""
    with pytest.raises(AttributeError, match="StrangerPipeline"):
        DiffusionPipeline.from_pretrained(zoo.folder("stranger", tmp_path))


@pytest.mark.parametrize("name", HEADS)
def test_three_heads(name: str, built: Callable[..., DiffusionPipeline]) -> None:
    """These have three attention heads, which no even number of ranks divides."""
    assert {module.config[HEADS[name]] for module in denoisers(built(name))} == {3}


def test_grouped_queries(built: Callable[..., DiffusionPipeline]) -> None:
    """Keys and values have half the heads of the queries."""
    lumina, audio = (denoisers(built(name))[0] for name in ("lumina2", "stable_audio"))
    for attention in (lumina.layers[0].attn, audio.transformer_blocks[0].attn2):
        assert attention.to_q.out_features == 2 * attention.to_k.out_features == 2 * attention.to_v.out_features


@pytest.mark.parametrize("name", TIED)
def test_tied_table(name: str, built: Callable[..., DiffusionPipeline], load: Callable[..., DiffusionPipeline]) -> None:
    """T5's two names of its table are one parameter, also when loaded."""
    for pipe in (built(name), load(name), zoo.unmap(load(name))):
        encoder = pipe.components[TIED[name]]
        assert encoder.shared.weight is encoder.encoder.embed_tokens.weight


def test_tied_head(load: Callable[..., DiffusionPipeline]) -> None:
    """Flux 2 Klein's language model has its head tied to its table, also when loaded."""
    encoder = load("flux2_klein").text_encoder
    assert encoder.lm_head.weight is encoder.model.embed_tokens.weight


@pytest.mark.parametrize("name", ["wan21", "wan22"])
def test_islands(name: str, load: Callable[..., DiffusionPipeline]) -> None:
    """In bfloat16 Wan keeps modulation and time embedding in float32, built or loaded."""
    for pipe in (zoo.build(name, torch.bfloat16), load(name, torch.bfloat16)):
        for module in denoisers(pipe):
            assert module.scale_shift_table.dtype is torch.float32
            assert module.blocks[0].scale_shift_table.dtype is torch.float32
            assert module.condition_embedder.time_embedder.linear_1.weight.dtype is torch.float32
            assert module.blocks[0].ffn.net[2].weight.dtype is torch.bfloat16


def test_buffers(built: Callable[..., DiffusionPipeline]) -> None:
    """Buffers are saved and unsaved, integer, empty, of no dimension."""
    counter = built("flux2").vae.bn.num_batches_tracked
    assert counter.ndim == 0 and counter == 7
    assert "pos_embed.pos_embed" in built("sd3").transformer.state_dict()
    unsaved = {"cogvideox": "patch_embed.pos_embedding", "chroma": "time_text_embed.mod_proj"}
    for name, buffer in unsaved.items():
        transformer = built(name).transformer
        assert buffer in dict(transformer.named_buffers()) and buffer not in transformer.state_dict()
    painter = built("stranger").painter
    assert painter.nothing.numel() == 0 and painter.turns.ndim == 0
    assert {"levels", "turns", "nothing", "anchor"} <= set(painter.state_dict())
    assert "places" not in painter.state_dict()


@pytest.mark.parametrize("name", CALLS)
def test_calls(name: str, built: Callable[..., DiffusionPipeline]) -> None:
    """Two steps call each denoiser this often: guidance makes two calls, or one with a doubled batch."""
    assert [len(calls) for calls in heard(built(name), name)] == CALLS[name]


@pytest.mark.parametrize("name", TOKENS)
def test_odd_tokens(name: str, built: Callable[..., DiffusionPipeline]) -> None:
    """These denoisers see odd numbers of tokens (62 and one for the time in Stable Audio)."""
    call = heard(built(name), name)[0][0]
    assert tuple(call.get("hidden_states", call.get(0)).shape) == TOKENS[name]


def test_padding_mask(built: Callable[..., DiffusionPipeline]) -> None:
    """Qwen-Image's two prompts differ in length, so one of them is padded."""
    mask = heard(built("qwen_image"), "qwen_image")[0][0]["encoder_hidden_states_mask"]
    short, long = sorted(mask.sum(1).tolist())
    assert 0 < short < long == mask.shape[1]


@pytest.mark.parametrize(
    "make", [tokenizers.clip, tokenizers.t5, tokenizers.qwen2, tokenizers.gemma, tokenizers.mistral]
)
def test_tokenizer(make: Callable[[], Any], tmp_path: Path) -> None:
    """Its words are one token each, and any text is encoded alike after a folder."""
    tokenizer = make()
    special = tokenizer.num_special_tokens_to_add()
    for word in tokenizers.WORDS:
        assert len(tokenizer(f" {word}").input_ids) - special <= 1
    tokenizer.save_pretrained(tmp_path)
    text = "A red fox,\nunder 3 moons: \u00e9\u4e2d!"
    assert type(tokenizer).from_pretrained(tmp_path)(text).input_ids == tokenizer(text).input_ids


def test_templates(built: Callable[..., DiffusionPipeline]) -> None:
    """The parts of the templates that pipelines cut off have as many tokens as with the real tokenizers."""
    qwen, hunyuan = built("qwen_image"), built("hunyuan_video15")
    head = qwen.prompt_template_encode.split("{}")[0]
    assert len(qwen.tokenizer(head).input_ids) == qwen.prompt_template_encode_start_idx
    roles = [{"role": "system", "content": hunyuan.system_message}, {"role": "user", "content": "@"}]
    head = hunyuan.tokenizer.apply_chat_template(roles, tokenize=False).split("@")[0]
    assert len(hunyuan.tokenizer(head).input_ids) == hunyuan.prompt_template_encode_start_idx
