"""How much each layer gets where it changes exponentially with depth, as budgets do in SemShareKV."""

from __future__ import annotations


def geometric_shares(num_layers: int, first: float, last: float) -> tuple[float, ...]:
    """One share for each layer, from ``first`` to ``last``, by the same factor from layer to layer.

    Neither is negative. A ``last`` of 0 leaves nothing after the first layer.
    """
    if num_layers == 1:
        return (first,)
    if first == 0 or last == 0:
        return (first, *[0.0] * (num_layers - 1))
    factor = (last / first) ** (1 / (num_layers - 1))
    return tuple(first * factor**layer for layer in range(num_layers))
