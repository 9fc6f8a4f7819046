"""Measure methods of the field in this engine, and ablations that damage KV, beside this package's modes.

    PYTHONPATH=. python examples/lab/methods.py --scenarios reordered edited --cases 150 --out methods.md

Takes what ``drawn.py`` takes, and these policies too. A method of the field is its rule for what is computed
again, on the runs that this engine finds, re-rotated as this engine does it; none of them is the authors' own code.
An ablation follows the same plan as ``identical``, over KV that says nothing. What it still gets right, the tokens
computed in the call got right by themselves.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from functools import partial

import torch

import drawn
from arguments import parse_arguments
from semsharekv_integrations import ReuseConfig
from semsharekv_integrations.errors import require
from semsharekv_integrations.kv import LayerKV, Reference
from semsharekv_integrations.lab.bench import Bench, Study
from semsharekv_integrations.lab.policies import POLICIES, Policy, Subject
from semsharekv_integrations.lab.running import run_study
from semsharekv_integrations.lab.texts import TEXTS
from shapes import UNGUARDED

Corrupt = Callable[[Reference], Reference]

RAW = ReuseConfig(
    mode="identical",
    boundary_tokens=0,
    edit_tokens=0,
    relevance_ratio=0.0,
    attention_ratio=0.0,
    max_deviation=UNGUARDED,
    max_compute_ratio=1.0,
)
_BLIND = ReuseConfig(mode="identical", max_deviation=UNGUARDED)
METHODS = {
    **POLICIES,
    "raw": Policy(
        "Identical runs with nothing computed again, as Prompt Cache reuses its modules (arXiv 2311.04934).", RAW
    ),
    "cacheblend": Policy(
        "The first layer in full, then the 15% of the tokens that deviate most (CacheBlend, arXiv 2405.16444).",
        replace(RAW, full_layers=1, deviation_ratio=0.15, final_share=1.0),
    ),
    "epic": Policy(
        "The first 16 tokens of each run, where 16 to 32 is the method's range (EPIC, arXiv 2410.15332).",
        replace(RAW, boundary_tokens=16, edit_tokens=16),
    ),
    "zeroed": Policy("As identical, over stored KV of zeros (ablation of SemShareKV).", _BLIND),
    "random": Policy(
        "As identical, over stored KV of noise with the mean and spread of the real one (ablation of SemShareKV).",
        _BLIND,
    ),
}


class CorruptingBench(Bench):
    """The bench over stored references that it damages first.

    Args:
        subject: what is measured on.
        study: what is measured.
        corrupt: changes the stored references of a policy, by its name.

    Raises:
        ValueError: as ``Bench``, or if ``corrupt`` names no policy.
    """

    def __init__(self, subject: Subject, study: Study, corrupt: Mapping[str, Corrupt]) -> None:
        super().__init__(subject, study)
        self._corrupt = corrupt
        policies = [*self.engines, *self.missing]
        unknown = sorted(corrupt.keys() - set(policies))
        require(not unknown, "corrupt", ", ".join(unknown), f"policies of this run: {', '.join(policies)}")

    def store_references(self, policy: str, references: Sequence[Reference]) -> float:
        """Damage them, if the policy says so, before the time is taken."""
        if policy in self._corrupt:
            references = [self._corrupt[policy](reference) for reference in references]
        return super().store_references(policy, references)


def make_corruptions(names: Iterable[str], seed: int) -> dict[str, Corrupt]:
    """The ablations among ``names``, with what each does to a stored reference."""
    rng = torch.Generator().manual_seed(seed)
    ablations: dict[str, Corrupt] = {"zeroed": zero_kv, "random": partial(randomize_kv, rng=rng)}
    return {name: ablations[name] for name in names if name in ablations}


def zero_kv(reference: Reference) -> Reference:
    """With keys and values of zero."""
    layers = tuple(LayerKV(torch.zeros_like(keys), torch.zeros_like(values)) for keys, values in reference.layers)
    return replace(reference, layers=layers)


def randomize_kv(reference: Reference, rng: torch.Generator) -> Reference:
    """With normally distributed keys and values that have the mean and standard deviation of each layer's own.

    Args:
        reference: of any device and dtype.
        rng: on the CPU, so that a seed means the same on every device.
    """

    def draw(tensor: torch.Tensor) -> torch.Tensor:
        noise = torch.randn(tensor.shape, generator=rng).to(tensor.device)  # [B, H, S, D]
        return (noise * tensor.float().std() + tensor.float().mean()).to(tensor.dtype)

    return replace(reference, layers=tuple(LayerKV(draw(keys), draw(values)) for keys, values in reference.layers))


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure the policies asked for, by default all."""
    args = parse_arguments(__doc__ or "", arguments, METHODS, (*drawn.DRAWN, *TEXTS), drawn.add_arguments)
    args.policies = args.policies or list(METHODS)
    study, subject = drawn.prepare(args, METHODS)
    corrupt = make_corruptions(study.configs, args.seed)
    run_study(study, subject, args, partial(CorruptingBench, corrupt=corrupt))


if __name__ == "__main__":
    sys.exit(main())
