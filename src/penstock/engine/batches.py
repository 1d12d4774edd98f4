"""Which orders may run as one batch: the same shapes and settings, another prompt and seed each.

Owns that rule; torch-free, as the engine asks it. Does not know how a batch runs.
"""

from __future__ import annotations

from dataclasses import replace

from penstock.wire import Order


def goes_with(first: Order, other: Order) -> bool:
    """Whether two orders can be made by one call of the pipeline.

    Input pictures, several pictures of one order, and pictures of unfinished latents keep an order to itself; so does
    a negative prompt where the other has none.
    """
    if not (_is_plain(first) and _is_plain(other)):
        return False
    if (first.format, first.loras) != (other.format, other.loras):
        return False
    if (first.request.negative_prompt is None) != (other.request.negative_prompt is None):
        return False
    shown = replace(
        other.request, **{name: getattr(first.request, name) for name in ("prompt", "negative_prompt", "seed")}
    )
    return shown == first.request


def _is_plain(order: Order) -> bool:
    request = order.request
    return (
        request.prompt is not None
        and request.num_images == 1
        and request.image is None
        and not request.pictures
        and not order.num_partials
    )
