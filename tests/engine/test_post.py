"""Messages find their rank, and the engine's thread is woken."""

from __future__ import annotations

import stat
import threading
import time
from pathlib import Path

import zmq

from penstock.engine.post import Post
from penstock.wire import Beat, Cancel, encode, read_to_rank


def test_messages_travel_both_ways() -> None:
    post = Post()
    address = post.open()
    with zmq.Context() as context, context.socket(zmq.DEALER) as rank:
        rank.linger = 0
        rank.identity = b"0.0.0"
        rank.connect(address)
        rank.send(encode(Beat(host_bytes=7)))
        assert post.hear(5000) == [("0.0.0", Beat(host_bytes=7))]
        post.send("0.0.0", Cancel("a"))
        assert rank.poll(5000) and read_to_rank(rank.recv()) == Cancel("a")
        post.send("another", Cancel("a"))  # nobody has that name
        assert post.hear(0) == []
    post.close()


def test_only_this_user_can_reach_it_and_nothing_is_left() -> None:
    post = Post()
    folder = Path(post.open().removeprefix("ipc://")).parent
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    post.close()
    assert not folder.exists()


def test_it_is_woken_from_another_thread() -> None:
    post = Post()
    post.wake()  # nobody listens yet
    post.open()
    begun_s = time.monotonic()
    threading.Timer(0.05, post.wake).start()
    assert post.hear(20_000) == [] and time.monotonic() - begun_s < 10
    for _ in range(100_000):
        post.wake()  # its pipe is full long before
    post.close()
    post.wake()
