"""The server's log: one line per request, as text for people or JSON for machines, written by a thread of its own.

Owns the format and the way of a line; uvicorn's own lines take the same way. Keys and prompts are not in it.
Does not know jobs or routes.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterator, MutableMapping
from contextlib import contextmanager
from logging.handlers import QueueHandler, QueueListener
from queue import SimpleQueue
from typing import Any, TextIO

import structlog

_SHARED: list[Any] = [
    structlog.contextvars.merge_contextvars,
    structlog.stdlib.add_log_level,
    structlog.processors.TimeStamper(fmt="iso", utc=True),
    structlog.processors.format_exc_info,
]
_QUIET = ("uvicorn.access", "uvicorn.error", "multipart", "python_multipart", "httpx", "httpx2", "httpcore", "asyncio")


class _Whole(QueueHandler):
    """Puts a record into the queue as it is; the formatter needs its parts."""

    def prepare(self, record: logging.LogRecord) -> logging.LogRecord:
        """The record, with its traceback as a text."""
        if record.exc_info is not None and not isinstance(record.msg, dict):
            record.exc_text = logging.Formatter().formatException(record.exc_info)
        return record


@contextmanager
def logging_to(stream: TextIO | None = None, *, log_format: str = "text") -> Iterator[None]:
    """Inside, all of the server's lines go to a stream.

    Args:
        stream: standard error where left out.
        log_format: text or json.

    Cost: a line costs its caller a put into a queue; a thread formats and writes it, however slow the stream is.
    """
    target = stream or sys.stderr
    handler = logging.StreamHandler(target)
    handler.setFormatter(_formatter(log_format, is_terminal=target.isatty()))
    records: SimpleQueue[Any] = SimpleQueue()
    listener = QueueListener(records, handler)
    root = logging.getLogger()
    before = (root.handlers[:], root.level, {name: logging.getLogger(name).level for name in _QUIET})
    root.handlers = [_Whole(records)]
    root.setLevel(logging.INFO)
    for name in _QUIET:
        logging.getLogger(name).setLevel(logging.WARNING)
    structlog.configure(
        processors=[*_SHARED, structlog.stdlib.ProcessorFormatter.wrap_for_formatter],
        logger_factory=structlog.stdlib.LoggerFactory(),
        wrapper_class=structlog.stdlib.BoundLogger,
        cache_logger_on_first_use=False,
    )
    listener.start()
    try:
        yield
    finally:
        listener.stop()
        root.handlers = before[0]
        root.setLevel(before[1])
        for name, level in before[2].items():
            logging.getLogger(name).setLevel(level)
        structlog.reset_defaults()


def _formatter(log_format: str, *, is_terminal: bool) -> logging.Formatter:
    last: list[Any] = [_escape, structlog.dev.ConsoleRenderer(colors=is_terminal, pad_event_to=0, sort_keys=False)]
    if log_format == "json":
        last = [structlog.processors.JSONRenderer()]  # which escapes by itself
    return structlog.stdlib.ProcessorFormatter(
        foreign_pre_chain=_SHARED,
        processors=[structlog.stdlib.ProcessorFormatter.remove_processors_meta, *last],
    )


def _escape(logger: Any, method: str, line: MutableMapping[str, Any]) -> MutableMapping[str, Any]:
    """Write control characters as such: what clients send shall neither look like a line of ours nor move a cursor.

    The lines of a traceback stay lines, each of them indented.
    """
    for name, value in line.items():
        if name == "exception":
            line[name] = "\n".join(f"    {_printable(part)}" for part in str(value).split("\n"))
        elif isinstance(value, str):
            line[name] = _printable(value)
        elif not isinstance(value, (int, float, type(None))):
            line[name] = _printable(repr(value))
    return line


def _printable(text: str) -> str:
    if text.isprintable():
        return text
    return "".join(one if one.isprintable() else one.encode("unicode_escape").decode("ascii") for one in text)
