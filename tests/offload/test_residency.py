"""Which units are on the device: states, rivals, errors, and what is put back."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from penstock.errors import GenerationError, WeightsError
from penstock.offload.cold import ColdTensor
from penstock.offload.residency import Residency, State, Tenant
from penstock.timeline import Timeline
from penstock.weights.memory import POISON
from tests.offload.toys import Scripted, residency_of

COLD, FILLING, READY, IN_USE = State.COLD, State.FILLING, State.READY, State.IN_USE


def states(tenants: list[Tenant]) -> list[State]:
    return [tenant.state for tenant in tenants]


def weight(tenant: Tenant) -> torch.Tensor:
    """What the module has now."""
    found = tenant.unit.module._parameters["weight"]
    assert found is not None
    return found


def value(tenant: Tenant) -> float:
    """The weight's one number; fetches a stand-in."""
    numbers = set(weight(tenant).tolist())
    assert len(numbers) == 1
    return numbers.pop()


def test_a_unit_goes_through_its_states() -> None:
    residency, transfer, (unit,) = residency_of([0])
    assert unit.state is COLD and isinstance(weight(unit), ColdTensor) and transfer.log == []
    assert residency.enter(unit) and unit.state is FILLING and isinstance(weight(unit), ColdTensor)
    assert residency.enter(unit)  # already on its way
    residency.ready(unit)
    assert unit.state is READY and weight(unit) is unit.live[0] and value(unit) == 0
    residency.use(unit)
    assert unit.state is IN_USE
    residency.release(unit)
    residency.release(unit)
    assert unit.state is READY
    residency._give_up(unit)
    residency._give_up(unit)
    assert unit.state is COLD and isinstance(weight(unit), ColdTensor)
    assert transfer.log == ["submit 0", "wait 0"]
    assert (residency.num_fills, residency.num_demanded) == (1, 0)


def test_what_is_on_the_device_is_a_view_of_one_place_for_ever() -> None:
    residency, _, (first, second) = residency_of([1, 1])
    addresses = set()
    for _ in range(3):
        for tenant in (first, second):
            residency.ready(tenant)
            addresses.add((tenant.name, weight(tenant).data_ptr()))
            assert isinstance(weight(tenant), nn.Parameter) and weight(tenant).requires_grad
    assert len(addresses) == 2
    base = residency.arena.tensor.data_ptr()
    assert all(base + 4096 <= address < base + 8192 for _, address in addresses)


def test_any_use_of_a_stand_in_brings_its_unit() -> None:
    residency, transfer, (first, second) = residency_of([0, 0])
    assert (value(first), value(second), value(first)) == (0, 1, 0)
    assert transfer.log == ["submit 0", "wait 0", "submit 1", "wait 1", "submit 0", "wait 0"]
    assert residency.num_demanded == residency.num_fills == 3


def test_filling_ends_the_stay_of_rivals_and_of_nobody_else() -> None:
    residency, _, tenants = residency_of([0, 0, 1])
    for tenant in (tenants[0], tenants[2], tenants[1]):
        residency.ready(tenant)
    assert states(tenants) == [COLD, READY, READY]
    assert [rival.name for rival in tenants[0].rivals] == ["1"]
    assert isinstance(weight(tenants[0]), ColdTensor)


def test_asking_ahead_disturbs_neither_use_nor_a_fill_and_demand_ends_the_fill() -> None:
    residency, transfer, (used, asked, filling, late) = residency_of([0, 0, 1, 1])
    residency.use(used)
    assert not residency.enter(asked) and asked.state is COLD
    residency.enter(filling)
    assert not residency.enter(late) and filling.state is FILLING
    residency.ready(late)
    assert (filling.state, late.state) == (COLD, READY) and value(late) == 3
    assert transfer.log[-3:] == ["cancel 2", "submit 3", "wait 3"]


def test_fill_that_nobody_used_makes_room_once_it_is_done() -> None:
    residency, transfer, (unused, late) = residency_of([0, 0])
    residency.enter(unused)
    transfer.done = True
    assert residency.enter(late) and (unused.state, late.state) == (COLD, FILLING)


def test_a_unit_demanded_under_a_running_rival_is_refused() -> None:
    residency, _, (outer, inner) = residency_of([0, 0])
    outer.unit.module.forward = lambda: residency.ready(inner)
    residency.use(outer)
    with pytest.raises(GenerationError, match="1 runs inside 0, .*larger max_weight_memory"):
        outer.unit.module()
    assert (outer.state, inner.state) == (IN_USE, COLD) and value(outer) == 0
    residency.release(outer)
    residency.ready(inner)
    assert value(inner) == 1


def test_a_rival_whose_call_was_interrupted_is_not_in_use_for_ever() -> None:
    residency, _, (interrupted, other) = residency_of([0, 0])
    residency.use(interrupted)  # torch runs no hook after a KeyboardInterrupt: no release
    residency.ready(other)
    assert states([interrupted, other]) == [COLD, READY] and value(other) == 1


@pytest.mark.parametrize("error", [WeightsError("gone"), OSError("odd"), SystemExit()], ids=lambda e: type(e).__name__)
def test_an_error_of_a_reader_leaves_the_unit_cold_and_usable_again(error: BaseException) -> None:
    residency, transfer, (unit,) = residency_of([0])
    transfer.errors = [error, error]
    for _ in range(2):
        with pytest.raises(type(error)):
            residency.use(unit)
        assert unit.state is COLD and isinstance(weight(unit), ColdTensor)
    assert value(unit) == 0


def test_a_changed_file_is_told_before_anything_is_filled() -> None:
    residency, transfer, (unit,) = residency_of([0])
    source = unit.source
    unit.source = broken = Scripted([])
    broken.error = WeightsError("changed while its weights are streamed")
    with pytest.raises(WeightsError, match="changed"):
        residency.ready(unit)
    assert unit.state is COLD and transfer.log == []
    unit.source = source
    assert value(unit) == 0


def test_after_an_interrupt_everything_is_given_up_and_filled_anew() -> None:
    residency, transfer, (unit,) = residency_of([0])
    transfer.errors = [KeyboardInterrupt()]
    with pytest.raises(KeyboardInterrupt):
        residency.ready(unit)
    assert unit.state is COLD
    assert value(unit) == 0
    assert transfer.log == ["submit 0", "wait 0", "cancel 0", "drain", "submit 0", "wait 0"]


def test_a_transfer_that_takes_no_fill_leaves_no_half_filled_unit(monkeypatch: pytest.MonkeyPatch) -> None:
    residency, transfer, (unit,) = residency_of([0])
    with monkeypatch.context() as patch:
        patch.setattr(transfer, "submit", lambda *_: (_ for _ in ()).throw(RuntimeError("closed")))
        for _ in range(2):
            with pytest.raises(RuntimeError, match="closed"):
                residency.use(unit)
    assert unit.state is COLD and residency.num_fills == 0 and value(unit) == 0


@pytest.mark.parametrize("when", ["cold", "ready"])
def test_what_somebody_else_put_there_is_left_alone(when: str) -> None:
    residency, _, (unit,) = residency_of([0])
    if when == "ready":
        residency.ready(unit)
    mine = nn.Parameter(torch.full((8,), 9.0))
    unit.unit.module.weight = mine
    residency.use(unit)
    assert weight(unit) is mine
    residency.release(unit)
    residency._give_up(unit)
    assert weight(unit) is mine
    residency.remove()
    assert weight(unit) is mine


def test_a_weight_that_was_deleted_stays_so() -> None:
    residency, _, (unit,) = residency_of([0])
    del unit.unit.module.weight
    residency.ready(unit)
    residency.remove()
    assert "weight" not in unit.unit.module._parameters


def test_remove_puts_the_very_weights_back_from_every_state() -> None:
    residency, transfer, tenants = residency_of([0, 1, 2, 3])
    residency.enter(tenants[1])
    residency.ready(tenants[2])
    residency.use(tenants[3])
    held = [tenant.cold[0] for tenant in tenants]
    residency.remove()
    assert states(tenants) == [COLD] * 4
    assert [cold[0].item() for cold in held] == [0, 1, 2, 3]  # a stand-in that somebody kept
    assert all(weight(tenant) is tenant.unit.weights[0].original for tenant in tenants)
    assert transfer.log[-1] == "cancel 1"


@pytest.mark.parametrize("is_checked", [True, False])
def test_proof_poisons_what_is_given_up(is_checked: bool) -> None:
    residency, _, (unit,) = residency_of([0], is_checked=is_checked)
    residency.ready(unit)
    live = weight(unit)
    with residency._operation():
        residency._give_up(unit)
    assert bool(torch.isnan(live).all()) is is_checked
    assert bool((residency.arena.tensor[:4096] == POISON).all()) is is_checked
    assert value(unit) == 0


def test_proof_finds_a_bad_fill_and_the_next_one_is_made_anew() -> None:
    residency, _, (_, unit) = residency_of([1, 0], is_checked=True)
    source, unit.source = unit.source, Scripted([])
    with pytest.raises(WeightsError, match="are not those of"):
        residency.use(unit)
    assert unit.state is COLD
    unit.source = source
    residency.use(unit)
    assert unit.state is IN_USE and value(unit) == 1


def test_peak_bytes_are_those_that_were_there_at_once() -> None:
    residency, _, tenants = residency_of([0, 0, 1, 1, 2])
    for tenant in [*tenants[:4], *tenants[:4]]:
        residency.ready(tenant)
    assert residency.peak_bytes == 2 * 4096
    residency.ready(tenants[4])
    assert residency.peak_bytes == 3 * 4096


def use_all(residency: Residency, tenants: list[Tenant]) -> None:
    for tenant in tenants:
        residency.use(tenant)
        residency.release(tenant)


def test_the_timeline_tells_stays_and_waits() -> None:
    timeline = Timeline()
    residency, _, tenants = residency_of([0, 0], timeline=timeline)
    use_all(residency, tenants)
    assert [(stay.unit, stay.num_bytes, stay.end_s is None) for stay in timeline.residences] == [
        ("0", 4096, False),
        ("1", 4096, True),
    ]
    waits = [span for span in timeline.spans if span.kind == "wait"]
    assert [span.unit for span in waits] == ["0", "1"]
    assert residency.exposed_wait_s == pytest.approx(sum(span.duration_s for span in waits))
