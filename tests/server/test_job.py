"""The noun: ids that nobody guesses, and results in their order."""

from __future__ import annotations

import re
from dataclasses import FrozenInstanceError

import pytest

from penstock.server.job import UNFINISHED, new_id
from tests.server.jobs import a_file, a_job


def test_ids_name_their_kind_and_never_repeat() -> None:
    ids = {new_id("video") for _ in range(1000)}
    assert len(ids) == 1000
    assert all(re.fullmatch("video_[0-9a-f]{32}", id) for id in ids)
    assert new_id("image").startswith("image_")


def test_results_are_of_one_role_and_in_order() -> None:
    files = (a_file("c", item=2), a_file("t", item=0, role="thumbnail"), a_file("a", item=0), a_file("b", item=1))
    job = a_job(files=files)
    assert [file.name for file in job.results()] == ["a", "b", "c"]
    assert [file.name for file in job.results("thumbnail")] == ["t"]
    assert job.results("spritesheet") == []


def test_a_new_job_waits_and_does_not_change() -> None:
    job = a_job()
    assert job.status in UNFINISHED and job.progress == 0 and job.error_code is None
    with pytest.raises(FrozenInstanceError):
        job.status = "completed"  # type: ignore[misc]
