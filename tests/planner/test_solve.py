"""Places in the arena: never more than the budget, nothing on top of what must stay, and as much at rest as fits."""

from __future__ import annotations

from dataclasses import replace
from itertools import combinations, pairwise
from random import Random

import pytest

from penstock.errors import ConfigError
from penstock.plan import Plan, UnitPlan
from penstock.planner.solve import Demand, Demands, budget_for, least_bytes, solve, spread
from penstock.profile import Role

ENCODER = Demand(name="text_encoder", role="encoder", rest=("text_encoder (rest)", 10),
                 blocks=tuple((f"text_encoder.layers.{number}", 20) for number in range(4)))  # fmt: skip
DENOISER = Demand(name="transformer", role="denoiser", rest=("transformer (rest)", 30),
                  blocks=tuple((f"transformer.blocks.{number}", 40) for number in range(10)))  # fmt: skip
VAE = Demand(name="vae", role="autoencoder", rest=("vae", 50))
ALL = Demands(
    offload="layerwise", device="cpu", components=(ENCODER, DENOISER, VAE), permanent=(("shared", 7),), fixed_bytes=5,
    reason="as asked for",
)  # fmt: skip


def demands_of(*components: Demand, **changes: object) -> Demands:
    return replace(ALL, **{"components": components, "permanent": (), "fixed_bytes": 0, **changes})


def denoiser(name: str, sizes: list[int], rest: int = 0) -> Demand:
    blocks = tuple((f"{name}.{number}", size) for number, size in enumerate(sizes))
    return Demand(name=name, role="denoiser", rest=(f"{name} (rest)", rest) if rest else None, blocks=blocks)


def units_of(plan: Plan, component: str) -> list[UnitPlan]:
    return [unit for unit in plan.units if unit.component == component]


def span(plan: Plan, component: str) -> tuple[int, int]:
    units = units_of(plan, component)
    return min(unit.begin for unit in units), max(unit.end for unit in units)


def require_sound(plan: Plan, demands: Demands, budget: int | None) -> None:
    """What holds for every plan."""
    assert plan.promised_bytes <= (plan.least_bytes if budget is None else budget)
    assert plan.weight_bytes == demands.num_bytes
    asked = {name: size for name, size in demands.permanent}
    for demand in demands.components:
        asked |= dict([*([demand.rest] if demand.rest else []), *demand.blocks])
    assert {unit.name: unit.num_bytes for unit in plan.units} == asked
    assert all(unit.begin >= 0 and unit.end <= plan.arena_bytes for unit in plan.units)
    assert not any(unit.begin % demands.alignment_bytes for unit in plan.units)
    permanent = {name for name, _ in demands.permanent}
    for one, other in combinations(plan.units, 2):
        if not one.overlaps(other):
            continue
        assert not {one.name, other.name} & permanent
        if one.component == other.component:
            assert one.slot is not None and one.slot == other.slot
        else:
            assert "resident" not in (one.residency, other.residency)
    for part, demand in zip(plan.components, demands.components, strict=True):
        units = units_of(plan, part.name)
        streamed = [unit for unit in units if unit.residency == "streamed"]
        assert (part.num_streamed, part.num_resident) == (len(streamed), len(demand.blocks) - len(streamed))
        assert [unit.slot for unit in streamed] == [number % part.num_slots for number in range(len(streamed))]
        assert [unit.name for unit in units] == [*([demand.rest[0]] if demand.rest else []), *dict(demand.blocks)]
        assert all(unit.slot is None for unit in units if unit.residency != "streamed")
        first, last = span(plan, part.name) if units else (0, 0)
        assert last - first <= part.device_bytes <= part.num_bytes == demand.num_bytes


def test_the_least_budget_works_and_one_byte_less_does_not() -> None:
    least = 5 + 7 + 30 + 2 * 40
    assert least_bytes(ALL, 1) == least
    plan = solve(ALL, least, prefetch=1)
    require_sound(plan, ALL, least)
    assert (plan.least_bytes, plan.promised_bytes, plan.budget_bytes) == (least, least, least)
    with pytest.raises(ConfigError, match="is below the least that works"):
        solve(ALL, least - 1, prefetch=1)


def test_no_budget_is_the_least() -> None:
    plan = solve(ALL, None, prefetch=1)
    assert (plan.units, plan.budget_bytes) == (solve(ALL, least_bytes(ALL, 1), prefetch=1).units, None)


@pytest.mark.parametrize(
    ("demands", "prefetch", "message"),
    [
        (
            ALL,
            1,
            "max_weight_memory=3 bytes (3 B) is below the least that works, 122 bytes (122 B) = 12 B that always stay "
            "+ 30 B of transformer outside its blocks + 80 B in 2 slots for its blocks, of which the largest, "
            "transformer.blocks.0, has 40 B. Try --max-weight-memory 122, or 'least' or --prefetch 0 with "
            "--max-weight-memory 82 or more.",
        ),
        (
            demands_of(denoiser("unet", [4, 9, 4, 9], rest=1)),
            0,
            "max_weight_memory=3 bytes (3 B) is below the least that works, 10 bytes (10 B) = 1 B of unet outside its "
            "blocks + 9 B in 1 slot for its blocks, of which the largest, unet.1, has 9 B. Try --max-weight-memory 10, "
            "or 'least'.",
        ),
        (
            demands_of(denoiser("unet", [4, 9, 4, 9], rest=1)),
            1,
            "max_weight_memory=3 bytes (3 B) is below the least that works, 14 bytes (14 B) = 1 B of unet outside its "
            "blocks + 13 B in 2 slots for its blocks, of which the largest, unet.1, has 9 B. Try --max-weight-memory "
            "14, or 'least' or --prefetch 0 with --max-weight-memory 10 or more.",
        ),
        (
            demands_of(VAE, replace(DENOISER, blocks=()), offload="sequential", fixed_bytes=2048),
            1,
            "max_weight_memory=3 bytes (3 B) is below the least that works, 2098 bytes (2.05 KiB) = 2 KiB that always "
            "stay + 50 B of vae as a whole. Try --max-weight-memory 2098, or 'least' or --offload layerwise.",
        ),
        (
            demands_of(permanent=(("shared", 7),)),
            0,
            "max_weight_memory=3 bytes (3 B) is below the least that works, 7 bytes (7 B) = 7 B that always stay. Try "
            "--max-weight-memory 7, or 'least'.",
        ),
    ],
)
def test_a_budget_that_is_too_small_is_refused_with_what_the_least_is_made_of(
    demands: Demands, prefetch: int, message: str
) -> None:
    with pytest.raises(ConfigError) as refusal:
        solve(demands, 3, prefetch)
    assert str(refusal.value) == message


def test_everything_that_fits_stays_and_one_byte_less_is_not_everything() -> None:
    plan = solve(ALL, ALL.num_bytes, prefetch=1)
    require_sound(plan, ALL, ALL.num_bytes)
    assert {unit.residency for unit in plan.units} == {"resident"}
    assert plan.promised_bytes == ALL.num_bytes
    assert not any(one.overlaps(other) for one, other in combinations(plan.units, 2))
    plan = solve(ALL, ALL.num_bytes - 1, prefetch=1)
    assert {unit.residency for unit in plan.units} != {"resident"}


def test_a_budget_beyond_all_weights_takes_no_more_than_they_need() -> None:
    assert solve(ALL, 10 * ALL.num_bytes, prefetch=1).promised_bytes == ALL.num_bytes


def test_the_denoiser_lies_at_the_begin_and_the_others_end_where_the_arena_ends() -> None:
    plan = solve(ALL, 5 + 7 + 430 + 50, prefetch=1)  # the autoencoder fits beside the denoiser, the encoder does not
    assert span(plan, "transformer") == (0, 430)
    assert span(plan, "vae") == (430, 480)
    assert span(plan, "text_encoder")[1] == 480
    by_name = {unit.name: unit.residency for unit in plan.units}
    assert by_name["vae"] == by_name["text_encoder.layers.3"] == "turn"
    assert by_name["transformer.blocks.0"] == "resident"
    assert by_name["transformer.blocks.9"] == "turn"
    assert (units_of(plan, "shared")[0].begin, units_of(plan, "shared")[0].residency) == (480, "resident")


def test_the_smallest_find_room_beside_the_denoiser_first() -> None:
    sizes = {"image_encoder": 90, "vae": 50, "vocoder": 40}
    others = [Demand(name=name, role="other", rest=(name, size)) for name, size in sizes.items()]
    plan = solve(demands_of(*others, DENOISER), 430 + 100, prefetch=1)
    assert {name: span(plan, name) for name in sizes} == {
        "image_encoder": (440, 530), "vae": (440, 490), "vocoder": (490, 530)
    }  # fmt: skip


@pytest.mark.parametrize(("room", "begins"), [(200, (0, 100)), (199, (0, 0)), (100, (0, 0))])
def test_two_denoisers_lie_on_top_of_each_other_unless_both_fit(room: int, begins: tuple[int, int]) -> None:
    demands = demands_of(denoiser("transformer", [25] * 4), denoiser("transformer_2", [25] * 4))
    plan = solve(demands, room, prefetch=1)
    require_sound(plan, demands, room)
    assert (span(plan, "transformer")[0], span(plan, "transformer_2")[0]) == begins
    kinds = {unit.residency for unit in plan.units}
    assert kinds == ({"resident"} if begins[1] else {"turn"})


@pytest.mark.parametrize("budget", [None, 60, 80, 100, 149, 150])
def test_sequential_components_take_turns_as_a_whole(budget: int | None) -> None:
    roles: list[tuple[str, Role]] = [("text_encoder", "encoder"), ("transformer", "denoiser"), ("vae", "autoencoder")]
    sizes = (40, 60, 50)
    parts = [Demand(name=name, role=role, rest=(name, size)) for (name, role), size in zip(roles, sizes, strict=True)]
    demands = demands_of(*parts, offload="sequential")
    plan = solve(demands, budget, prefetch=1)
    require_sound(plan, demands, budget)
    assert plan.promised_bytes == (budget or 60)
    assert not any(unit.residency == "streamed" for unit in plan.units)
    assert all(part.num_slots == 0 and part.device_bytes == part.num_bytes for part in plan.components)
    assert ({unit.residency for unit in plan.units} == {"resident"}) == (budget == 150)


@pytest.mark.parametrize("total", [1, 2, 3, 7, 10, 57])
def test_residents_are_spread_evenly(total: int) -> None:
    for count in range(total + 1):
        places = sorted(spread(count, total))
        assert len(places) == count
        assert all(0 <= place < total for place in places)
        gaps = {after - before for before, after in pairwise(places)}
        assert max(gaps, default=0) - min(gaps, default=0) <= 1
        if 0 < count <= total // 3:
            assert places[0] > 0 and places[-1] < total - 1


@pytest.mark.parametrize(
    ("num_blocks", "budget", "num_streamed"),
    [
        (10, 110, 10), (10, 189, 10), (10, 190, 8), (10, 269, 8), (10, 270, 6), (10, 350, 4), (10, 429, 4),
        (10, 430, 0), (11, 149, 11), (11, 150, 10), (11, 229, 10), (11, 230, 8),
    ],
)  # fmt: skip
def test_blocks_stream_in_whole_rounds_of_the_slots_as_soon_as_there_is_room(
    num_blocks: int, budget: int, num_streamed: int
) -> None:
    plan = solve(demands_of(denoiser("transformer", [40] * num_blocks, rest=30)), budget, prefetch=1)
    (part,) = plan.components
    assert (part.num_streamed, part.num_slots) == (num_streamed, 2 if num_streamed else 0)


@pytest.mark.parametrize("prefetch", [0, 1, 2, 5, 20])
def test_more_memory_never_means_fewer_residents(prefetch: int) -> None:
    demands = demands_of(DENOISER)
    counts = [
        solve(demands, budget, prefetch).components[0].num_resident
        for budget in range(least_bytes(demands, prefetch), demands.num_bytes + 1)
    ]
    assert counts == sorted(counts)
    assert counts[-1] == 10


@pytest.mark.parametrize("prefetch", [0, 1, 2, 9, 20])
@pytest.mark.parametrize("num_resident", range(11))
def test_the_budget_for_residents_gives_as_many_and_one_byte_less_does_not(num_resident: int, prefetch: int) -> None:
    def num_resident_with(budget: int) -> int:
        plan = solve(ALL, budget, prefetch)
        return next(part.num_resident for part in plan.components if part.name == "transformer")

    budget = budget_for(ALL, "transformer", num_resident, prefetch)
    assert num_resident_with(budget) >= num_resident
    if budget > least_bytes(ALL, prefetch):
        assert num_resident_with(budget - 1) < max(num_resident, 1)  # none at all still streams in whole rounds


def random_demands(random: Random) -> Demands:
    alignment = random.choice((1, 256, 4096))
    components = []
    for number in range(random.randint(1, 5)):
        role: Role = random.choice(("denoiser", "denoiser", "encoder", "autoencoder", "other"))
        name = f"part_{number}"
        kinds = [random.randint(1, 40) * alignment for _ in range(random.randint(1, 3))]
        count = random.choice((0, 0, 1, 2, 3, 7, 12, 30))
        rest = (f"{name} (rest)", random.randint(1, 99) * alignment) if random.random() < 0.8 or not count else None
        blocks = tuple((f"{name}.{block}", random.choice(kinds)) for block in range(count))
        components.append(Demand(name=name, role=role, rest=rest, blocks=blocks))
    permanent = tuple((f"kept_{number}", random.randint(1, 9) * alignment) for number in range(random.randint(0, 2)))
    return Demands(
        offload="layerwise", device="cpu", alignment_bytes=alignment, components=tuple(components),
        permanent=permanent, fixed_bytes=random.randint(0, 999), reason="",
    )  # fmt: skip


@pytest.mark.parametrize("seed", range(60))
def test_every_plan_is_sound(seed: int) -> None:
    random = Random(seed)
    demands, prefetch = random_demands(random), random.choice((0, 1, 1, 2, 3, 8))
    least = least_bytes(demands, prefetch)
    for budget in (None, least, demands.num_bytes, *(random.randint(least, demands.num_bytes) for _ in range(6))):
        plan = solve(demands, budget, prefetch)
        require_sound(plan, demands, budget)
        for demand, part in zip(demands.components, plan.components, strict=True):
            if part.num_slots and part.num_streamed % part.num_slots:  # only where there is no room for one round less
                left_over = part.num_streamed % part.num_slots
                assert part.num_resident == 0
                assert (budget or least) < budget_for(demands, demand.name, left_over, prefetch)
    assert {unit.residency for unit in solve(demands, demands.num_bytes, prefetch).units} == {"resident"}
    with pytest.raises(ConfigError, match=f"{least} bytes"):
        solve(demands, least - 1, prefetch)


@pytest.mark.parametrize("seed", range(60))
def test_the_budget_for_residents_is_enough_whatever_the_blocks_are(seed: int) -> None:
    random = Random(seed)
    demands, prefetch = random_demands(random), random.choice((0, 1, 1, 2, 3, 8))
    for number, demand in enumerate(demands.components):
        for wanted in {0, 1, len(demand.blocks) // 2, len(demand.blocks)} if demand.blocks else ():
            budget = budget_for(demands, demand.name, wanted, prefetch)
            assert solve(demands, budget, prefetch).components[number].num_resident >= wanted
