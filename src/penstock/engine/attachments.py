"""Which of the things that others put on a pipeline goes with which feature; what does not is refused by name.

Asked when a pipeline is placed, before anything is changed, and at each call of a component, for what was put on
later. One table answers. Owns that table and the words; where such things are found is `models.attachments`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import nullcontext
from typing import Any, Literal

from torch import nn

from penstock.config import ParallelConfig
from penstock.distributed.mesh import Mesh
from penstock.distributed.watch import current_watch
from penstock.errors import ConfigError
from penstock.models.attachments import Attached, Attachment, Trait
from penstock.models.components import discover
from penstock.offload.stage import entries
from penstock.profile import Role
from penstock.undo import Undo

Feature = Literal["place", "stream", "shards", "turns", "batch", "sequence", "stages", "tensor", "vae"]
Way = Literal["turns", "batch"]

_TWO_MOVERS = "two cannot move the same weights"
_LOST_CAST = "it exchanges the weights that penstock moves, which then lie outside of the memory that was promised"
_OWN_SPLIT = "two cannot split the same work"
_PART = "each rank sees only its part of"

REFUSED: dict[Feature, dict[Trait, str]] = {
    "place": {Trait.MOVES_WEIGHTS: _TWO_MOVERS},
    "stream": {Trait.MOVES_WEIGHTS: _TWO_MOVERS, Trait.CASTS_WEIGHTS: _LOST_CAST},
    "shards": {Trait.MOVES_WEIGHTS: _TWO_MOVERS, Trait.CASTS_WEIGHTS: _LOST_CAST, Trait.SPLITS_WORK: _OWN_SPLIT},
    "turns": {
        Trait.SHARES_STATE: "each rank makes only some of a step's calls, so that state which they share goes wrong",
        Trait.EXCHANGES: "an exchange within a call that only one rank makes never ends",
        Trait.SPLITS_WORK: _OWN_SPLIT,
    },
    "batch": {
        Trait.DECIDES: f"{_PART} the batch, and decides by that",
        Trait.PAIRS_SAMPLES: f"{_PART} the batch, which holds no pairs any more",
        Trait.EXCHANGES: "its exchanges and penstock's would meet",
        Trait.SPLITS_WORK: _OWN_SPLIT,
    },
    "sequence": {
        Trait.DECIDES: f"{_PART} the sequence, so that ranks decide differently and wait for each other",
        Trait.LOOKS_ACROSS_TOKENS: f"{_PART} the sequence",
        Trait.EXCHANGES: "its exchanges and penstock's would meet",
        Trait.SPLITS_WORK: _OWN_SPLIT,
    },
    "stages": {
        Trait.DECIDES: "a rank has no values of the blocks that another one holds, to decide by",
        Trait.SKIPS_BLOCKS: "a block that is skipped passes nothing on to the next rank",
        Trait.KEEPS_RESULTS: "each rank has the results of its own blocks only",
        Trait.EXCHANGES: "its exchanges and penstock's would meet",
        Trait.SPLITS_WORK: _OWN_SPLIT,
    },
    "tensor": {Trait.SPLITS_WORK: _OWN_SPLIT},
    "vae": {
        Trait.DECIDES: f"{_PART} the picture, and decides by that",
        Trait.SHARES_STATE: "each rank makes only some of the calls",
        Trait.EXCHANGES: "its exchanges and penstock's would meet",
        Trait.SPLITS_WORK: _OWN_SPLIT,
    },
}
"""By feature, what it does not survive, and why. `turns` and `batch` are the two ways of guidance over ranks."""

_LATER: dict[Feature, frozenset[Trait]] = {"stages": frozenset({Trait.KEEPS_RESULTS})}
"""What is refused when a pipeline is placed, and right where it is put on afterwards."""

_WITHOUT: dict[Feature, str] = {
    "place": "leave penstock off",
    "stream": "leave the weights where they are (offload='none')",
    "shards": "leave use_hsdp out",
    "turns": "leave cfg_parallel_size at 1",
    "batch": "leave cfg_parallel_size at 1",
    "sequence": "leave ulysses_degree and ring_degree at 1",
    "stages": "leave pipeline_parallel_size at 1",
    "tensor": "leave tensor_parallel_size at 1",
    "vae": "leave vae_patch_parallel_size at 1",
}
_NAMES: dict[Feature, str] = {
    "place": "a placed pipeline",
    "stream": "weights that stream",
    "shards": "weights that ranks share (use_hsdp)",
    "turns": "cfg_parallel_size, where ranks make a step's calls by turns",
    "batch": "cfg_parallel_size, where a batch is cut",
    "sequence": "ulysses_degree or ring_degree",
    "stages": "pipeline_parallel_size",
    "tensor": "tensor_parallel_size",
    "vae": "vae_patch_parallel_size",
}


def check_attachments(pipeline: Any, offload: str, parallel: ParallelConfig | None) -> None:
    """Refuse to place a pipeline with what would not survive it.

    Args:
        pipeline: with weights; nothing of it is changed.
        offload: the mode that was asked for.
        parallel: how it is to be split.

    Raises:
        ConfigError: naming what was found, where, why it does not go, and what to do instead.

    Cost: some microseconds per module.
    """
    is_streaming = offload != "none"
    for component in discover(pipeline).components:
        features = _features(component.role, is_streaming, parallel)
        _Check(component.name, component.module, features, parallel).require_all()


def watch_attachments(pipeline: Any, mesh: Mesh, is_streaming: bool) -> Undo:
    """Refuse at the next call what is put on a placed pipeline later.

    Args:
        pipeline: that is placed.
        mesh: the ranks that it is split over.
        is_streaming: whether its weights stream.

    Returns:
        What takes the look-out away.

    Raises:
        ConfigError: (from the call of a component) as `check_attachments`.

    Cost: below a microsecond for each module within the component that is called.
    """
    with Undo() as undo:
        for component in discover(pipeline).components:
            features = _features(component.role, is_streaming, mesh.config)
            if features == ["place"]:
                continue  # nothing that could go wrong
            check = _Check(component.name, component.module, features, mesh.config, mesh["replica"].ranks)
            for module in entries(component.module):
                undo.add(module.register_forward_pre_hook(check.look, prepend=True).remove)
    return undo


def requirement(pipeline: Any, denoiser: nn.Module, mesh: Mesh, is_streaming: bool) -> Callable[[Way], None]:
    """What refuses a denoiser's call that goes one of the ways of guidance: on all ranks, before any executes it."""
    name = next(one.name for one in discover(pipeline).components if one.module is denoiser)
    features = _features("denoiser", is_streaming, mesh.config)
    return _Check(name, denoiser, features, mesh.config, mesh["replica"].ranks).require_way


def _features(role: Role, is_streaming: bool, parallel: ParallelConfig | None) -> list[Feature]:
    """What acts on a component, but for guidance, whose way is known at each call."""
    asked: list[tuple[Feature, bool]] = [("place", True), ("stream", is_streaming)]
    if parallel is not None:
        asked.append(("shards", parallel.use_hsdp))
        asked.append(("vae", role == "vae" and parallel.vae_patch_parallel_size > 1))
        if role == "denoiser":
            asked.append(("sequence", parallel.sequence_size > 1))
            asked.append(("stages", parallel.pipeline_parallel_size > 1))
            asked.append(("tensor", parallel.tensor_parallel_size > 1))
    return [feature for feature, is_asked in asked if is_asked]


class _Check:
    """What is on one component, against the features that act on it."""

    def __init__(
        self,
        name: str,
        module: nn.Module,
        features: list[Feature],
        parallel: ParallelConfig | None,
        ranks: tuple[int, ...] = (),
    ) -> None:
        self._name = name
        self._attached = Attached(module)
        self._features = features
        self._is_guided = parallel is not None and parallel.cfg_parallel_size > 1
        self._ranks = ranks

    def require_all(self) -> None:
        """Refuse what does not survive being placed."""
        self._raise(self._error(self._attached.now(), self._features, {}))

    def look(self, *_: Any) -> None:
        """Refuse what was put on since, before a call."""
        self._raise(self._error(self._attached.now(), self._features, _LATER))

    def require_way(self, way: Way) -> None:
        """Refuse what does not survive this way of guidance, or was put on since."""
        self._raise(self._error(self._attached.now(), [*self._features, way], _LATER))

    def _raise(self, error: ConfigError | None) -> None:
        if error is None:
            return
        with (current_watch(self._ranks) if self._ranks else None) or nullcontext():  # nobody is left waiting
            raise error

    def _error(
        self,
        found: Iterable[Attachment],
        features: list[Feature],
        allowed: dict[Feature, frozenset[Trait]],
    ) -> ConfigError | None:
        found = list(found)
        for feature in features:
            for one in found:
                for trait in one.traits - allowed.get(feature, frozenset()):
                    if trait in REFUSED[feature]:
                        return ConfigError(self._words(one, found, feature, trait))
        for one in found if self._is_guided else ():
            reasons = [[trait for trait in one.traits if trait in REFUSED[way]] for way in ("turns", "batch")]
            if all(reasons):  # whichever way its calls go
                return ConfigError(self._words(one, found, "turns", reasons[0][0]))
        return None

    def _words(self, one: Attachment, found: list[Attachment], feature: Feature, trait: Trait) -> str:
        places = [other.path for other in found if other.what == one.what]
        more = f" and {len(places) - 1} more modules" if len(places) > 1 else ""
        where = ".".join(filter(None, (self._name, one.path)))
        return (
            f"{where}{more} has {one.what}, which does not go with {_NAMES[feature]}: {REFUSED[feature][trait]}. "
            f"{one.remedy[0].upper()}{one.remedy[1:]}, or {_WITHOUT[feature]}."
        )
