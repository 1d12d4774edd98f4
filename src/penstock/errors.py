"""The exceptions that penstock raises on purpose.

    PenstockError                 something penstock can explain; exit code 1
    +-- UsageError                what was asked cannot work; found before weights load; exit code 2
    |   +-- ConfigError           an option out of range, or one that this machine cannot honour
    |   +-- RequestError          an argument that the pipeline does not take, or a value it cannot use
    |   +-- ModelNotFoundError    the name is no built-in model, no folder, and no reachable hub id
    |   +-- NotAPipelineError     the folder exists but is not a diffusers pipeline
    |   +-- OutputError           the output path cannot be written, or its format does not fit
    +-- ModelError                the model itself is at fault
    |   +-- WeightsError          a weight file is missing, truncated or corrupt
    |   +-- DeclarationError      a class declares offload metadata that is not true of it
    +-- GenerationError           the pipeline failed while it ran
    |   +-- CancelledError        it was asked to stop, and did
    +-- EngineError               the ranks of an engine cannot do what they are asked to
        +-- NotReadyError         none of its groups is ready, or it is closed
        +-- QueueFullError        too many requests wait already

A message has three parts: what happened, with numbers; why; what to do instead.
"""

from __future__ import annotations

from typing import ClassVar


class PenstockError(Exception):
    """Root of all errors raised by penstock on purpose."""

    exit_code: ClassVar[int] = 1


class UsageError(PenstockError):
    """What was asked cannot work; nothing was loaded or written."""

    exit_code: ClassVar[int] = 2


class ConfigError(UsageError):
    """An option is out of range, or this machine cannot honour it."""


class RequestError(UsageError):
    """A request names an argument that the pipeline does not take, or a value that it cannot use.

    Attributes:
        param: the argument at fault; None where it is not one alone.
    """

    def __init__(self, message: str, param: str | None = None) -> None:
        super().__init__(message)
        self.param = param


class ModelNotFoundError(UsageError):
    """The model's name leads to no built-in model, no folder, and no reachable hub id."""


class NotAPipelineError(UsageError):
    """The folder exists but holds no diffusers pipeline."""


class OutputError(UsageError):
    """The output path cannot be written, or its suffix does not fit what the pipeline makes."""


class ModelError(PenstockError):
    """The model's own files or classes are at fault."""


class WeightsError(ModelError):
    """A weight file is missing, truncated or corrupt."""


class DeclarationError(ModelError):
    """A class declares offload metadata that is not true of it."""


class GenerationError(PenstockError):
    """The pipeline failed while it ran."""


class CancelledError(GenerationError):
    """A request was cancelled while it waited or ran."""


class EngineError(PenstockError):
    """The ranks of an engine could not be started, died or hang."""


class NotReadyError(EngineError):
    """No group of ranks is ready, or the engine is closed."""


class QueueFullError(EngineError):
    """Too many requests wait already.

    Attributes:
        retry_after_s: whole seconds after which it may be worth asking again.
    """

    def __init__(self, message: str, retry_after_s: int) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s
