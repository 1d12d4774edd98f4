"""Which failure is which answer."""

from __future__ import annotations

import json

import pytest
from pydantic import BaseModel, ValidationError

from penstock.errors import ConfigError, ModelError, NotReadyError, QueueFullError, RequestError
from penstock.server.failures import ApiError, envelope, from_error, from_validation, how_it_died, of_failure, stopping
from penstock.server.files import StorageError
from penstock.server.store import StoreError, UnknownJobError
from penstock.wire import Failure


@pytest.mark.parametrize(
    ("code", "status", "retry_s", "is_repeated"),
    [
        ("request_invalid", 400, None, None),
        ("cancelled", 409, None, False),
        ("out_of_memory", 507, None, False),
        ("generation_failed", 500, None, False),
        ("rank_died", 503, "5", False),
        ("rank_hung", 503, "5", False),
        ("engine_closed", 503, "10", None),
        ("server_stopped", 503, "10", None),
        ("server_died", 503, "5", None),
        ("storage_failed", 503, None, False),
        ("something_new", 500, None, False),
    ],
)
def test_failures_of_jobs(code: str, status: int, retry_s: str | None, is_repeated: bool | None) -> None:
    answer = of_failure(Failure(code=code, message="why", param="size")).response()
    assert answer.status_code == status
    assert answer.headers.get("retry-after") == retry_s
    assert (answer.headers.get("x-should-retry") == "false") == (is_repeated is False)
    error = json.loads(answer.body)["error"]
    assert error["code"] == code and error["param"] == "size" and error["message"] == "why"


@pytest.mark.parametrize(
    ("error", "status", "param"),
    [
        (QueueFullError("full", 9), 429, None),
        (NotReadyError("loading"), 503, None),
        (StoreError("disk"), 503, None),
        (StorageError("disk"), 503, None),
        (UnknownJobError("after"), 404, "after"),
        (RequestError("wrong", "width"), 400, "width"),
        (ConfigError("wrong"), 400, None),
        (ModelError("broken"), 500, None),
    ],
)
def test_our_exceptions(error: Exception, status: int, param: str | None) -> None:
    answer = from_error(error)
    assert (answer.status, answer.param) == (status, param)
    assert (answer.retry_after_s is not None) == (status in (429, 503))


def test_what_a_storage_says_stays_in_the_log() -> None:
    assert "secret-bucket" not in from_error(StorageError("s3://secret-bucket failed")).message
    assert "password" not in from_error(StoreError("postgresql://password@host failed")).message


def test_types_are_those_of_the_official_api() -> None:
    kinds = {status: envelope(status, "x")["error"]["type"] for status in (400, 401, 403, 404, 429, 500, 503)}
    assert kinds == {
        400: "invalid_request_error",
        401: "authentication_error",
        403: "permission_error",
        404: "invalid_request_error",
        429: "rate_limit_error",
        500: "server_error",
        503: "server_error",
    }
    assert envelope(404, "x")["error"]["code"] == "not_found"


def test_validation_names_the_field_and_what_to_do() -> None:
    class Fields(BaseModel):
        n: int
        lora: list[int] = []

    with pytest.raises(ValidationError) as caught:
        Fields.model_validate({"n": "two", "lora": ["x"]})
    answer = from_validation(caught.value.errors(), {"n": "Give a number"})
    assert answer.status == 400 and answer.param == "n"
    assert "'two'" in answer.message and answer.message.endswith("Give a number.")
    assert from_validation(caught.value.errors()[1:]).param == "lora.0"


def test_a_field_that_a_schema_does_not_have_gets_no_advice_on_its_values() -> None:
    class Fields(BaseModel, extra="forbid"):
        n: int = 1

    for name in ("size", "x" * 2**20):
        with pytest.raises(ValidationError) as caught:
            Fields.model_validate({name: "64"})
        answer = from_validation(caught.value.errors(), {"size": "Give WIDTHxHEIGHT"})
        assert (answer.code, answer.param) == ("unknown_parameter", name[:80])
        assert answer.message == f"{name[:80]} is no field here. Leave it out."


def test_names_that_clients_make_up_are_cut() -> None:
    name = "'\n" * 1000
    error = ApiError(400, f"{name} and {name!r}", param=name)
    assert error.param == name[:80] and error.message == f"{name[:80]} and {name[:80]!r}"
    assert len(ApiError(400, "x" * 2**20).message) == 4000


def test_no_wait_is_longer_than_clients_obey() -> None:
    assert from_error(QueueFullError("full", 600)).response().headers["retry-after"] == "60"


def test_how_a_rank_died_is_told_without_what_it_wrote() -> None:
    assert how_it_died("rank 1 died (signal 9, SIGKILL): /home/ann/x. Ask again.") == "rank 1 died (signal 9, SIGKILL)"
    assert how_it_died("no step for 5 s") is None


def test_stopping_says_when_to_come_back() -> None:
    assert stopping().response().headers["retry-after"] == "10"
    assert ApiError(409, "x").response().headers["x-should-retry"] == "false"
