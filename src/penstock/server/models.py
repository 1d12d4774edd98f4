"""The model over HTTP: its name, and what its pipeline takes.

Owns the routes of `/v1/models`. Does not know how it is run.
"""

from __future__ import annotations

from fastapi import APIRouter, Request

from penstock.server.asks import adapters, check_model
from penstock.server.failures import ApiError
from penstock.server.openapi import errors
from penstock.server.schemas import ModelAnswer, ModelPage
from penstock.server.service import Service, service_of

router = APIRouter(prefix="/v1/models", tags=["models"])


@router.get("", response_model=ModelPage)
async def list_models(request: Request) -> ModelPage:
    """The models of this server: one."""
    service = service_of(request)
    return ModelPage(data=[_answer(service, service.names[0])])


@router.get("/{model_id:path}", response_model=ModelAnswer, responses=errors(404))
async def retrieve(request: Request, model_id: str) -> ModelAnswer:
    """A model by its name, in which slashes may stay as they are."""
    service = service_of(request)
    if not model_id:
        raise ApiError(404, "no model is named. /v1/models lists what there is.", code="model_not_found", param="model")
    check_model(model_id, service.names)
    return _answer(service, model_id)


def _answer(service: Service, name: str) -> ModelAnswer:
    description = service.engine.description
    if description is None:
        return ModelAnswer(id=name, created=service.created)
    public = {key: value for key, value in description.items() if key != "effective"}
    described = {**public, "adapters": adapters(service.settings)}
    return ModelAnswer(id=name, created=service.created, kind=description["kind"], description=described)
