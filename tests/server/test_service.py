"""What the routes work with."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, cast

import pytest

from penstock.errors import NotReadyError
from penstock.server.service import Service, owner_of, service_of
from tests.server.engine_double import described


def test_before_the_model_is_known_nothing_can_be_asked_of_it() -> None:
    parts: dict[str, Any] = dict.fromkeys(Service.__dataclass_fields__)
    with pytest.raises(NotReadyError, match="/ready"):
        Service(**{**parts, "engine": SimpleNamespace(description=None)}).pipeline()
    known = Service(**{**parts, "engine": SimpleNamespace(description=described("video"))})
    assert known.pipeline().kind == "video"


def test_the_way_from_a_request() -> None:
    service = object()
    state = SimpleNamespace(service=service)
    request = cast(Any, SimpleNamespace(app=SimpleNamespace(state=state), scope={"state": {"owner": "ann"}}))
    assert service_of(request) is service and owner_of(request) == "ann"
