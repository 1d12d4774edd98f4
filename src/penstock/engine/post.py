"""The socket between an engine and its ranks, and what wakes the engine's thread.

Owns ZeroMQ on the engine's side: messages go to ranks by name, and come with the name of who sent them. Does not know
what they mean.
"""

from __future__ import annotations

import os
import tempfile
import threading
from contextlib import ExitStack, suppress

import zmq

from penstock.wire import FromRank, ToRank, encode, read_from_rank

_WOKEN_BYTES = 4096


class Post:
    """Where ranks send to and hear from. `wake` may be called from any thread, the rest from one alone."""

    def __init__(self) -> None:
        self._held = ExitStack()
        self._lock = threading.Lock()
        self._is_open = False

    def open(self) -> str:
        """Begin to listen.

        Returns:
            The address for ranks to connect to; only this user's processes can.
        """
        folder = self._held.enter_context(tempfile.TemporaryDirectory(prefix="penstock-"))  # closed to other users
        address = f"ipc://{folder}/ranks"
        context = self._held.enter_context(zmq.Context())
        self._socket = self._held.enter_context(context.socket(zmq.ROUTER))
        self._socket.linger = 0
        self._socket.bind(address)
        self._woken, self._waker = os.pipe()
        for end in (self._woken, self._waker):
            os.set_blocking(end, False)
            self._held.callback(os.close, end)
        self._poller = zmq.Poller()
        self._poller.register(self._socket, zmq.POLLIN)
        self._poller.register(self._woken, zmq.POLLIN)
        self._is_open = True
        return address

    def send(self, name: str, message: ToRank) -> None:
        """Send to a rank; one that is gone, or has not come yet, misses it."""
        self._socket.send_multipart([name.encode(), encode(message)])

    def hear(self, timeout_ms: int) -> list[tuple[str, FromRank]]:
        """All that has come, with the names of its senders; waits so long for the first, or until it is woken."""
        events = dict(self._poller.poll(timeout_ms))
        if self._woken in events:
            os.read(self._woken, _WOKEN_BYTES)
        heard: list[tuple[str, FromRank]] = []
        with suppress(zmq.Again):
            while True:
                name, data = self._socket.recv_multipart(zmq.NOBLOCK)
                heard.append((name.decode(), read_from_rank(data)))
        return heard

    def wake(self) -> None:
        """Have `hear` return at once; nothing where nobody listens."""
        with self._lock, suppress(BlockingIOError):  # the pipe is full: it is awake already
            if self._is_open:
                os.write(self._waker, b"!")

    def close(self) -> None:
        """Give up the socket."""
        with self._lock:
            self._is_open = False
            self._held.close()
