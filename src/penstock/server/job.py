"""A job: one request to the server, from the moment it is accepted until its files expire.

Owns the noun and its states; queued -> in_progress -> completed or failed, and nothing leaves the last two.
Does not know databases, files, HTTP or the engine.
"""

from __future__ import annotations

import secrets
from dataclasses import dataclass, field
from typing import Any, Literal

from penstock.request import OutputKind

Status = Literal["queued", "in_progress", "completed", "failed"]
UNFINISHED: tuple[Status, ...] = ("queued", "in_progress")


@dataclass(frozen=True, kw_only=True)
class JobFile:
    """A file of a job.

    Attributes:
        name: in the storage; nobody can guess it, and it holds nothing that a client wrote.
        role: result, thumbnail or spritesheet.
        media_type: such as image/png.
        num_bytes: its size.
        item: index of the result it belongs to, from 0.
        seed: that makes this item again.
        facts: width, height, num_frames, frame_rate, sampling_rate_hz, where they are known.
    """

    name: str
    role: str
    media_type: str
    num_bytes: int
    item: int = 0
    seed: int | None = None
    facts: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Job:
    """One request and what became of it. Times are seconds since the epoch.

    Attributes:
        id: `image_...` or `video_...`; nobody can guess it.
        kind: what it makes.
        owner: digest of the API key that asked; jobs of others are as if they did not exist.
        server: name of the server that runs it: after a restart that server fails what it had not finished.
        status: where it stands.
        progress: whole percents; 100 only when it is completed.
        model: as the client named it.
        prompt: likewise.
        seconds: of a video, as a text; None otherwise.
        size: `WIDTHxHEIGHT`.
        seed: of the first item.
        arguments: everything the request asked for, JSON-able.
        remixed_from: id of the job it was made from, or None.
        created_at: when it was accepted.
        started_at: when a rank began; None before.
        completed_at: when it ended, well or not; None before.
        expires_at: when file and record are removed; None before it ends.
        error_code: of a failure: `wire.Failure.code`, or server_restarted, server_died, storage_failed.
        error_message: for the user.
        files: what was made.
        timings: the fields of `wire.Timings`, once it ended.
    """

    id: str
    kind: OutputKind
    owner: str
    server: str
    status: Status = "queued"
    progress: int = 0
    model: str
    prompt: str = ""
    seconds: str | None = None
    size: str | None = None
    seed: int | None = None
    arguments: dict[str, Any] = field(default_factory=dict)
    remixed_from: str | None = None
    created_at: int
    started_at: float | None = None
    completed_at: int | None = None
    expires_at: int | None = None
    error_code: str | None = None
    error_message: str | None = None
    files: tuple[JobFile, ...] = ()
    timings: dict[str, float] = field(default_factory=dict)

    def results(self, role: str = "result") -> list[JobFile]:
        """Its files of a role, by item."""
        return sorted((file for file in self.files if file.role == role), key=lambda file: file.item)


def new_id(kind: OutputKind) -> str:
    """An id that nobody can guess."""
    return f"{kind}_{secrets.token_hex(16)}"
