"""Timelines as a streamer would write them."""

from __future__ import annotations

from penstock.timeline import Timeline

MIB = 2**20


def streamed(
    num_encoder: int = 4, num_blocks: int = 12, num_steps: int = 4, num_residents: int = 3, num_slots: int = 2
) -> Timeline:
    """An encoder's blocks once, denoising steps over a stack of which some blocks stay, then a VAE."""
    timeline = Timeline()
    queue = [(f"text_encoder.encoder.block.{index}", 48 * MIB, 0.004) for index in range(num_encoder)]
    blocks = [(f"transformer.transformer_blocks.{index}", 64 * MIB, 0.009) for index in range(num_blocks)]
    stays = {unit for unit, _, _ in blocks[:: -(-num_blocks // num_residents)]} if num_residents else set()
    queue += blocks * num_steps
    queue.append(("vae.decoder", 90 * MIB, 0.06))
    now_s = read_s = timeline.begin_s + 0.01
    slots: list[tuple[str, float]] = []  # units that stream, and when their forward ended
    here: set[str] = set()
    for number, (unit, num_bytes, compute_s) in enumerate(queue):
        ready_s = now_s
        if unit not in here:
            if unit not in stays and len(slots) == num_slots:
                old, free_s = slots.pop(0)
                read_s = max(read_s, free_s)
                timeline.left(old, read_s)
                here.discard(old)
            ready_s = read_s + num_bytes / (7_000 * MIB)
            timeline.entered(unit, num_bytes, read_s)
            timeline.add("fill", unit, read_s, ready_s, f"reader-{number % 2}", num_bytes)
            read_s = ready_s
            here.add(unit)
        if ready_s > now_s:
            timeline.add("wait", unit, now_s, ready_s)
            now_s = ready_s
        timeline.add("compute", unit, now_s, now_s + compute_s)
        now_s += compute_s
        if unit not in stays:
            slots.append((unit, now_s))
    for unit in here:
        timeline.left(unit, now_s)
    return timeline
