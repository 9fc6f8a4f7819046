"""Chooses the tokens of one answer from logits: what is done to them, how one is drawn, and what ends the answer.

Logits processors and stopping criteria are transformers' own: ``generate`` only prepares them and hands them back. So
sampling options mean exactly what they mean in transformers, while the prefill and the loop are ours. Knows nothing
about caches. On an accelerator the host waits once for each token.
"""

from __future__ import annotations

import copy
import secrets
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessorList, StoppingCriteriaList
from transformers.generation import EosTokenCriteria, MaxLengthCriteria, MaxTimeCriteria

from semsharekv_integrations.kv import TokenIds
from semsharekv_integrations.model.adapter import ModelAdapter
from semsharekv_integrations.model.transfers import send
from semsharekv_integrations.sampling import SamplingConfig
from semsharekv_integrations.text.grammar import Constraint, ConstraintCriterion, ConstraintProcessor

_BY_IDS = {MaxLengthCriteria, MaxTimeCriteria, EosTokenCriteria, ConstraintCriterion}  # look at no scores
# Processors that say the same however often they are asked; others keep a state, or are not known.
_REPEATABLE = {
    *("ConstraintProcessor", "EpsilonLogitsWarper", "EtaLogitsWarper", "ExponentialDecayLengthPenalty"),
    *("ForcedBOSTokenLogitsProcessor", "ForcedEOSTokenLogitsProcessor", "InfNanRemoveLogitsProcessor"),
    *("LogitNormalization", "MinLengthLogitsProcessor", "MinNewTokensLengthLogitsProcessor", "MinPLogitsWarper"),
    *("NoBadWordsLogitsProcessor", "NoRepeatNGramLogitsProcessor", "RepetitionPenaltyLogitsProcessor"),
    *("SequenceBiasLogitsProcessor", "SuppressTokensAtBeginLogitsProcessor", "SuppressTokensLogitsProcessor"),
    *("TemperatureLogitsWarper", "TopKLogitsWarper", "TopPLogitsWarper", "TypicalLogitsWarper"),
}
_SLACK = {torch.float32: 1e-3, torch.float64: 1e-9}  # of the logits' spread, for what passes of several tokens round
_COARSE_SLACK = 0.1  # in dtypes of fewer bits


class Choice(NamedTuple):
    """A token that was chosen.

    Attributes:
        token_id: as a plain number.
        token: the same where the model is, [B].
        scores: the processed scores that it was chosen from, [B, V].
        is_sure: whether rounding cannot have decided.
    """

    token_id: int
    token: Tensor
    scores: Tensor
    is_sure: bool = True


class TokenChooser:
    """Chooses one token after another, and knows when the answer ends.

    Args:
        prompt_ids: [T]; penalties on repetition look at them.
        sampling: how tokens are chosen, ``max_new_tokens`` already within the context window.
        constraint: what the answer is held to, or None. It is told of every token.

    Attributes:
        ids: of the prompt and the answer so far, [B, T], where the model is.
    """

    def __init__(
        self, adapter: ModelAdapter, prompt_ids: TokenIds, sampling: SamplingConfig, constraint: Constraint | None
    ) -> None:
        self._adapter = adapter
        self._constraint = constraint
        self._host_ids = torch.from_numpy(prompt_ids)[None]  # [B, T], as criteria read them
        self.ids = send(self._host_ids, adapter.device)
        self._temperature = sampling.temperature
        self._greedy = sampling.temperature == 0
        self._drawn: Tensor | None = None  # what the next token is drawn by, until it is added
        self._process, criteria = self._prepare(sampling)
        self._by_ids = StoppingCriteriaList(each for each in criteria if type(each) in _BY_IDS)
        self._by_scores = StoppingCriteriaList(each for each in criteria if type(each) not in _BY_IDS)
        seed = secrets.randbits(63) if sampling.seed is None else sampling.seed  # torch's own needs a file handle
        self._random = torch.Generator(device=adapter.device).manual_seed(seed)

    @property
    def is_repeatable(self) -> bool:
        """Whether a token may be chosen twice: no processor counts how often it is asked."""
        found = {type(each).__name__ for each in self._process}
        return found <= _REPEATABLE and all(_is_known(each) for each in self._process)

    def choose(self, logits: Tensor, *, is_verified: bool = False) -> Choice:
        """Return the next token: the best one of ``logits`` [B, V] at temperature 0, else one that is drawn.

        If ``is_verified``, the logits are of a pass of several tokens, which rounds otherwise than one of this token:
        ``is_sure`` then says whether that is too little to matter. Asked again, this draws the same.

        Raises:
            RuntimeError: if there are no probabilities to draw by.
        """
        with torch.inference_mode():
            plain = logits.float().to(self.ids.device)
            scores = self._process(self.ids, plain)  # [B, V]
            shares = None if self._greedy else scores.softmax(-1)
            ranked = scores if shares is None else self._race(shares)
            token = ranked.argmax(-1)
            is_sound = torch.ones_like(token) if shares is None else (shares >= 0).all(-1).long()
            facts = [token, is_sound, *([self._is_sure(ranked, plain, logits.dtype)] if is_verified else [])]
            token_id, sound, *sure = torch.cat(facts).tolist()  # for which the host waits, once
        if not sound:  # as torch.multinomial says it, which would wait twice more to find out
            raise RuntimeError("probability tensor contains either `inf`, `nan` or element < 0")
        return Choice(token_id, token, scores, all(sure))

    def add(self, choice: Choice) -> bool:
        """Append the token to the answer; return whether it is the last one."""
        self._drawn = None
        here, there = self._host_ids, self.ids
        self.ids = torch.cat([there, choice.token[None]], dim=1)
        self._host_ids = self.ids if here is there else torch.cat([here, torch.tensor([[choice.token_id]])], dim=1)
        ends = bool(self._by_ids(self._host_ids, choice.scores).all())
        return bool(self._by_scores and self._by_scores(self.ids, choice.scores).all()) or ends

    def is_whole(self, last_id: int) -> bool:
        """Return True if ``last_id`` is an end-of-sequence token, or if the constraint is complete by now."""
        return last_id in self._adapter.end_ids or (self._constraint is not None and self._constraint.is_complete)

    def _race(self, shares: Tensor) -> Tensor:
        """Return what is highest where a token drawn by ``shares`` [B, V] is: each over a draw of its own.

        This is how ``torch.multinomial`` draws one of several, from the same generator the same one.
        """
        if self._drawn is None:
            self._drawn = torch.empty_like(shares).exponential_(1, generator=self._random)
        return shares / self._drawn

    def _is_sure(self, ranked: Tensor, logits: Tensor, dtype: torch.dtype) -> Tensor:
        """Return [B] of 1 where the best of ``ranked`` [B, V] leads by more than the rounding of ``logits``."""
        first, second = ranked.topk(2).values.unbind(-1)
        lead = first - second if self._greedy else (first / second).log() * self._temperature
        return (lead > _SLACK.get(dtype, _COARSE_SLACK) * logits.std(-1)).long()

    def _prepare(self, sampling: SamplingConfig) -> tuple[LogitsProcessorList, StoppingCriteriaList]:
        """Return what ``generate`` prepares to process and stop by, the constraint's included; generates nothing."""

        def hand_back(*_: Any, logits_processor: Any, stopping_criteria: Any, **__: Any) -> tuple[Any, Any]:
            return logits_processor, stopping_criteria

        # which puts the model's own in place of None, unless that is said apart from the configuration
        apart = {"stop_strings": None} if self._adapter.stop_strings else {}
        return self._adapter.model.generate(
            self.ids,
            attention_mask=torch.ones_like(self.ids),
            custom_generate=hand_back,
            logits_processor=LogitsProcessorList([ConstraintProcessor(self._constraint)] if self._constraint else []),
            stopping_criteria=StoppingCriteriaList([ConstraintCriterion(self._constraint)] if self._constraint else []),
            generation_config=self._configure(sampling),
            **apart,
        )

    def _configure(self, sampling: SamplingConfig) -> GenerationConfig:
        """Return a copy of the model's settings with the caller's put in; top_k or penalty of None changes nothing."""
        config = copy.deepcopy(self._adapter.model.generation_config)
        config.update(max_new_tokens=sampling.max_new_tokens, max_length=None, stop_strings=None)
        config.update(num_beams=1, num_return_sequences=1, do_sample=not self._greedy)
        config.update(cache_implementation=None, use_cache=False)  # generate would make one, which nobody needs
        if self._greedy:
            config.update(temperature=None, top_p=None, top_k=None, min_p=None, typical_p=None)
        else:
            config.update(temperature=sampling.temperature, top_p=sampling.top_p)
            if sampling.top_k is not None:
                config.update(top_k=sampling.top_k)
        if sampling.repetition_penalty is not None:
            config.update(repetition_penalty=sampling.repetition_penalty)
        return config


def _is_known(processor: object) -> bool:
    """Return whether the class is transformers' or ours, and no other of the same name."""
    return type(processor).__module__.split(".")[0] in ("transformers", __name__.split(".")[0])
