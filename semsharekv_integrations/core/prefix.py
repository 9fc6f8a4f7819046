"""Exact prefixes: how far two token sequences agree from the start."""

from __future__ import annotations

import numpy as np

from semsharekv_integrations.kv import TokenIds


def common_prefix_tokens(first: TokenIds, second: TokenIds) -> int:
    """Number of leading tokens that are equal, of sequences [T] and [S]."""
    shared = min(len(first), len(second))
    different = np.flatnonzero(first[:shared] != second[:shared])
    return int(different[0]) if different.size else shared
