"""From a request over HTTP to a run: what pictures and videos have in common.

Owns the order of the checks (nothing is accepted that cannot run) and the folder of a run until the run has it. Does
not know which answer is wanted.
"""

from __future__ import annotations

import shutil
import time
from contextlib import AsyncExitStack
from pathlib import Path

from fastapi import Request

from penstock.request import OutputKind
from penstock.server.asks import Wanted, check_model, wanted, within_limits
from penstock.server.bodies import Body
from penstock.server.failures import ApiError, invalid
from penstock.server.job import Job, new_id
from penstock.server.pictures import Taken, pictures_of
from penstock.server.pipeline import Pipeline
from penstock.server.runs import Run
from penstock.server.schemas import Ask
from penstock.server.service import Service, owner_of, service_of
from penstock.server.threads import FILES
from penstock.wire import Order

_ENDPOINTS: dict[OutputKind, str] = {"image": "/v1/images/generations", "video": "/v1/videos"}


def offered(service: Service, kind: OutputKind) -> Pipeline:
    """The pipeline, where it makes what an endpoint is for.

    Raises:
        ApiError: 400 where it makes something else; 503 before it is ready, and when the server stops; 507 where what
            it makes could not be kept.
    """
    service.jobs.check_open()
    service.conditions.require()
    pipeline = service.pipeline()
    if pipeline.kind != kind:
        there = f"Ask {_ENDPOINTS[pipeline.kind]}." if pipeline.kind in _ENDPOINTS else "No endpoint here gives sound."
        raise invalid(
            "model", f"{pipeline.name} makes {pipeline.kind}s, not {kind}s. {there}", code="unsupported_by_model"
        )
    return pipeline


def admit(request: Request, kind: OutputKind) -> Pipeline:
    """The pipeline, where a request could begin now; asked before its body is read.

    Raises:
        ApiError: see `offered`.
        QueueFullError: where too many wait.
        NotReadyError: where there are no ranks.
    """
    service = service_of(request)
    pipeline = offered(service, kind)
    service.engine.require_room()
    return pipeline


async def begin(
    request: Request,
    ask: type[Ask],
    body: Body,
    taken: Taken,
    *,
    kind: OutputKind,
    wants_contents: bool = False,
    remixed_from: str | None = None,
) -> Run:
    """Check what a client asks for, and let it wait for ranks.

    Args:
        request: as it came.
        ask: schema of its fields.
        body: its body.
        taken: which pictures it may or must bring.
        kind: what the endpoint makes.
        wants_contents: whether the answer needs the bytes.
        remixed_from: id of the job that it goes on from.

    Raises:
        ApiError: for what cannot be made.
        QueueFullError: where too many wait.
        NotReadyError: where there are no ranks.
        StoreError: where it cannot be recorded.
    """
    service = service_of(request)
    await service.conditions.look()
    pipeline = admit(request, kind)  # once more: the body may have taken its time
    job_id = new_id(kind)
    folder = service.spool / job_id
    async with AsyncExitStack() as stack:
        await FILES.run(lambda: folder.mkdir(parents=True))
        stack.push_async_callback(_discard, service, job_id, folder)
        pictures = await pictures_of(body, service, pipeline, folder, taken)
        async with service.gate:
            fields = body.fields(ask)
            check_model(fields.model, service.names)
            want = wanted(fields, pipeline, service.settings, pictures)
            want = await _checked(service, fields, want, taken)
            run = await service.jobs.begin(
                _job(request, job_id, fields, want, kind=kind, remixed_from=remixed_from),
                _order(request, job_id, want, folder),
                wants_contents=wants_contents,
                client=_client(request, fields),
            )
        stack.pop_all()
    request.scope["state"]["job"] = job_id
    return run


async def _discard(service: Service, job_id: str, folder: Path) -> None:
    """Remove the folder of a run that never was; that of one is removed when its ranks have let go of it."""
    if service.jobs.run_of(job_id) is None:
        await FILES.run(lambda: shutil.rmtree(folder, ignore_errors=True))


async def _checked(service: Service, fields: Ask, want: Wanted, taken: Taken) -> Wanted:
    """Ask the pipeline, and hold what it would make against the limits, by the names of the client's own fields."""
    try:
        return within_limits(want, await service.jobs.check(want.request), service.pipeline(), service.settings)
    except ApiError as error:
        names = {"num_images": "n", "frame_rate": "fps"}
        names |= {argument: name for name, argument in taken.fields.items() if argument}
        if fields.size is not None:
            names |= {"width": "size", "height": "size"}
        if error.param in names:
            name = names[error.param]
            error.message = error.message.replace(f"'{error.param}'", f"'{name}'")
            error.param = name
        raise


def _job(
    request: Request, job_id: str, fields: Ask, want: Wanted, *, kind: OutputKind, remixed_from: str | None
) -> Job:
    service = service_of(request)
    return Job(
        id=job_id,
        kind=kind,
        owner=owner_of(request),
        server=service.jobs.server,
        model=fields.model or service.names[0],
        prompt=fields.prompt or "",
        seconds=want.seconds,
        size=want.size,
        seed=want.request.seed,
        arguments=want.arguments,
        remixed_from=remixed_from,
        created_at=int(time.time()),
    )


def _order(request: Request, job_id: str, want: Wanted, folder: Path) -> Order:
    client = owner_of(request) or (request.client.host if request.client else "")
    return Order(
        id=job_id,
        request=want.request,
        folder=str(folder),
        format=want.format,
        num_partials=want.num_partials,
        loras=want.loras,
        client=client,
    )


def _client(request: Request, fields: Ask) -> dict[str, str]:
    named = {"user": fields.user, "safety_identifier": fields.safety_identifier, "owner": owner_of(request)}
    return {name: value for name, value in named.items() if value}
