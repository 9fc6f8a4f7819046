"""How tokens are chosen: settings of a call, frozen and checked when made."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

from semsharekv_integrations.errors import check_fields, check_stop, is_number, is_share, is_whole, take_plain_numbers

MOST_DRAFT_TOKENS = 64
_LEAST_TEMPERATURE, _MOST_PENALTY = 1e-20, 1e10  # beyond, float32 has no room for logits any more


@dataclass(frozen=True)
class SamplingConfig:
    """How tokens are chosen, in transformers' terms.

    Attributes:
        max_new_tokens: most tokens to generate, at least 1.
        stop: strings that end the text; they are not part of it.
        temperature: 0 is greedy; above, logits are divided by it.
        top_p: share of probability mass kept, above 0 up to 1.
        top_k: number of likeliest tokens kept, or None for the model's own default.
        repetition_penalty: above 1 discourages tokens seen before; None for the model's own default.
        seed: seed of this call's own random generator, or None for a fresh one.
        prompt_lookup: whether tokens that once followed the latest ones, in the prompt, the answer or the stored texts
            that the call reuses, are tried several in one pass. True where it likely saves time, a number of tokens
            wherever such are found, False never. The tokens of the answer are the same. Not in mode ``off``.
    """

    max_new_tokens: int = 256
    stop: tuple[str, ...] = ()
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int | None = None
    repetition_penalty: float | None = None
    seed: int | None = None
    prompt_lookup: bool | int = True

    def __post_init__(self) -> None:
        take_plain_numbers(self)
        check = partial(check_fields, self, "")
        check("1 or more", lambda value: is_whole(value, 1), "max_new_tokens")
        check_stop(self.stop)
        accepted = f"0 or more, but nothing between 0 and {_LEAST_TEMPERATURE:g}"
        check(accepted, lambda value: is_number(value) and (value == 0 or value >= _LEAST_TEMPERATURE), "temperature")
        check("above 0, up to 1", lambda value: is_share(value) and value != 0, "top_p")
        check("None or 1 or more", lambda value: value is None or is_whole(value, 1), "top_k")
        accepted = f"None or {1 / _MOST_PENALTY:g} to {_MOST_PENALTY:g}"
        check(accepted, lambda value: value is None or _is_penalty(value), "repetition_penalty")
        accepted = "None or an integer from 0 to 2**63 - 1"
        check(accepted, lambda value: value is None or (is_whole(value, 0) and value < 2**63), "seed")
        accepted = f"True, False, or 1 to {MOST_DRAFT_TOKENS} tokens"
        check(accepted, lambda v: isinstance(v, bool) or (is_whole(v, 1) and v <= MOST_DRAFT_TOKENS), "prompt_lookup")


def _is_penalty(value: object) -> bool:
    return is_number(value) and 1 / _MOST_PENALTY <= value <= _MOST_PENALTY  # type: ignore[operator]
