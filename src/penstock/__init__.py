"""penstock runs any unmodified diffusers pipeline in the memory and on the devices there are.

Names are resolved when they are first used: `import penstock` imports neither torch nor diffusers.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from penstock.errors import (
    CancelledError,
    ConfigError,
    DeclarationError,
    EngineError,
    GenerationError,
    ModelError,
    ModelNotFoundError,
    NotAPipelineError,
    NotReadyError,
    OutputError,
    PenstockError,
    QueueFullError,
    RequestError,
    UsageError,
    WeightsError,
)

if TYPE_CHECKING:
    from penstock.config import LoadConfig as LoadConfig
    from penstock.config import OffloadConfig as OffloadConfig
    from penstock.config import ParallelConfig as ParallelConfig
    from penstock.engine.build import load as load
    from penstock.engine.engine import Engine as Engine
    from penstock.engine.generate import generate as generate
    from penstock.engine.parity import Verification as Verification
    from penstock.engine.parity import verify as verify
    from penstock.engine.placed import Placed as Placed
    from penstock.engine.placed import apply as apply
    from penstock.engine.placed import placed_on as placed_on
    from penstock.engine.status import EngineConfig as EngineConfig
    from penstock.media.files import save as save
    from penstock.models.profiler import inspect as inspect
    from penstock.models.protocols import SupportsComponentDiscovery as SupportsComponentDiscovery
    from penstock.models.protocols import SupportsModuleOffload as SupportsModuleOffload
    from penstock.plan import Plan as Plan
    from penstock.profile import Profile as Profile
    from penstock.report import Report as Report
    from penstock.request import GenerationRequest as GenerationRequest
    from penstock.request import GenerationResult as GenerationResult
    from penstock.request import StepEvent as StepEvent

__version__ = "0.1.0"

_HOMES = {
    "Engine": "penstock.engine.engine",
    "EngineConfig": "penstock.engine.status",
    "GenerationRequest": "penstock.request",
    "GenerationResult": "penstock.request",
    "LoadConfig": "penstock.config",
    "OffloadConfig": "penstock.config",
    "ParallelConfig": "penstock.config",
    "Placed": "penstock.engine.placed",
    "Plan": "penstock.plan",
    "Profile": "penstock.profile",
    "Report": "penstock.report",
    "StepEvent": "penstock.request",
    "SupportsComponentDiscovery": "penstock.models.protocols",
    "SupportsModuleOffload": "penstock.models.protocols",
    "Verification": "penstock.engine.parity",
    "apply": "penstock.engine.placed",
    "generate": "penstock.engine.generate",
    "inspect": "penstock.models.profiler",
    "load": "penstock.engine.build",
    "placed_on": "penstock.engine.placed",
    "save": "penstock.media.files",
    "verify": "penstock.engine.parity",
}

__all__ = [
    "CancelledError",
    "ConfigError",
    "DeclarationError",
    "EngineError",
    "GenerationError",
    "ModelError",
    "ModelNotFoundError",
    "NotAPipelineError",
    "NotReadyError",
    "OutputError",
    "PenstockError",
    "QueueFullError",
    "RequestError",
    "UsageError",
    "WeightsError",
    "__version__",
    *_HOMES,
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'penstock' has no attribute {name!r}")
    value = getattr(import_module(_HOMES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
