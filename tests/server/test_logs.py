"""One line per event, as text or JSON, by a thread of its own."""

from __future__ import annotations

import io
import json
import logging
import threading

import structlog

from penstock.server.logs import logging_to


def test_json_lines() -> None:
    stream = io.StringIO()
    with logging_to(stream, log_format="json"):
        structlog.get_logger().info("job", job="image_1", total_s=1.5, prompt_of_a_user=None)
        logging.getLogger("elsewhere").warning("from %s", "another library")
    lines = [json.loads(line) for line in stream.getvalue().splitlines()]
    assert lines[0]["event"] == "job" and lines[0]["total_s"] == 1.5 and lines[0]["level"] == "info"
    assert lines[1]["event"] == "from another library" and lines[1]["timestamp"]


def test_text_lines_and_levels() -> None:
    stream = io.StringIO()
    with logging_to(stream):
        structlog.get_logger().debug("unseen")
        structlog.get_logger().info("seen", size="64x64")
        logging.getLogger("uvicorn.error").info("unseen")
    (line,) = stream.getvalue().splitlines()
    assert "seen" in line and "size=64x64" in line and "\x1b" not in line


def test_what_clients_send_makes_no_line_of_its_own() -> None:
    stream = io.StringIO()
    with logging_to(stream):
        structlog.get_logger().info("request", path="/x\r\n2026 [info] forged\x1b[2J\u2028", more=["a\nb"])
        logging.getLogger("elsewhere").warning("a\nb")
        try:
            raise ValueError("x\n2026 [info] forged")
        except ValueError as error:
            structlog.get_logger().error("broke", exc_info=error)
    text = stream.getvalue()
    assert not any(line.startswith("2026 [info]") for line in text.splitlines()) and "\x1b" not in text
    assert "\\x1b[2J" in text and "\\u2028" in text and "a\\nb" in text  # it is there, for who looks for it
    assert "\n    ValueError: x" in text


def test_tracebacks_are_in_their_line() -> None:
    stream = io.StringIO()
    with logging_to(stream, log_format="json"):
        try:
            raise ZeroDivisionError("by nothing")
        except ZeroDivisionError as error:
            structlog.get_logger().error("broke", exc_info=error)
    (line,) = stream.getvalue().splitlines()
    assert "ZeroDivisionError: by nothing" in json.loads(line)["exception"]


def test_a_slow_stream_does_not_hold_its_writers_up() -> None:
    reading = threading.Event()

    class Slow(io.StringIO):
        def write(self, text: str) -> int:
            reading.wait(20)
            return super().write(text)

    stream = Slow()
    with logging_to(stream, log_format="json"):
        for number in range(1000):
            structlog.get_logger().info("job", number=number)
        assert stream.getvalue() == ""  # and yet all of them have returned
        reading.set()
    assert len(stream.getvalue().splitlines()) == 1000


def test_what_was_before_is_there_again() -> None:
    before = logging.getLogger().handlers[:]
    with logging_to(io.StringIO()):
        assert logging.getLogger().handlers != before
    assert logging.getLogger().handlers == before
