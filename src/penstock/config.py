"""What a user may ask for when a model is loaded: frozen, keyword-only, range-checked.

Owns the names, defaults and help texts of the options; the command line derives its flags from them.
Does not know torch, files, or how an option is carried out.
"""

from __future__ import annotations

import difflib
import math
import re
from dataclasses import dataclass, field, fields, replace
from typing import Any, Self, TypeVar

from penstock.bytesize import parse_bytes
from penstock.errors import ConfigError

T = TypeVar("T")

DTYPES = {
    "float32": "float32",
    "fp32": "float32",
    "bfloat16": "bfloat16",
    "bf16": "bfloat16",
    "float16": "float16",
    "fp16": "float16",
}
"""Accepted spellings of a dtype, and the name torch gives it."""

VAE_MODES = ("patch", "tile")
OFFLOADS = ("auto", "none", "sequential", "layerwise", "sharded")
LEAST = "least"
ALL_RANKS = -1
MAX_PREFETCH = 64

_SPELLINGS = {"enable_cpu_offload": "sequential", "enable_layerwise_offload": "layerwise"}
_DEVICE = re.compile(r"auto|cpu(:0)?|mps(:0)?|cuda(:\d+)?")


def option(default: Any, help_text: str, metavar: str | None = None) -> Any:
    """A dataclass field that is an option of the command line as well."""
    return field(default=default, metadata={"help": help_text, "metavar": metavar})


@dataclass(frozen=True, kw_only=True)
class SourceConfig:
    """Which files of a model are meant; enough to look at it without loading weights."""

    variant: str | None = option(None, "Weight variant of the folder, such as fp16.", "NAME")
    revision: str | None = option(None, "Branch, tag or commit of a hub model.", "NAME")
    trust_remote_code: bool = option(False, "Run Python code that a model folder or hub id brings along.")

    @classmethod
    def of(cls, **options: Any) -> Self:
        """Build a config from keyword options, with an error that names a misspelt one.

        Raises:
            ConfigError: for an unknown option or a value out of range.
        """
        return config_of(cls, **options)

    def __post_init__(self) -> None:
        for name in ("variant", "revision"):
            value = getattr(self, name)
            if value is not None and not (isinstance(value, str) and value):
                raise ConfigError(f"{name}={value!r} is no name. Give one, or leave it out.")


@dataclass(frozen=True, kw_only=True)
class OffloadConfig:
    """Where a pipeline runs, and how much of the device its weights may take.

    Raises:
        ConfigError: for a value that no machine can honour, and for options that contradict each other.
    """

    device: str = option("auto", "cuda, cuda:N, mps or cpu; auto takes the first that this machine has.", "NAME")
    offload: str = option(
        "auto",
        "none: all weights on the device; sequential: components take turns; layerwise: blocks stream through slots; "
        "sharded: each rank has a part of each block on its device (--use-hsdp); auto: the first of these that fits.",
        "MODE",
    )
    max_weight_memory: str | None = option(
        None, "Most bytes of weights on the device, such as 4GiB, or least; left out: what fits, or the least.", "BYTES"
    )
    prefetch: int | None = option(None, "Blocks on their way ahead of the one that runs; 1 where left out.", "N")
    share_blocks: bool = option(False, "Move each streamed block once for all calls of a step, not once for each call.")
    prompt_cache: str = option("0", "Encoded prompts to keep, so that repeated ones need no encoder.", "BYTES")
    check: bool = option(False, "Hash every fill against its file and poison what is given up; slow.")
    enable_cpu_offload: bool = option(False, "The same as --offload sequential.")
    enable_layerwise_offload: bool = option(False, "The same as --offload layerwise.")

    def __post_init__(self) -> None:
        if not isinstance(self.device, str) or not _DEVICE.fullmatch(self.device):
            raise ConfigError(f"device={self.device!r} is not a device. Use auto, cuda, cuda:N, mps or cpu.")
        for name, mode in _SPELLINGS.items():
            if getattr(self, name):
                if self.offload not in ("auto", mode):
                    raise ConfigError(f"{name} means offload={mode!r}, but offload={self.offload!r}. Give one of them.")
                object.__setattr__(self, "offload", mode)
        if self.offload not in OFFLOADS:
            raise ConfigError(f"offload={self.offload!r} is no mode. Use {', '.join(OFFLOADS)}.")
        if self.prefetch is not None and not (type(self.prefetch) is int and 0 <= self.prefetch <= MAX_PREFETCH):
            raise ConfigError(f"prefetch={self.prefetch!r} is not a whole number from 0 to {MAX_PREFETCH}. Try 1.")
        if self.max_weight_memory not in (None, LEAST):
            parse_bytes(self.max_weight_memory, "max_weight_memory")
        parse_bytes(self.prompt_cache, "prompt_cache")
        self._check_combination()

    def _check_combination(self) -> None:
        for name in ("share_blocks", "check", "enable_cpu_offload", "enable_layerwise_offload"):
            if not isinstance(getattr(self, name), bool):
                raise ConfigError(f"{name}={getattr(self, name)!r} is neither True nor False. Give one of them.")
        if self.offload == "none":
            for name in ("max_weight_memory", "prefetch", "share_blocks", "check"):
                if getattr(self, name):
                    raise ConfigError(
                        f"{name}={getattr(self, name)!r} has no effect with offload='none'. Leave one of them out."
                    )
        if self.offload == "sequential" and self.prefetch is not None:
            raise ConfigError("prefetch counts blocks, and offload='sequential' moves components. Leave it out.")
        if self.offload == "sequential" and self.share_blocks:
            raise ConfigError(
                "share_blocks moves a block once for several calls, and offload='sequential' moves components, which "
                "stay for all calls. Leave it out."
            )

    @property
    def budget_bytes(self) -> int | None:
        """`max_weight_memory` in bytes; None where it is left open or the least."""
        if self.max_weight_memory in (None, LEAST):
            return None
        return parse_bytes(self.max_weight_memory, "max_weight_memory")

    @property
    def prompt_cache_bytes(self) -> int:
        """`prompt_cache` in bytes."""
        return parse_bytes(self.prompt_cache, "prompt_cache")


@dataclass(frozen=True, kw_only=True)
class ParallelConfig:
    """How the work is split over ranks; 1 is off. With `use_hsdp`, how the weights are sharded over them.

    Raises:
        ConfigError: for a size below 1, for ranks of the VAE or of shards that do not fit the denoiser's, and for
            weights that are to be sharded over one rank.
    """

    data_parallel_size: int = option(1, "Groups of ranks that each make pictures of their own.", "N")
    cfg_parallel_size: int = option(1, "Ranks that the branches of guidance (or a batch) are split over.", "N")
    pipeline_parallel_size: int = option(1, "Ranks that each hold a run of the denoiser's blocks.", "N")
    ring_degree: int = option(1, "Ranks that pass keys and values around, each with a part of the sequence.", "N")
    ulysses_degree: int = option(1, "Ranks that trade parts of the sequence for attention heads.", "N")
    tensor_parallel_size: int = option(1, "Ranks that each hold a slice of every layer.", "N")
    vae_patch_parallel_size: int = option(1, "Ranks that the VAE's encode and decode are spread over.", "N")
    vae_parallel_mode: str = option(
        VAE_MODES[0],
        "patch: rows of each feature map, which makes the plain picture; tile: the VAE's tiles, whose seams may show.",
        "MODE",
    )
    use_hsdp: bool = option(False, "Shard the weights: each rank holds a part of each block, gathered ahead of use.")
    hsdp_shard_size: int = option(ALL_RANKS, "Ranks that hold one copy of the weights together; -1: all.", "N")
    hsdp_replicate_size: int = option(1, "Copies of the weights among the ranks that make one picture.", "N")

    def __post_init__(self) -> None:
        if not isinstance(self.use_hsdp, bool):
            raise ConfigError(f"use_hsdp={self.use_hsdp!r} is neither True nor False. Give one of them.")
        for item in fields(self):
            value = getattr(self, item.name)
            if item.name in ("use_hsdp", "vae_parallel_mode") or (
                item.name == "hsdp_shard_size" and value == ALL_RANKS
            ):
                continue
            if type(value) is not int or value < 1:
                raise ConfigError(f"{item.name}={value!r} is not a whole number from 1 up. 1 switches it off.")
        if self.vae_parallel_mode not in VAE_MODES:
            raise ConfigError(f"vae_parallel_mode={self.vae_parallel_mode!r} is no mode. Use {', '.join(VAE_MODES)}.")
        if self.vae_parallel_mode != VAE_MODES[0] and self.vae_patch_parallel_size == 1:
            raise ConfigError(
                f"vae_parallel_mode={self.vae_parallel_mode!r} has no effect on one rank. Give "
                "--vae-patch-parallel-size, or leave it out."
            )
        self._check_shards()
        ranks, tiles = self.denoiser_size, self.vae_patch_parallel_size
        if ranks % tiles and tiles % ranks:
            raise ConfigError(
                f"vae_patch_parallel_size({tiles}) and {self.equation()} = {ranks} ranks: neither divides the other, "
                f"so that the VAE cannot be spread evenly. Try --vae-patch-parallel-size {math.gcd(ranks, tiles)}."
            )

    def _check_shards(self) -> None:
        """Whether copies and shards multiply to the ranks that hold the same weights."""
        shards, replicas = self.hsdp_shard_size, self.hsdp_replicate_size
        if not self.use_hsdp:
            if shards != ALL_RANKS or replicas != 1:
                raise ConfigError(
                    f"hsdp_shard_size={shards} and hsdp_replicate_size={replicas} have no effect without use_hsdp. "
                    "Give --use-hsdp, or leave them out."
                )
            return
        if shards == 1:
            self._refuse_alone(self.num_holders)
        holders = self.num_holders
        if self.shard_size * replicas == holders or (shards == ALL_RANKS and holders == 1):
            return  # or it is left open until the ranks are known
        if shards == ALL_RANKS or holders % shards:
            advice = f"--hsdp-replicate-size 1 and --hsdp-shard-size {holders}"
        else:
            advice = f"--hsdp-replicate-size {holders // shards}"
        raise ConfigError(
            f"hsdp_replicate({replicas}) * hsdp_shard({self.shard_size}) = {self.shard_size * replicas} is not "
            f"copies({self.copies}) * cfg({self.cfg_parallel_size}) * ring({self.ring_degree}) * "
            f"ulysses({self.ulysses_degree}) = {holders}, the ranks that hold the same weights. Try {advice}."
        )

    def _refuse_alone(self, num_ranks: int) -> None:
        """Refuse to shard weights over one rank each: it would hold the whole of them.

        Raises:
            ConfigError: with what multiplies to all ranks, and what to do instead.
        """
        sizes = {
            "data": self.data_parallel_size,
            "pipeline": self.pipeline_parallel_size,
            "tensor": self.tensor_parallel_size,
            "hsdp_replicate": self.hsdp_replicate_size,
        }
        split = " * ".join(f"{name}({size})" for name, size in sizes.items() if size > 1)
        ranks = f"{num_ranks} rank{'s' if num_ranks > 1 else ''}"
        raise ConfigError(
            f"use_hsdp{' with ' + split if split else ''} on {ranks}: each rank has nobody to share its weights with. "
            "Start more (--hsdp-shard-size 2, or torchrun), or let the weights stream: --offload layerwise."
        )

    def for_ranks(self, world_size: int) -> Self:
        """The same with its shards spread over all of so many ranks, where the size of a shard group is left open.

        Raises:
            ConfigError: where that is one rank.
        """
        others = self.data_parallel_size * self.pipeline_parallel_size * self.tensor_parallel_size
        others *= self.hsdp_replicate_size
        if not self.use_hsdp or self.hsdp_shard_size != ALL_RANKS:
            return self
        if world_size <= others:
            self._refuse_alone(world_size)
        if world_size % others:
            return self
        return replace(self, hsdp_shard_size=world_size // others)

    @property
    def shard_size(self) -> int:
        """Ranks that hold one copy of the weights together; 1 where they are not sharded."""
        if not self.use_hsdp:
            return 1
        if self.hsdp_shard_size != ALL_RANKS:
            return self.hsdp_shard_size
        return max(self.num_holders // self.hsdp_replicate_size, 1)

    @property
    def num_holders(self) -> int:
        """Ranks that hold the same weights and make the same picture: `copies * cfg * ring * ulysses`."""
        return self.copies * self.cfg_parallel_size * self.sequence_size

    @property
    def denoiser_size(self) -> int:
        """Ranks that one denoising step is split over."""
        return math.prod(
            (
                self.cfg_parallel_size,
                self.pipeline_parallel_size,
                self.ring_degree,
                self.ulysses_degree,
                self.tensor_parallel_size,
            )
        )

    @property
    def copies(self) -> int:
        """Ranks that do the same denoising, so that there are enough for the VAE's tiles, or for the shards."""
        for_shards = 1
        if self.use_hsdp and self.hsdp_shard_size != ALL_RANKS:
            for_shards = (
                self.hsdp_replicate_size * self.hsdp_shard_size // (self.cfg_parallel_size * self.sequence_size)
            )
        return max(self.vae_patch_parallel_size // self.denoiser_size, for_shards, 1)

    @property
    def sequence_size(self) -> int:
        """Ranks that one sequence is split over: `ulysses_degree * ring_degree`."""
        return self.ulysses_degree * self.ring_degree

    @property
    def world_size(self) -> int:
        """Ranks in all."""
        return self.data_parallel_size * self.copies * self.denoiser_size

    def equation(self) -> str:
        """The degrees that are on and their product, such as `ulysses(2) * cfg(2)`."""
        return " * ".join(f"{name}({size})" for name, size in self.axes().items() if size > 1) or "nothing split (1)"

    def description(self) -> str:
        """The equation, and what else ranks share, such as `ulysses(2), VAE rows over 2 ranks`; empty for one rank."""
        if self.world_size == 1:
            return ""
        tiles, shards = self.vae_patch_parallel_size, self.shard_size
        words = [self.equation()]
        parts = "VAE rows" if self.vae_parallel_mode == VAE_MODES[0] else "VAE tiles"
        words.extend([f"{parts} over {tiles} ranks"] if tiles > 1 else [])
        words.extend([f"weights over {shards} ranks"] if shards > 1 else [])
        return ", ".join(words)

    def axes(self) -> dict[str, int]:
        """The size of every axis of the mesh, outermost first; neighbouring ranks differ in the last."""
        return {
            "data": self.data_parallel_size,
            "copies": self.copies,
            "cfg": self.cfg_parallel_size,
            "pipeline": self.pipeline_parallel_size,
            "ring": self.ring_degree,
            "ulysses": self.ulysses_degree,
            "tensor": self.tensor_parallel_size,
        }


@dataclass(frozen=True, kw_only=True)
class LoadConfig(OffloadConfig, SourceConfig):
    """How a pipeline is loaded.

    Raises:
        ConfigError: for a value that no machine can honour.
    """

    dtype: str = option("auto", "float32, bfloat16 or float16; auto is bfloat16 on GPUs, float32 on the CPU.", "NAME")

    def __post_init__(self) -> None:
        SourceConfig.__post_init__(self)
        OffloadConfig.__post_init__(self)
        if self.dtype != "auto" and self.dtype not in DTYPES:
            raise ConfigError(f"dtype={self.dtype!r} is not supported. Use auto, {', '.join(DTYPES)}.")


def config_of(cls: type[T], **options: Any) -> T:
    """Build a config from keyword options, with an error that names a misspelt one.

    Raises:
        ConfigError: for an unknown option or a value out of range.
    """
    known = [item.name for item in fields(cls)]  # type: ignore[arg-type]
    for name in options:
        if name not in known:
            raise ConfigError(f"unknown option {name!r}{suggestion(name, known)}. Options: {', '.join(known)}.")
    return cls(**{name: _spelt(value) for name, value in options.items()})


def _spelt(value: Any) -> Any:
    """torch's own dtypes and devices by their names; all else as it is."""
    if type(value).__module__.split(".")[0] == "torch":
        return str(value).removeprefix("torch.")
    return value


def suggestion(name: str, known: list[str]) -> str:
    """`" (did you mean 'x'?)"` for the known name closest to `name`, or an empty string."""
    close = difflib.get_close_matches(name, known, n=1)
    return f" (did you mean {close[0]!r}?)" if close else ""
