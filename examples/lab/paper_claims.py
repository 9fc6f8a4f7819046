"""Look at what SemShareKV (arXiv 2509.24832) rests on, in a real model, without generating anything.

    PYTHONPATH=. python examples/lab/paper_claims.py --dialogues said.json --rewritten rewritten.json --model FOLDER

For some dialogues and their rewritten forms it prints, as Markdown: the paper's similarity of the two and of unlike
dialogues, on plain embeddings and on rotated ones; how many tokens are matched with an equal one, and how many with the
one behind their neighbour's, with and without rotation; how well each layer's deviations of borrowed KV rank as those
of the layer before (Spearman); and which share of the tokens receives 55% of all attention, by depth.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from random import Random
from statistics import median
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import AutoModelForCausalLM, AutoTokenizer

from paper_protocol import change_turns, read_dialogues
from semsharekv_integrations.kv import Rotation, rotate
from semsharekv_integrations.reuse.matching import (
    compute_paper_similarity,
    find_nearest_tokens,
    measure_hamming_distance,
    rotate_embeddings,
)
from semsharekv_integrations.reuse.selection import measure_deviation

RECOVERED = 0.55  # of the attention, as two readings have it
Vectors = torch.Tensor
KV = tuple[torch.Tensor, torch.Tensor]


class Reading(NamedTuple):
    """What a model computes of one text: token ids [T], keys and values by layer, attention received by layer [T]."""

    token_ids: torch.Tensor
    layers: Sequence[KV]
    received: Sequence[torch.Tensor]


@torch.inference_mode()
def read_text(model: Any, token_ids: torch.Tensor) -> Reading:
    """One full prefill."""
    found = model(token_ids[None], use_cache=True, output_attentions=True)
    layers = [(layer.keys, layer.values) for layer in found.past_key_values.layers]
    return Reading(token_ids, layers, [weights[0].float().mean(0).sum(0) for weights in found.attentions])


def rank_alike(one: torch.Tensor, other: torch.Tensor) -> float:
    """Spearman's correlation of two sets of numbers, without regard for ties."""
    ranks = [np.argsort(np.argsort(values.numpy())) for values in (one, other)]
    return float(np.corrcoef(*ranks)[0, 1])


def recover_attention(received: torch.Tensor, threshold: float = RECOVERED) -> float:
    """The smallest share of the tokens that together receive more than ``threshold`` of the attention."""
    shares = received.sort(descending=True).values.cumsum(0) / received.sum()
    return (int((shares <= threshold).sum()) + 1) / len(received)


def measure_layers(target: Reading, stored: Reading, sources: NDArray[np.int64], rotation: Rotation) -> list[Vectors]:
    """How far the stored KV at ``sources``, keys turned to their new place, is from the target's own: [T] by layer."""
    places = torch.from_numpy(sources)
    moved = torch.arange(len(places)) - places
    return [
        measure_deviation(fresh, (rotate(keys[:, :, places], moved, rotation), values[:, :, places]))
        for fresh, (keys, values) in zip(target.layers, stored.layers, strict=True)
    ]


def compare(
    target: Reading, stored: Reading, embed: Callable[[torch.Tensor], Vectors], rotation: Rotation
) -> dict[str, float]:
    """The figures of one pair of texts."""
    vectors = [embed(reading.token_ids).float() for reading in (target, stored)]
    turned = [rotate_embeddings(own, torch.arange(len(own)), rotation.inverse_frequencies) for own in vectors]
    found: dict[str, float] = {}
    for name, (own, known) in (("plain", vectors), ("rotated", turned)):
        places = find_nearest_tokens(own, known).positions
        found[f"similarity, {name} embeddings"] = compute_paper_similarity(measure_hamming_distance(own, known))
        found[f"matched with an equal token, {name}"] = float(
            (stored.token_ids[torch.from_numpy(places)] == target.token_ids).float().mean()
        )
        found[f"matched behind their neighbour's match, {name}"] = float((np.diff(places) == 1).mean())
    deviations = measure_layers(target, stored, places, rotation)
    alike = [rank_alike(one, other) for one, other in pairwise(deviations[1:])]
    found["Spearman of deviations in adjacent layers, median"] = median(alike)
    found["Spearman of deviations in adjacent layers, least"] = min(alike)
    for name, layer in (("first", 0), ("middle", len(target.received) // 2), ("last", -1)):
        found[f"tokens with 55% of the attention, {name} layer"] = recover_attention(target.received[layer])
    return found


def make_table(alike: Sequence[Mapping[str, float]], unlike: Sequence[Mapping[str, float]]) -> str:
    """Medians with the least and the largest value, for rewritten and for unlike texts."""

    def show(values: Sequence[float]) -> str:
        return f"{median(values):.2f} ({min(values):.2f} to {max(values):.2f})"

    lines = [
        f"| {name} | {show([found[name] for found in alike])} | {show([found[name] for found in unlike])} |"
        for name in alike[0]
    ]
    return "\n".join(["| | rewritten | unlike |", "| --- | --- | --- |", *lines])


def main(arguments: Sequence[str] | None = None) -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--dialogues", type=Path, required=True, metavar="FILE.json")
    parser.add_argument("--rewritten", type=Path, required=True, metavar="FILE.json")
    parser.add_argument("--model", required=True, help="a folder or hub id; a model that turns its keys by usual RoPE")
    parser.add_argument("--cases", type=int, default=8)
    args = parser.parse_args(arguments)
    torch.set_num_threads(1)
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32, attn_implementation="eager").eval()
    rotation, embed = Rotation(model.model.rotary_emb.inv_freq.float()), model.get_input_embeddings()
    dialogues = read_dialogues(args.dialogues, args.rewritten)[: args.cases]
    pairs = []
    for dialogue in dialogues:
        texts = (dialogue.turns, change_turns(dialogue, "rewritten", 1.0, Random(0)))
        pairs.append([read_text(model, torch.tensor(tokenizer.encode("\n".join(turns)))) for turns in texts])
    with torch.inference_mode():
        alike = [compare(target, stored, embed, rotation) for stored, target in pairs]
        others = [stored for stored, _ in pairs[1:]] + [pairs[0][0]]
        unlike = [compare(target, stored, embed, rotation) for (_, target), stored in zip(pairs, others, strict=True)]
    print(f"{Path(args.model).name}, {len(pairs)} dialogues, median (least to largest)\n\n{make_table(alike, unlike)}")


if __name__ == "__main__":
    main()
