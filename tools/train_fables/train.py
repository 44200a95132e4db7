"""Training: within a budget of seconds, resumable, the learning rate zero when it ends.

    python -m tools.train_fables.train OUT --minutes 45 [--threads 1]

Reads OUT/train.npz and OUT/seed.npz (of `prepare`); writes OUT/log.jsonl, OUT/checkpoint.pt and,
at the end, OUT/final.pt. A stopped process (SIGSTOP) loses no budget: a step that took very long
counts as a usual one. A killed one goes on from its last checkpoint.
"""

# pyright: reportMissingImports=false

import argparse
import json
import math
import statistics
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.nn import functional as F

from tools.train_fables.cast import BOYS, GIRLS
from tools.train_fables.model import Fables, Geometry, geometry_dict
from tools.train_fables.muon import Muon

BATCH_TOKENS = 3072
LENGTHS = (256,) * 11 + (1024,)  # of rows, in turn: long ones so that all positions are met
NAME_WEIGHTS = ((0.25, 5.0), (0.5, 2.0), (1.0, 1.0))  # of names in the loss, until that share
BALANCE_WEIGHTS = ((0.15, 0.01), (1.0, 0.04))  # until that share of the budget: free, then fair
MUON_LR, ADAM_LR, EMBEDDING_LR = 0.015, 3e-3, 1e-2
MUON_DECAY = 0.5  # bounds the matrices' norms by 2, and so what branches add to the residual
WARMUP = 0.01  # of the budget
STABLE = 0.3  # of the budget: then the rate falls to zero
CHECKPOINT_S = 240.0
VALIDATE_EVERY = 50  # steps
STALL = 5.0  # a step that took so many times the usual was interrupted from outside


class Rows:
    """Training rows: each begins with a document and runs on into those that follow it."""

    def __init__(self, path: Path, seed: int) -> None:
        data = np.load(path)
        self.tokens = torch.from_numpy(data["tokens"].astype(np.int32))
        self.starts: np.ndarray = data["starts"]
        self.seed = seed
        self._order = np.empty(0, np.int64)
        self.position = 0  # in the documents' permuted order
        self.epoch = -1

    def take(self, count: int, length: int) -> torch.Tensor:
        """Return ids [count, length + 1]; no text twice before all were seen once."""
        rows = []
        for _ in range(count):
            rows.append(self._row(length + 1))
        return torch.stack(rows).long()

    def _row(self, length: int) -> torch.Tensor:
        # Documents are independent and in random order already: a row is the stream from the
        # next document's start, and the next row starts at the next document after its end.
        if self.position >= self.starts.size or self.starts[self.position] + length > len(
            self.tokens
        ):
            self.position = 0
            self.epoch += 1
        begin = int(self.starts[self.position])
        end = begin + length
        self.position = int(np.searchsorted(self.starts, end - 1, side="left"))
        return self.tokens[begin:end]


def learning_rate(done: float) -> float:
    """Return the factor of the rates at a fraction of the budget."""
    if done < WARMUP:
        return max(done, 1e-3) / WARMUP
    if done < STABLE:
        return 1.0
    left = (1 - done) / (1 - STABLE)
    return max(left, 0.0) * (0.5 + 0.5 * max(left, 0.0))


def stage(weights: tuple[tuple[float, float], ...], done: float) -> float:
    """Return the weight at a fraction of the budget, of a table of (until, weight)."""
    return next(weight for until, weight in weights if done <= until)


@torch.no_grad()
def validate(model: Fables, ids: torch.Tensor, names: torch.Tensor) -> dict[str, float]:
    """Return nats per token of rows [N, T + 1]: of all, and of names that the row has had before."""
    losses, repeated = [], []
    for part in ids.split(8):
        logits = model(part[:, :-1])
        wanted = part[:, 1:]
        loss = F.cross_entropy(logits.flatten(0, 1), wanted.flatten(), reduction="none")
        losses.append(loss.mean().item())
        is_name = torch.isin(wanted, names)
        same = wanted[:, :, None] == part[:, None, :-1]
        before = torch.ones(same.shape[1:], dtype=torch.bool).tril()
        repeated.append(loss.view_as(wanted)[is_name & (same & before).any(-1)])
    copy = torch.cat(repeated).mean().item()
    return {"valid": round(statistics.fmean(losses), 4), "copy": round(copy, 4)}


def make_optimisers(model: Fables) -> list[torch.optim.Optimizer]:
    """Return Muon for the matrices and Adam for embedding, head, norms and routers."""
    named = list(model.named_parameters())
    tables = [p for n, p in named if "embed" in n]
    small = [p for n, p in named if p.dim() < 2 or n.endswith(("gate.weight", "lm_head.weight"))]
    taken = {id(p) for p in tables + small}
    matrices = [p for _, p in named if id(p) not in taken]
    halves = [p for n, p in named if n.endswith("gate_up")]
    muon = Muon(matrices, MUON_LR, decay=MUON_DECAY, halves=halves)
    groups = [{"params": small, "lr": ADAM_LR}, {"params": tables, "lr": EMBEDDING_LR}]
    adam = torch.optim.AdamW(groups, betas=(0.9, 0.98), weight_decay=0.0)
    for optimiser in (muon, adam):
        for group in optimiser.param_groups:
            group["base"] = group["lr"]
    return [muon, adam]


class Run:
    """A training run and its files."""

    def __init__(self, out: Path, minutes: float, seed: int) -> None:
        torch.manual_seed(seed)
        self.out = out
        self.budget_s = minutes * 60
        vocab = json.loads((out / "tokenizer.json").read_text())["model"]["vocab"]
        self.names = torch.tensor([vocab["Ġ" + n] for n in GIRLS + BOYS if "Ġ" + n in vocab])
        self.model = Fables(Geometry(vocab_size=-(-len(vocab) // 32) * 32))
        self.optimisers = make_optimisers(self.model)
        self.rows = Rows(out / "train.npz", seed)
        held = Rows(out / "seed.npz", seed)
        self.held = held.take(24, 512)
        self.step = self.tokens = 0
        self.elapsed = 0.0
        self.last_saved = 0.0
        self.times: list[float] = []
        if (out / "checkpoint.pt").exists():
            self._resume(torch.load(out / "checkpoint.pt", weights_only=False))

    def _resume(self, state: dict[str, Any]) -> None:
        self.model.load_state_dict(state["model"])
        for optimiser, saved in zip(self.optimisers, state["optimisers"], strict=True):
            optimiser.load_state_dict(saved)
        self.step, self.tokens, self.elapsed = state["step"], state["tokens"], state["elapsed"]
        self.rows.position, self.rows.epoch = state["position"], state["epoch"]
        self.last_saved = self.elapsed
        print(f"resumed at step {self.step}, {self.elapsed:.0f} s", flush=True)

    def save(self, name: str) -> None:
        """Write a checkpoint; the file is whole or the one before."""
        state = {
            "model": self.model.state_dict(),
            "geometry": geometry_dict(self.model.g),
            "optimisers": [o.state_dict() for o in self.optimisers],
            "step": self.step,
            "tokens": self.tokens,
            "elapsed": self.elapsed,
            "position": self.rows.position,
            "epoch": self.rows.epoch,
        }
        torch.save(state, self.out / f"{name}.tmp")
        (self.out / f"{name}.tmp").rename(self.out / f"{name}.pt")
        self.last_saved = self.elapsed

    def one_step(self) -> dict[str, float]:
        """Train on one batch. Returns its losses."""
        done = min(self.elapsed / self.budget_s, 1.0)
        factor = learning_rate(done)
        length = LENGTHS[self.step % len(LENGTHS)]
        ids = self.rows.take(BATCH_TOKENS // length, length)
        logits = self.model(ids[:, :-1]).flatten(0, 1)
        wanted = ids[:, 1:].flatten()
        losses = F.cross_entropy(logits, wanted, reduction="none")
        loss = losses.mean()
        # Who is meant is one token in sixteen, and all that needs long memory: it is learned last.
        weights = torch.where(torch.isin(wanted, self.names), stage(NAME_WEIGHTS, done), 1.0)
        weighted = (losses * weights).sum() / weights.sum()
        balance = self.model.balance_loss()
        (weighted + stage(BALANCE_WEIGHTS, done) * balance).backward()
        norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        for optimiser in self.optimisers:
            for group in optimiser.param_groups:
                group["lr"] = group["base"] * factor
            optimiser.step()
            optimiser.zero_grad(set_to_none=True)
        self.step += 1
        self.tokens += ids[:, 1:].numel()
        return {"loss": loss.item(), "balance": balance.item(), "norm": norm.item(), "rate": factor}

    def train(self) -> None:
        """Train until the budget is spent."""
        with (self.out / "log.jsonl").open("a", buffering=1) as log:
            while self.elapsed < self.budget_s:
                started = time.monotonic()
                found = self.one_step()
                seconds = time.monotonic() - started
                usual = statistics.median(self.times[-50:]) if self.times else seconds
                self.times.append(seconds)
                self.elapsed += usual if seconds > STALL * usual else seconds
                assert math.isfinite(found["loss"]), "the loss is not finite"
                if self.step % 10 == 0:
                    entry = {"step": self.step, "tokens": self.tokens, "s": round(self.elapsed, 1)}
                    entry |= {key: round(value, 4) for key, value in found.items()}
                    if self.step % VALIDATE_EVERY == 0:
                        entry |= validate(self.model, self.held, self.names)
                    log.write(json.dumps(entry) + "\n")
                if self.elapsed - self.last_saved > CHECKPOINT_S:
                    self.save("checkpoint")
            entry = {"step": self.step, "tokens": self.tokens, "s": round(self.elapsed, 1)}
            entry |= validate(self.model, self.held, self.names)
            log.write(json.dumps(entry) + "\n")
        self.save("checkpoint")
        self.save("final")


def main() -> None:
    """Train."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path)
    parser.add_argument("--minutes", type=float, default=45)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seed", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.set_flush_denormal(True)
    run = Run(args.out, args.minutes, args.seed)
    print(f"{sum(p.numel() for p in run.model.parameters()):,} parameters", flush=True)
    run.train()


if __name__ == "__main__":
    main()
