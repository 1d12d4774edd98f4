"""Each kind of work has threads of its own."""

from __future__ import annotations

import asyncio
import threading

from penstock.server.threads import DATABASE, FILES, Lane


def test_a_lane_that_is_full_does_not_hold_up_another() -> None:
    going_on = threading.Event()

    async def main() -> str:
        stuck = [asyncio.create_task(FILES.run(going_on.wait, 30)) for _ in range(100)]
        await asyncio.sleep(0.05)
        try:
            return await asyncio.wait_for(DATABASE.run(str, 7), 10)
        finally:
            going_on.set()
            await asyncio.gather(*stuck)

    assert asyncio.run(main()) == "7"


def test_a_lane_has_so_many_threads_in_every_loop() -> None:
    lane, inside, most = Lane("narrow", 2), [0], [0]
    lock = threading.Lock()

    def work() -> None:
        with lock:
            inside[0] += 1
            most[0] = max(most[0], inside[0])
        threading.Event().wait(0.02)
        with lock:
            inside[0] -= 1

    async def main() -> None:
        await asyncio.gather(*(lane.run(work) for _ in range(8)))

    for _ in range(2):
        asyncio.run(main())
        assert most == [2]
