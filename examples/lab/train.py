"""Train the reference model on the synthetic news world and write it into the package's assets.

    python examples/lab/train.py --minutes 120 --run-dir build/reference
    python examples/lab/train.py --resume --run-dir build/reference --minutes 60
    python examples/lab/train.py --export semsharekv_integrations/assets/reference --run-dir build/reference

A curriculum gated by accuracy: recall of bare statements, then prompts of one document, of two, and so on.
Matrices are trained by Muon in float32 (``torch.optim.Muon`` iterates in bfloat16, which is many times slower on
processors without bfloat16 units), everything else by AdamW.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from torch.nn import functional
from transformers import LlamaConfig, LlamaForCausalLM

from samples import NO_SUBJECT, Row, RowMaker
from semsharekv_integrations.world import TOWNS
from tokenizer import MAX_CONTEXT_TOKENS
from tokenizer import build as build_tokenizer

SHAPES = {256: 12, 384: 8, 768: 4, 1536: 2, 3584: 1}  # row length -> rows per step, about 3,072 tokens each


@dataclass(frozen=True)
class Level:
    """One step of the curriculum: rows of ``length`` tokens with ``low`` to ``high`` documents (0: bare recall).

    The next level opens once held-out accuracy on this one reaches ``gate``.
    """

    name: str
    length: int
    low: int
    high: int
    gate: float


LEVELS = (
    Level("recall", 256, 0, 0, 0.8),
    Level("one", 256, 1, 1, 0.93),
    Level("two", 384, 2, 2, 0.93),
    Level("three to five", 768, 3, 5, 0.88),
    Level("six to ten", 1536, 6, 10, 0.88),
    Level("eleven to thirty", 3584, 11, 30, 1.0),
)
GAP_SHARE = 0.15  # of rows with gaps in their positions
LEVEL_SHARES = (0.6, 0.05, 0.35)  # of steps on the newest level, on bare recall, on any opened one
SUBJECT_LAYER, SUBJECT_WEIGHT = 2, 0.3
PEAK_LR, WARMUP_STEPS, FINAL_LR_SHARE = 2e-3, 100, 0.05
EVAL_EVERY_STEPS = 100


@dataclass
class Progress:
    """What is saved beside the weights, to resume from."""

    step: int = 0
    tokens: int = 0
    seconds: float = 0.0
    level: int = 0


def make_model(vocab_size: int) -> LlamaForCausalLM:
    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=vocab_size,
            hidden_size=192,
            intermediate_size=512,
            num_hidden_layers=6,
            num_attention_heads=6,
            num_key_value_heads=3,
            max_position_embeddings=MAX_CONTEXT_TOKENS,
            tie_word_embeddings=True,
            bos_token_id=0,
            eos_token_id=1,
            pad_token_id=2,
            attn_implementation="sdpa",
        )
    )


class Muon(torch.optim.Optimizer):
    """Momentum orthogonalized by five Newton-Schulz steps (Jordan et al., 2024), in float32, one stack per shape."""

    def __init__(
        self, params: list[torch.nn.Parameter], lr: float, momentum: float = 0.95, weight_decay: float = 0.02
    ) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self) -> None:  # type: ignore[override]
        """Update every parameter from its gradient."""
        for group in self.param_groups:
            by_shape: dict[torch.Size, list[torch.nn.Parameter]] = {}
            for param in group["params"]:
                by_shape.setdefault(param.shape, []).append(param)
            for params in by_shape.values():
                self._step_stack(params, group)

    def _step_stack(self, params: list[torch.nn.Parameter], group: dict) -> None:
        updates = []
        for param in params:
            momentum = self.state[param].setdefault("momentum", torch.zeros_like(param))
            momentum.lerp_(param.grad, 1 - group["momentum"])
            updates.append(param.grad.lerp(momentum, group["momentum"]))
        scale = 0.2 * math.sqrt(max(params[0].shape))
        for param, update in zip(params, orthogonalize(torch.stack(updates)), strict=True):
            param.mul_(1 - group["lr"] * group["weight_decay"]).add_(update, alpha=-group["lr"] * scale)


def orthogonalize(stack: torch.Tensor) -> torch.Tensor:
    """The nearest semi-orthogonal matrices, approximately, of a stack [N, R, C]."""
    tall = stack.shape[-2] > stack.shape[-1]
    x = stack.mT if tall else stack
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(5):
        gram = x @ x.mT
        x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
    return x.mT if tall else x


def hidden_states(
    model: LlamaForCausalLM, ids: torch.Tensor, positions: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """The decoder's last hidden states, and those that enter ``SUBJECT_LAYER``, both [B, T, hidden].

    The layers are called one by one, because gaps in positions must not split the mask.
    """
    hidden = model.model.embed_tokens(ids)
    rotary = model.model.rotary_emb(hidden, positions)
    early = hidden
    for index, layer in enumerate(model.model.layers):
        early = hidden if index == SUBJECT_LAYER else early
        hidden = layer(hidden, attention_mask=None, position_ids=positions, position_embeddings=rotary)
    return model.model.norm(hidden), early


def loss_of(model: LlamaForCausalLM, subject_head: torch.nn.Linear, batch: Batch) -> torch.Tensor:
    """Weighted cross entropy of the next tokens, and of the subject of the sentence that each token stands in.

    The second term only speeds up binding: it makes early layers gather the town, which later layers compare.
    """
    hidden, early = (states.flatten(0, 1)[batch.picked] for states in hidden_states(model, batch.ids, batch.positions))
    losses = functional.cross_entropy(model.lm_head(hidden), batch.ids.flatten()[batch.picked + 1], reduction="none")
    subject_loss = functional.cross_entropy(
        subject_head(early), batch.subjects, ignore_index=NO_SUBJECT, reduction="sum"
    ) / (batch.subjects != NO_SUBJECT).sum().clamp_min(1)
    return (losses * batch.weights).sum() / batch.weights.sum() + SUBJECT_WEIGHT * subject_loss


class Batch(NamedTuple):
    """Rows as tensors [B, T], and half of the predicted places: the answers' first, the rest drawn.

    ``picked`` are flat indices [N] whose next token is predicted, with ``weights`` [N] and ``subjects`` [N].
    """

    ids: torch.Tensor
    positions: torch.Tensor
    picked: torch.Tensor
    weights: torch.Tensor
    subjects: torch.Tensor


def collate(rows: list[Row], maker: RowMaker) -> Batch:
    """Stack rows of one length."""
    ids, positions = (torch.tensor([getattr(row, name) for row in rows]) for name in ("ids", "positions"))
    length = ids.shape[1]
    weights = [(r * length + c, row.weights[c + 1]) for r, row in enumerate(rows) for c in range(length - 1)]
    maker.rng.shuffle(weights)
    weights.sort(key=lambda pair: -pair[1])
    half = weights[: ids.numel() // 2]
    picked = torch.tensor([index for index, _ in half])
    subjects = torch.tensor([maker.subjects(row.ids) for row in rows]).flatten()[picked]
    return Batch(ids, positions, picked, torch.tensor([weight for _, weight in half]), subjects)


def draw_batch(maker: RowMaker, level: int, copy_share: float) -> Batch:
    """Rows of one level: mostly the newest, often bare recall, else any opened one."""
    rng = maker.rng
    index = rng.choices([level, 0, rng.randint(0, level)], LEVEL_SHARES)[0]
    chosen = LEVELS[index]
    return collate([draw_row(maker, chosen, copy_share, GAP_SHARE) for _ in range(SHAPES[chosen.length])], maker)


def draw_row(maker: RowMaker, level: Level, copy_share: float = 0.0, gap_share: float = 0.0) -> Row:
    """One row; to measure on, without copying and gaps, which no prompt has."""
    if maker.rng.random() < copy_share:
        return maker.copy_row(level.length)
    if level.high == 0:
        return maker.recall_row(level.length, maker.rng.randint(1, 6))
    return maker.prompt_row(level.length, maker.rng.randint(level.low, level.high), gap_share)


@torch.no_grad()
def accuracy(model: LlamaForCausalLM, maker: RowMaker, level: Level, num_rows: int = 32) -> float:
    """Share of held-out answers whose every token is the model's first choice (as greedy decoding would give)."""
    right = total = 0
    for _ in range(num_rows):
        row = draw_row(maker, level)
        ids = torch.tensor([row.ids])
        hidden, _ = hidden_states(model, ids, torch.tensor([row.positions]))
        hits = model.lm_head(hidden)[0, :-1].argmax(-1) == ids[0, 1:]
        right += sum(bool(hits[start - 1 : stop - 1].all()) for start, stop in row.answers)
        total += len(row.answers)
    return right / max(total, 1)


def learning_rate(share_done: float, step: int) -> float:
    cosine = 0.5 * (1 + math.cos(math.pi * min(share_done, 1.0)))
    return PEAK_LR * min(1.0, (step + 1) / WARMUP_STEPS) * (FINAL_LR_SHARE + (1 - FINAL_LR_SHARE) * cosine)


class Trainer:
    """The loop: draws, steps, measures, opens the next level, saves."""

    def __init__(self, run_dir: Path, *, resume: bool) -> None:
        self.run_dir = run_dir
        self.tokenizer = build_tokenizer()
        self.model = make_model(len(self.tokenizer))
        self.subject_head = torch.nn.Linear(self.model.config.hidden_size, len(TOWNS))
        matrices = [p for name, p in self.model.named_parameters() if p.ndim == 2 and "embed" not in name]
        others = [p for name, p in self.model.named_parameters() if p.ndim != 2 or "embed" in name]
        self.optimizers = [
            Muon(matrices, PEAK_LR),
            torch.optim.AdamW([*others, *self.subject_head.parameters()], PEAK_LR, betas=(0.9, 0.95), weight_decay=0.0),
        ]
        self.progress = Progress()
        if resume:
            self._load()
        self.maker = RowMaker(self.tokenizer, seed=1000 + self.progress.step)
        self.loss = torch.compile(loss_of, dynamic=False)

    def run(self, minutes: float) -> None:
        """Train until ``minutes`` of training in all are spent; the learning rate decays over them."""
        budget_s, started, before = minutes * 60, time.monotonic(), self.progress.seconds
        losses: list[float] = []
        while self.progress.seconds < budget_s:
            losses.append(self._step(self.progress.seconds / budget_s))
            self.progress.seconds = before + time.monotonic() - started
            if self.progress.step % EVAL_EVERY_STEPS == 0:
                self._report(sum(losses) / len(losses))
                losses = []
                self.save()
        self.save()

    def _step(self, share_done: float) -> float:
        copy_share = 0.1 if self.progress.level == 0 else 0.03
        batch = draw_batch(self.maker, self.progress.level, copy_share)
        loss = self.loss(self.model, self.subject_head, batch)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        rate = learning_rate(share_done, self.progress.step)
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = rate
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        self.progress.step += 1
        self.progress.tokens += batch.ids.numel()
        return float(loss.detach())

    def _report(self, loss: float) -> None:
        held_out = RowMaker(self.tokenizer, seed=5)
        scores = [accuracy(self.model, held_out, level) for level in LEVELS[: self.progress.level + 2]]
        text = " ".join(f"{level.name} {score:.2f}" for level, score in zip(LEVELS, scores, strict=False))
        print(f"{self.progress} loss {loss:.3f} | {text}", flush=True)
        if scores[self.progress.level] >= LEVELS[self.progress.level].gate and self.progress.level < len(LEVELS) - 1:
            self.progress.level += 1

    def save(self) -> None:
        """Write weights, optimizer states and progress, to go on from."""
        self.run_dir.mkdir(parents=True, exist_ok=True)
        state = {
            "model": self.model.state_dict(),
            "subject_head": self.subject_head.state_dict(),
            "optimizers": [o.state_dict() for o in self.optimizers],
        }
        torch.save(state, self.run_dir / "state.tmp")
        (self.run_dir / "state.tmp").rename(self.run_dir / "state.pt")
        (self.run_dir / "progress.json").write_text(json.dumps(asdict(self.progress)))

    def _load(self) -> None:
        state = torch.load(self.run_dir / "state.pt", weights_only=True)
        self.model.load_state_dict(state["model"])
        self.subject_head.load_state_dict(state["subject_head"])
        for optimizer, saved in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        self.progress = Progress(**json.loads((self.run_dir / "progress.json").read_text()))

    def export(self, path: Path) -> None:
        """Write weights (float16 safetensors) and tokenizer as ``from_pretrained`` reads them.

        The config asks for float32, in which they were trained: float16 is slow on processors.
        """
        self.model.to(torch.float16).save_pretrained(path)
        self.tokenizer.save_pretrained(path)
        config = LlamaConfig.from_pretrained(path)
        config.dtype = torch.float32
        config.save_pretrained(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run-dir", type=Path, required=True, help="where the training state is kept")
    parser.add_argument("--minutes", type=float, default=120.0, help="training time in all, resumed runs included")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--resume", action="store_true", help="go on from the state in --run-dir")
    parser.add_argument("--export", type=Path, help="only write the model in --run-dir to this folder")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    trainer = Trainer(args.run_dir, resume=args.resume or args.export is not None)
    if args.export:
        trainer.export(args.export)
    else:
        trainer.run(args.minutes)


if __name__ == "__main__":
    main()
