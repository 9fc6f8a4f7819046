"""ROUGE-L of summaries, by Google's ``rouge-score``. It sees words in common, not whether a number is the right one."""

from __future__ import annotations

from functools import cache
from typing import Any

from semsharekv_integrations.lab.extra import imported


def rouge_l(said: str, expected: str) -> float:
    """F1 of the longest common subsequence of stemmed words, 0 to 1.

    Raises:
        MissingPackageError: if ``rouge-score`` is not installed.
    """
    return float(_scorer().score(expected, said)["rougeL"].fmeasure)


@cache
def _scorer() -> Any:
    module = imported("rouge_score.rouge_scorer", "ROUGE-L of summaries")
    return module.RougeScorer(["rougeL"], use_stemmer=True)
