"""The engine from outside: real ranks, real pictures, and every way in which an order can end."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from pathlib import Path
from queue import SimpleQueue

import numpy as np
import pytest
from PIL import Image

import penstock
from penstock.config import LoadConfig, ParallelConfig
from penstock.engine.engine import Engine
from penstock.errors import CancelledError, ConfigError, ModelNotFoundError, NotReadyError, QueueFullError, RequestError
from penstock.request import GenerationRequest, StepEvent
from penstock.wire import Began, Ended, Made, OrderEvent, Stage, Step
from tests import processes
from tests.engines import PROMPT, ending, made, order, running, stages, steps


def pixels(path: str | Path) -> np.ndarray:
    return np.asarray(Image.open(path), dtype=int)


@pytest.fixture(scope="module")
def plain() -> list[np.ndarray]:
    """The pictures of seeds 0 and 1, made in this process."""
    pipeline = penstock.load("demo", device="cpu")
    request = GenerationRequest(prompt=PROMPT, seed=0, num_images=2)
    return [np.asarray(result.images[0], dtype=int) for result in penstock.generate(pipeline, request)]


def test_pictures_are_those_of_the_plain_pipeline(plain: list[np.ndarray]) -> None:
    results = running().generate(GenerationRequest(prompt=PROMPT, seed=0, num_images=2))
    for result, wanted in zip(results, plain, strict=True):
        assert np.array_equal(np.asarray(result.images[0]), wanted)
    assert not np.array_equal(plain[0], plain[1])  # another seed would have been noticed
    assert [result.seed for result in results] == [0, 1] and results[0].path is None


def test_files_stay_in_a_folder_of_the_users(tmp_path: Path, plain: list[np.ndarray]) -> None:
    (result,) = running().generate(GenerationRequest(prompt=PROMPT, seed=1), folder=tmp_path)
    assert result.path is not None and Path(result.path).parent == tmp_path
    assert np.array_equal(pixels(result.path), plain[1])


def test_events_come_in_their_order(tmp_path: Path) -> None:
    events = list(running().events(order(tmp_path, num_images=2, num_inference_steps=3)))
    assert isinstance(events[0], Began) and isinstance(events[-1], Ended)
    assert stages(events) == ["encode", "denoise", "decode", "save"] * 2
    assert steps(events) == [0, 1, 2, 3] * 2
    assert [file.seed for file in made(events)] == [0, 1]
    timings = events[-1].timings
    assert timings.num_steps == 6
    parts_s = timings.queue_s + timings.encode_s + timings.denoise_s + timings.decode_s + timings.save_s
    assert timings.denoise_s > 0 and 0 < parts_s <= timings.total_s


def test_two_ranks_make_the_same_picture_and_all_let_go_of_a_cancelled_one(
    tmp_path: Path, plain: list[np.ndarray]
) -> None:
    engine = running(ParallelConfig(ulysses_degree=2))
    (file,) = made(list(engine.events(order(tmp_path))))
    assert np.abs(pixels(file.path) - plain[0]).max() <= 1
    events = []
    for event in engine.events(order(tmp_path, num_inference_steps=300)):
        events.append(event)
        if isinstance(event, Step) and event.event.step == 3:
            engine.cancel("one")
    assert ending(events) == "cancelled" and len(steps(events)) < 100
    (file,) = made(list(engine.events(order(tmp_path))))
    assert np.abs(pixels(file.path) - plain[0]).max() <= 1


def test_replicas_work_side_by_side(tmp_path: Path) -> None:
    engine = running(ParallelConfig(data_parallel_size=2))
    wait_until(lambda: [group.state for group in engine.status().groups] == ["idle", "idle"])
    heard: SimpleQueue[OrderEvent] = SimpleQueue()
    for number in range(2):
        engine.submit(order(tmp_path, str(number), num_inference_steps=60), heard.put)
    groups, num_ended = set(), 0
    at_once = 0
    while num_ended < 2:
        event = heard.get(timeout=60)
        if isinstance(event, Began):
            groups.add(event.group)
            at_once = max(at_once, len(groups)) if not num_ended else at_once
        num_ended += isinstance(event, Ended)
    assert groups == {0, 1} and at_once == 2


@pytest.mark.parametrize("stage", ["encode", "denoise", "save"])
def test_what_is_cancelled_ends_once_and_the_next_one_works(tmp_path: Path, stage: str) -> None:
    engine = running()
    events = []
    for event in engine.events(order(tmp_path, num_images=50, num_inference_steps=20)):
        events.append(event)
        if isinstance(event, Stage) and event.name == stage:
            engine.cancel("one")
    assert ending(events) == "cancelled" and len([event for event in events if isinstance(event, Made)]) < 25
    assert made(list(engine.events(order(tmp_path))))


def test_what_waits_is_cancelled_at_once(tmp_path: Path) -> None:
    engine = running()
    running_one: SimpleQueue[OrderEvent] = SimpleQueue()
    waiting: SimpleQueue[OrderEvent] = SimpleQueue()
    engine.submit(order(tmp_path, "long", num_inference_steps=500), running_one.put)
    assert isinstance(running_one.get(timeout=10), Began)
    engine.submit(order(tmp_path, "waits"), waiting.put)
    place = engine.position("waits")
    assert place is not None and place[0] == 0 and place[1] > 0
    engine.cancel("waits")
    assert ending([waiting.get(timeout=5)]) == "cancelled" and engine.position("waits") is None
    engine.cancel("long")
    engine.cancel("unknown")
    while not isinstance(running_one.get(timeout=10), Ended):
        pass


def test_leaving_the_events_cancels(tmp_path: Path) -> None:
    engine = running()
    for event in engine.events(order(tmp_path, num_inference_steps=500)):
        if isinstance(event, Step):
            break
    assert engine.status().groups[0].order_ids == []

    def stop(event: StepEvent) -> None:
        raise KeyError("enough")

    with pytest.raises(KeyError):
        engine.generate(GenerationRequest(prompt=PROMPT), on_step=stop)


def test_questions_are_answered_beside_the_work(tmp_path: Path) -> None:
    engine = running()
    heard: SimpleQueue[OrderEvent] = SimpleQueue()
    engine.submit(order(tmp_path, num_inference_steps=500), heard.put)
    failure = engine.check(GenerationRequest(prompt=PROMPT, width=63)).result(5).failure
    assert failure is not None and (failure.code, failure.param) == ("request_invalid", "width")
    checked = engine.check(GenerationRequest(prompt=PROMPT)).result(5)
    assert checked.failure is None and (checked.width, checked.height, checked.num_frames) == (64, 64, None)
    assert engine.status().groups[0].state == "busy"
    engine.cancel("one")
    while not isinstance(heard.get(timeout=10), Ended):
        pass


def test_bad_requests_fail_alone(tmp_path: Path) -> None:
    engine = running()
    with pytest.raises(RequestError, match="takes no 'colour'"):
        engine.generate(GenerationRequest(prompt=PROMPT, arguments={"colour": "red"}))
    with pytest.raises(RequestError, match="cannot travel"):
        engine.generate(GenerationRequest(prompt=PROMPT, arguments={"latents": object()}))
    with pytest.raises(QueueFullError) as caught:
        for number in range(100):
            engine.submit(order(tmp_path, f"many-{number}", num_inference_steps=500), lambda event: None)
    assert "64 requests wait already" in str(caught.value) and caught.value.retry_after_s >= 1
    for number in range(100):
        engine.cancel(f"many-{number}")
    wait_until(lambda: not engine.status().queue_depth)
    assert made(list(engine.events(order(tmp_path))))


def test_cancelled_by_another_thread_is_an_error_of_its_own(tmp_path: Path) -> None:
    engine = running()
    seen = threading.Event()

    def cancel() -> None:
        seen.wait(10)
        for order_id in engine.status().groups[0].order_ids:
            engine.cancel(order_id)

    thread = threading.Thread(target=cancel)
    thread.start()
    with pytest.raises(CancelledError):
        engine.generate(GenerationRequest(prompt=PROMPT, num_inference_steps=500), on_step=lambda event: seen.set())
    thread.join()


def test_what_cannot_start_is_told_as_it_is() -> None:
    with pytest.raises(ModelNotFoundError, match="nowhere"):
        Engine("nowhere").__enter__()
    with pytest.raises(ConfigError, match="below the least"):
        Engine("demo", load=LoadConfig(offload="layerwise", max_weight_memory="1KiB", device="cpu")).__enter__()
    with pytest.raises(ConfigError, match="at most"):
        Engine("demo", parallel=ParallelConfig(data_parallel_size=10_000))


def test_memory_stays_flat(tmp_path: Path) -> None:
    engine = running()

    def run(count: int) -> int:
        for number in range(count):
            for event in engine.events(order(tmp_path, of_order={"num_partials": number % 2})):
                if number % 5 == 4 and isinstance(event, Step):
                    engine.cancel("one")
            with pytest.raises(RequestError):
                engine.generate(GenerationRequest(prompt=PROMPT, width=63))
        begun_s = time.monotonic()
        wait_until(lambda: time.monotonic() - begun_s > 0.7)  # a beat tells
        return engine.status().groups[0].ranks[0].host_bytes

    before = run(6)
    assert run(10) - before < 8 * 2**20


def test_closed_engines_take_nothing() -> None:
    engine = Engine("demo")
    with pytest.raises(NotReadyError, match="never started"):
        engine.wait_ready()
    engine.close()
    engine.close()
    with pytest.raises(NotReadyError, match="closed"):
        engine.generate(GenerationRequest(prompt=PROMPT))
    with pytest.raises(NotReadyError):
        engine.check(GenerationRequest(prompt=PROMPT)).result(1)


def test_closing_ends_what_runs_and_leaves_no_process(tmp_path: Path) -> None:
    engine = Engine("demo")
    heard: SimpleQueue[OrderEvent] = SimpleQueue()
    with engine:
        pid = engine.status().groups[0].ranks[0].pid
        engine.submit(order(tmp_path, num_inference_steps=2000), heard.put)
        engine.submit(order(tmp_path, "waits"), heard.put)
        while not isinstance(heard.get(timeout=30), Step):
            pass
    events = []
    while not heard.empty():
        events.append(heard.get())
    assert [event.failure.code for event in events if isinstance(event, Ended)] == ["engine_closed"] * 2
    assert not processes.is_running(pid)


def test_ranks_end_with_the_process_that_started_them(tmp_path: Path) -> None:
    code = (
        "import sys, time\nfrom penstock.engine.engine import Engine\nfrom penstock.config import ParallelConfig\n"
        "engine = Engine('demo', parallel=ParallelConfig(ulysses_degree=2)).__enter__()\n"
        "print(*(rank.pid for rank in engine.status().groups[0].ranks), 'torch' in sys.modules, flush=True)\n"
        "time.sleep(100)\n"
    )
    with processes.Process[str]([sys.executable, "-c", code], stdout=processes.PIPE, text=True) as process:
        assert process.stdout is not None
        *pids, has_torch = process.stdout.readline().split()
        assert len(pids) == 2 and has_torch == "False"
        process.kill()
        process.wait()
        wait_until(lambda: not any(processes.is_running(int(pid)) for pid in pids))


@pytest.mark.parametrize(
    ("number", "rank", "code"), [(signal.SIGKILL, 1, "rank_died"), (signal.SIGSTOP, 0, "rank_hung")]
)
def test_a_rank_that_dies_or_hangs_fails_what_ran_and_is_started_again(
    tmp_path: Path, number: signal.Signals, rank: int, code: str
) -> None:
    engine = running(ParallelConfig(ulysses_degree=2), rank_timeout_s=2.0)
    engine.wait_ready()
    before = engine.status().groups[0]
    events, struck_s = [], 0.0
    for event in engine.events(order(tmp_path, num_inference_steps=3000)):
        events.append(event)
        if isinstance(event, Step) and event.event.step == 3:
            struck_s = time.monotonic()
            os.kill(before.ranks[rank].pid, number)
    assert ending(events) == code
    assert time.monotonic() - struck_s < 5
    while any(processes.is_running(one.pid) for one in before.ranks):  # the system takes back what they held
        assert time.monotonic() - struck_s < 10
        time.sleep(0.01)
    assert made(list(engine.events(order(tmp_path))))
    after = engine.status().groups[0]
    assert after.num_restarts == before.num_restarts + 1
    assert after.message == "" and after.state == "idle"


def wait_until(condition: object, timeout_s: float = 30.0) -> None:
    deadline_s = time.monotonic() + timeout_s
    while not condition():  # type: ignore[operator]
        assert time.monotonic() < deadline_s
        time.sleep(0.02)


def test_a_forked_process_is_told_to_make_its_own(tmp_path: Path) -> None:
    engine = running()
    told, mouth = os.pipe()

    def submit() -> None:
        try:
            engine.submit(order(tmp_path), lambda event: None)
        except NotReadyError as error:
            os.write(mouth, str(error).encode())

    assert processes.forked(submit) == 0
    os.close(mouth)
    with open(told, "rb") as said:
        assert f"the engine is process {os.getpid()}'s" in said.read().decode()


def test_a_listener_may_close_the_engine(tmp_path: Path) -> None:
    ended: SimpleQueue[OrderEvent] = SimpleQueue()
    engine = Engine("demo", load=LoadConfig(device="cpu"))
    with engine:

        def close(event: OrderEvent) -> None:
            if isinstance(event, Began):
                engine.close()
            ended.put(event)

        engine.submit(order(tmp_path, num_inference_steps=500), close)
        while not isinstance(event := ended.get(timeout=20), Ended):
            pass
    assert event.failure is not None and event.failure.code == "engine_closed"
