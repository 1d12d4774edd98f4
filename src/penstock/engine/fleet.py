"""All groups of ranks of an engine, and the thread that runs them: it hears, minds, hands out.

    step: hear what ranks say -> mind those that died or went silent -> hand orders to groups that are idle

Owns every change of a group's state; other threads only leave wishes and read. Does not know how orders are queued
(`Tasks`), how processes are run (`RankGroup`), or how a rank does its work.
"""

from __future__ import annotations

import itertools
import math
import threading
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import replace
from typing import Any

import msgspec

from penstock import errors
from penstock.config import LoadConfig, ParallelConfig
from penstock.engine.post import Post
from penstock.engine.processes import require_startable
from penstock.engine.rankgroup import Rank, RankGroup, WorkConfig, how_it_ended
from penstock.engine.status import EngineConfig, EngineStatus, GroupStatus, RankStatus
from penstock.engine.tasks import Listener, Tasks
from penstock.errors import EngineError, NotReadyError, PenstockError, UsageError
from penstock.request import GenerationRequest
from penstock.wire import (
    Beat,
    Cancel,
    Check,
    Checked,
    Close,
    Failure,
    FromRank,
    Idle,
    Loading,
    Order,
    Ready,
    Refused,
    Run,
    require_plain,
)

_TICK_MS = 100
_PAUSE_S = 1.0  # between two steps, after which this process counts as having stood still
_GRACE_S = 5.0
_Answer = Future[Checked]


class Fleet:
    """The groups of ranks of one model; see `Engine`, which is its face.

    Args:
        model: what ranks load.
        parallel: how the work is split.
        load: how the model is loaded.
        config: limits.
        clock: tells seconds.

    Attributes:
        description: what the pipeline is, once a group was ready.

    Raises:
        ConfigError: for more ranks than this machine can reasonably have.
    """

    def __init__(
        self,
        model: str,
        parallel: ParallelConfig,
        load: LoadConfig,
        config: EngineConfig,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        require_startable(parallel.world_size, parallel.equation())
        self.description: dict[str, Any] | None = None
        self._config, self._clock, self._stepped_s = config, clock, math.inf
        self._post = Post()
        num_groups = parallel.data_parallel_size
        one = replace(parallel, data_parallel_size=1)
        work = WorkConfig(address="", name="", model=model, load=load, parallel=one)
        self._groups = [RankGroup(number, num_groups, work, clock) for number in range(num_groups)]
        self._tasks = Tasks(config.max_queue, num_groups)
        self._lock = threading.RLock()
        self._settled = threading.Event()  # a group was ready, or none ever will be
        self._refusal: PenstockError | None = None
        self._broken = ""
        self._early: list[RankGroup] = []
        self._is_closed = False
        self._cancelled: deque[str] = deque()
        self._asked: deque[tuple[GenerationRequest, _Answer]] = deque()
        self._checks: dict[int, tuple[str, _Answer]] = {}
        self._numbers = itertools.count()

    # ---- called from any thread

    def wait_ready(self, timeout_s: float | None) -> None:
        """See `Engine.wait_ready`."""
        if not self._settled.wait(timeout_s):
            raise EngineError(
                f"no group of ranks was ready after {timeout_s} s: {self._groups[0].message or 'loading'}."
            )
        if self._refusal is not None and self.description is None:
            raise self._refusal
        if self._is_closed:
            raise NotReadyError("the engine is closed. Make a new one.")

    def submit(self, order: Order, listener: Listener) -> None:
        """See `Engine.submit`."""
        require_plain(order.request)
        with self._lock:
            self._require_open()
            self._tasks.put(order, listener)
        self._post.wake()

    def require_room(self) -> None:
        """See `Engine.require_room`."""
        with self._lock:
            self._require_open()
            self._tasks.require_room()

    def cancel(self, order_id: str) -> None:
        """See `Engine.cancel`."""
        self._cancelled.append(order_id)
        self._post.wake()

    def check(self, request: GenerationRequest) -> _Answer:
        """See `Engine.check`."""
        answer: _Answer = Future()
        answer.set_running_or_notify_cancel()  # whoever no longer waits for it leaves it be
        with self._lock:
            try:
                self._require_open()
                require_plain(request)
            except PenstockError as error:
                answer.set_exception(error)
                return answer
            self._asked.append((request, answer))
        self._post.wake()
        return answer

    def position(self, order_id: str) -> tuple[int, float] | None:
        """See `Engine.position`."""
        with self._lock:
            return self._tasks.position(order_id)

    def status(self) -> EngineStatus:
        """See `Engine.status`."""
        with self._lock:
            return EngineStatus(
                groups=[self._status_of(group) for group in self._groups],
                queue_depth=self._tasks.num_waiting,
                steps_per_s=self._tasks.steps_per_s,
            )

    def close(self) -> None:
        """Have the thread end everything; see `Engine.close`."""
        self._is_closed = True
        self._settled.set()
        self._post.wake()

    def _require_open(self) -> None:
        if self._broken:
            raise NotReadyError(self._broken)
        if self._is_closed:
            raise NotReadyError("the engine is closed. Make a new one.")
        if self.description is None:
            raise NotReadyError("no group of ranks is ready yet. Wait for it, or ask again in some seconds.")
        if all(group.state == "failed" for group in self._groups):
            raise NotReadyError(f"all groups of ranks have failed for good: {self._groups[0].message}")

    def _status_of(self, group: RankGroup) -> GroupStatus:
        now_s = self._clock()
        ranks = [
            RankStatus(
                rank=rank.number,
                pid=rank.process.pid,
                state="dead" if rank.process.returncode is not None else "alive" if rank.is_ready else "starting",
                beat_age_s=round(now_s - rank.heard_s, 3),
                device_bytes=rank.device_bytes,
                host_bytes=rank.host_bytes,
            )
            for rank in group.ranks
        ]
        return GroupStatus(
            number=group.number,
            state=group.state,
            ranks=ranks,
            num_restarts=max(0, group.num_restarts),
            order_ids=self._tasks.of_group(group.number),
            message=group.message,
        )

    # ---- the engine's thread

    def run(self) -> None:
        """Run until `close`; the ranks live as long as the thread that calls this."""
        try:
            address = self._post.open()
            for group in self._groups:
                group.work = msgspec.structs.replace(group.work, address=address)
            while not self._is_closed:
                self.step()
        except Exception as error:
            self._broken = f"the engine's own thread failed ({type(error).__name__}: {error}). Make a new one."
            raise
        finally:
            self._shut()

    def step(self) -> None:
        """Hear, mind, hand out; waits at most a tenth of a second."""
        heard = self._post.hear(_TICK_MS)
        now_s = self._clock()
        paused_s, self._stepped_s = now_s - self._stepped_s, now_s
        with self._lock:
            if paused_s > _PAUSE_S:
                for group in self._groups:
                    group.excuse(paused_s)
            for name, message in heard:
                self._take_in(name, message)
            for group in self._groups:
                self._mind(group)
            self._grant()
            self._hand_out()

    def _take_in(self, name: str, message: FromRank) -> None:
        """Note what a rank says; one that was replaced meanwhile says nothing any more."""
        found = [(group, rank) for group in self._groups for rank in group.ranks if rank.name == name]
        if not found:
            return
        group, rank = found[0]
        rank.heard_s = self._clock()
        match message:
            case Beat():
                rank.device_bytes, rank.host_bytes = message.device_bytes, message.host_bytes
            case Loading():
                group.message = f"loading {message.component}: {message.done_bytes} of {message.total_bytes} bytes"
            case Ready():
                rank.is_ready = True
                self._welcome(group, message)
            case Refused():
                self._refuse(group, message)
            case Checked():
                _, answer = self._checks.pop(message.number)
                answer.set_result(message)
            case Idle():
                rank.rest()
                if not any(other.is_working for other in group.ranks):
                    group.state = "idle"
                    group.succeed()
                    self._tasks.finish(group.number)
            case _:
                group.moved_s = rank.heard_s
                self._tasks.tell(message)

    def _welcome(self, group: RankGroup, message: Ready) -> None:
        """Let a group work once all of its ranks are ready."""
        device = message.pipeline["effective"]["device"].partition(":")[0]
        known = (self.description or message.pipeline)["effective"]["device"].partition(":")[0]
        if device != known:
            self._end_for_good(
                group, f"its ranks run on {device}, those of other groups on {known}. Start fewer groups."
            )
        elif all(rank.is_ready for rank in group.ranks):
            group.state, group.message = "idle", ""
            self.description = self.description or message.pipeline
            while self._early:  # it works: what happened to them was theirs alone
                early = self._early.pop()
                early.fall(early.message)
            self._settled.set()

    def _refuse(self, group: RankGroup, message: Refused) -> None:
        """End a group whose ranks cannot start; try again where that may help."""
        kind = getattr(errors, message.kind, EngineError)
        if self.description is None:
            self._refusal = kind(message.message)
        if self.description is None or issubclass(kind, UsageError):
            self._end_for_good(group, message.message)
        else:
            self._restart(group, Failure(code="rank_died", message=message.message))

    def _mind(self, group: RankGroup) -> None:
        """Start what is due, and end what died, hangs, or does not get ready."""
        now_s = self._clock()
        is_gone = group.is_gone()
        if group.state == "restarting" and now_s >= group.due_s and is_gone:
            try:
                group.start()
            except OSError as error:
                why = f"its ranks could not be started: {error.strerror or error}"
                self._restart(group, Failure(code="rank_died", message=why))
        if group.state in ("restarting", "failed"):
            return
        for rank in group.ranks:
            rank.forget()
        dead = group.first_dead()
        silent = group.first_silent(self._config.rank_timeout_s, self._config.step_timeout_s)
        if dead is not None:
            self._restart(group, Failure(code="rank_died", message=f"{how_it_ended(dead)}. Ask again."))
        elif silent is not None:
            why = f"{group.silence_of(silent)}, and was ended. Ask again, or give a larger --rank-timeout-s."
            self._restart(group, Failure(code="rank_hung", message=why))
        elif group.state == "starting" and now_s - group.begun_s > self._config.start_timeout_s:
            late = f"its ranks were not ready after {self._config.start_timeout_s:g} s ({group.message or 'no word'})"
            self._restart(group, Failure(code="rank_hung", message=f"{late}. Give a larger --start-timeout-s."))
        elif group.state == "busy" and now_s - group.moved_s > self._config.step_timeout_s:
            still = f"no step for {self._config.step_timeout_s:g} s: the ranks were ended"
            self._restart(
                group, Failure(code="rank_hung", message=f"{still}. Give a larger --step-timeout-s, or ask again.")
            )

    def _restart(self, group: RankGroup, failure: Failure) -> None:
        """End a group that failed, and what it worked on; it is started again, unless none has ever worked."""
        if self.description is None:
            self._refusal = self._refusal or EngineError(f"the ranks could not be started: {failure.message}")
            self._early.append(group)
            self._end_for_good(group, failure.message)
            return
        names = [rank.name for rank in group.ranks]
        group.fall(failure.message)
        self._let_go(group, names, failure)

    def _end_for_good(self, group: RankGroup, message: str) -> None:
        names = [rank.name for rank in group.ranks]
        group.fail(message)
        failure = Failure(code="rank_died", message=message)
        self._let_go(group, names, failure)
        if all(other.state == "failed" for other in self._groups):
            self._refusal = self._refusal or EngineError(message)
            self._tasks.fail_waiting(failure)
            self._settled.set()

    def _let_go(self, group: RankGroup, names: list[str], failure: Failure) -> None:
        """End what the ranks of a group were asked: they are gone."""
        self._tasks.fail(group.number, failure)
        for number, (name, answer) in list(self._checks.items()):
            if name in names:
                del self._checks[number]
                answer.set_exception(NotReadyError(failure.message))

    def _grant(self) -> None:
        """Do what other threads have wished: end orders, ask ranks."""
        while self._cancelled:
            order_id = self._cancelled.popleft()
            number = self._tasks.cancel(order_id)
            if number is not None:
                self._tell(self._groups[number].ranks, Cancel(order_id))
        while self._asked:
            request, answer = self._asked.popleft()
            ready = [group for group in self._groups if group.state in ("idle", "busy")]
            if not ready:
                answer.set_exception(NotReadyError("no group of ranks is ready at present. Ask again in some seconds."))
                continue
            rank, number = min(ready, key=lambda group: group.state == "busy").ranks[0], next(self._numbers)
            self._checks[number] = rank.name, answer
            self._post.send(rank.name, Check(number, request))

    def _hand_out(self) -> None:
        """Give the next orders to groups that are idle."""
        for group in self._groups:
            orders = self._tasks.take(group.number, self._config.max_batch_size) if group.state == "idle" else []
            if not orders:
                continue
            group.state, group.moved_s = "busy", self._clock()
            for rank in group.ranks:
                rank.is_working = True
            self._tell(group.ranks, Run(tuple(orders)))

    def _tell(self, ranks: list[Rank], message: Run | Cancel | Close) -> None:
        for rank in ranks:
            self._post.send(rank.name, message)

    def _shut(self) -> None:
        """End all orders and ranks; what asks later is refused."""
        with self._lock:
            self._is_closed = True
            for group in self._groups:
                self._tell(group.ranks, Close())
        deadline_s = time.monotonic() + _GRACE_S
        for group in self._groups:  # nobody waits for the lock meanwhile
            group.wait(deadline_s if group.state in ("idle", "busy") else 0)
        failure = Failure(code="engine_closed", message="The engine was closed before the request was done.")
        with self._lock:
            for group in self._groups:
                names = [rank.name for rank in group.ranks]
                group.fail("the engine is closed")
                self._let_go(group, names, failure)
            self._tasks.fail_waiting(failure)
            while self._asked:
                self._asked.popleft()[1].set_exception(NotReadyError("the engine is closed. Make a new one."))
            self._post.close()
            self._settled.set()
        for group in self._groups:
            group.wait(math.inf)
            group.is_gone()
