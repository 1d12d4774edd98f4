"""The LoRA adapters that an order wants: loaded before it runs, gone before one that wants others.

Owns what is loaded. An order without adapters runs on the model as it is, bit for bit: they are unloaded, not switched
off. Does not know where adapters come from.
"""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from penstock.errors import PenstockError, RequestError
from penstock.models.quiet import quiet_libraries
from penstock.wire import Lora

_FAILURES = (ValueError, KeyError, RuntimeError, OSError, AttributeError, ImportError, SafetensorError)


class Adapters:
    """What is loaded on a pipeline now.

    Args:
        pipeline: any; one that takes no adapters refuses orders that want some.
    """

    def __init__(self, pipeline: Any) -> None:
        self._pipeline = pipeline
        self._loaded: tuple[Lora, ...] = ()

    def use(self, wanted: tuple[Lora, ...]) -> None:
        """Have these adapters on the pipeline and no others.

        Raises:
            RequestError: where one cannot be loaded; then none is.

        Cost: nothing where they are those of the order before; else each file is read.
        """
        if wanted == self._loaded:
            return
        if self._loaded:
            self._pipeline.unload_lora_weights()
            self._loaded = ()
        if not wanted:
            return
        if not hasattr(self._pipeline, "load_lora_weights"):
            raise RequestError(f"{type(self._pipeline).__name__} takes no LoRA. Leave lora out.", "lora")
        try:
            with quiet_libraries(), warnings.catch_warnings():
                warnings.simplefilter("ignore")  # peft warns of the second adapter, which is meant
                self._load(wanted)
        except (*_FAILURES, PenstockError) as error:
            self._pipeline.unload_lora_weights()
            names = ", ".join(lora.name for lora in wanted)
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
            for lora in wanted:  # where it lies is not the asker's business
                reason = reason.replace(lora.path, lora.name).replace(str(Path(lora.path).parent), "its folder")
            raise RequestError(f"lora {names} cannot be loaded on this model: {reason}", "lora") from error
        self._loaded = wanted

    def _load(self, wanted: tuple[Lora, ...]) -> None:
        for lora in wanted:
            path = Path(lora.path)
            self._pipeline.load_lora_weights(str(path.parent), weight_name=path.name, adapter_name=lora.name)
        self._pipeline.set_adapters([lora.name for lora in wanted], [lora.scale for lora in wanted])
