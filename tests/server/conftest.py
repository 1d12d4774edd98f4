"""What the tests of the server share: real services, started when a test asks for one."""

from __future__ import annotations

from tests.server.postgres import database_url, postgres_folder, postgres_url
from tests.server.s3 import s3_endpoint, s3_url

__all__ = ["database_url", "postgres_folder", "postgres_url", "s3_endpoint", "s3_url"]
