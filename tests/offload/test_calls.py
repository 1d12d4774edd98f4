from __future__ import annotations

import threading

from torch import nn

from penstock.offload.calls import is_in_call, is_running


class Asking(nn.Module):
    """Asks about itself, and about another, while it runs."""

    def __init__(self, other: nn.Module) -> None:
        super().__init__()
        self.others = [other]

    def forward(self) -> tuple[bool, bool, bool]:
        return is_running(self), is_running(self.others[0]), is_in_call(threading.get_ident())


def test_running_module_is_told_from_others() -> None:
    asking = Asking(nn.Linear(1, 1))
    assert asking() == (True, False, True)
    assert not is_running(asking) and not is_in_call(threading.get_ident())


def test_thread_that_has_ended_is_in_no_call() -> None:
    worker = threading.Thread(target=Asking(nn.Linear(1, 1)))
    worker.start()
    worker.join()
    assert worker.ident is not None and not is_in_call(worker.ident)
