"""Which format a shadow should have: weight error and agreement with the target, teacher forced.

    python -m bench.shadow_formats [MODEL] [--max-tokens 96]

Every candidate rounds all experts of MODEL (default: smollm2), whose weights as they are, in
float64, are the target: attention, norms and vocabulary stay exact, activations are not rounded.
Scored on greedy continuations that the model itself makes, which is what a drafter has to guess:
agreement of the likeliest token, KL divergence, and what a draft of 16 would yield a pass. Weighed
candidates have column weights from shoal/artifact/shadow_text.txt. NumPy, for dense models that are
cut into slices; not on the path of any token. docs/shadow.md has the table.
"""

import argparse
import json
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from bench.measure import save, show
from shoal import ops
from shoal.artifact import Artifact
from shoal.artifact.text_pass import TextPass
from shoal.ops_reference.matrices import dequantise
from shoal.paths import resolve_model
from shoal.quant import Format

F32 = NDArray[np.float32]
F64 = NDArray[np.float64]
Ffn = tuple[F64, F64, F64]  # gate and up [I, D], down [D, I]
Rounder = Callable[[F32, F32 | None], F64]

PROMPTS = (
    "The capital of France is a city with a long history.",
    "Once upon a time, there was a little robot who",
    "def fibonacci(n):\n",
    "Water boils at different temperatures depending on",
    "Summary of the French Revolution:\n",
)
DRAFT = 16  # tokens
UNIFORM_3_BIT = np.arange(-4, 4, dtype=np.float32)


@dataclass(frozen=True)
class Candidate:
    """A way of rounding a matrix. bits: a weight, scales included."""

    name: str
    bits: float
    weighed: bool
    round: Rounder


def native(fmt: Format) -> Rounder:
    return lambda values, weigh: dequantise(fmt, ops.quantise_table(fmt, values, weigh))


def largest_to_eight(values: F32, _weigh: F32 | None) -> F64:
    """Q4_0 as GGUF's tools make it: the largest value becomes -8 steps."""
    blocks = values.reshape(-1, 32)
    largest = blocks[np.arange(len(blocks)), np.abs(blocks).argmax(axis=1)][:, None]
    scale = (largest / np.float32(-8)).astype(np.float16).astype(np.float64)
    steps = np.clip(np.rint(blocks / np.where(scale == 0, 1, scale)), -8, 7)
    rounded: F64 = (scale * steps).reshape(values.shape)
    return rounded


def uniform_3_bit(values: F32, weigh: F32 | None) -> F64:
    """Steps -4..3 of the scale with the least error, of 7 and either sign."""
    blocks = values.reshape(-1, 32)
    weights = np.ones(values.shape[1], np.float32) if weigh is None else weigh
    weights = np.broadcast_to(weights, values.shape).reshape(-1, 32)
    best = np.full((len(blocks), 1), -1.0, np.float32)
    scale = np.zeros_like(best)
    largest = np.abs(blocks).max(axis=1, keepdims=True) / 4
    for part in np.linspace(0.65, 1.1, 7, dtype=np.float32):
        for step in (part * largest, -part * largest):
            levels = np.clip(np.rint(blocks / np.where(step == 0, 1, step)), -4, 3)
            product = (weights * levels * blocks).sum(axis=1, keepdims=True)
            square = (weights * levels * levels).sum(axis=1, keepdims=True)
            fitted = product / np.where(square == 0, 1, square)
            keep = product * fitted > best
            best, scale = np.where(keep, product * fitted, best), np.where(keep, fitted, scale)
    halves = scale.astype(np.float16).astype(np.float64)
    levels = np.clip(np.rint(blocks / np.where(halves == 0, 1, halves)), -4, 3)
    rounded: F64 = (halves * levels).reshape(values.shape)
    return rounded


CANDIDATES = (
    Candidate("q4_0, largest value to -8", 4.5, False, largest_to_eight),
    Candidate("q4_0, least error", 4.5, False, native(Format.Q4_0)),
    Candidate("q4_0, least error", 4.5, True, native(Format.Q4_0)),
    Candidate("q4_t", 4.5, False, native(Format.Q4_T)),
    Candidate("q4_t", 4.5, True, native(Format.Q4_T)),
    Candidate("8 even steps, least error", 3.5, False, uniform_3_bit),
    Candidate("8 even steps, least error", 3.5, True, uniform_3_bit),
    Candidate("q3_t", 3.5, False, native(Format.Q3_T)),
    Candidate("q3_t", 3.5, True, native(Format.Q3_T)),
)


class Model:
    """A dense model whose FFNs are slices, in float64."""

    def __init__(self, artifact: Artifact) -> None:
        self.artifact, self.spec = artifact, artifact.spec
        self.embed = artifact.dense_values("embed").astype(np.float64)
        tied = self.spec.tie_embeddings
        self.head = self.embed if tied else artifact.dense_values("lm_head").astype(np.float64)
        self.inv_freq = artifact.vector("rope.inv_freq").astype(np.float64)
        self.tensors = {
            tensor.name: artifact.dense_values(tensor.name).astype(np.float64)
            for tensor in artifact.manifest.dense
            if tensor.name.startswith("layers.") or tensor.name == "norm"
        }

    def experts(self, layer: int) -> Iterator[tuple[F32, F32, F32]]:
        layout = self.artifact.expert_layout(layer)
        for index in self.artifact.owned_experts[layer]:
            yield ops.unpack_expert(layout, self.artifact.read_expert(layer, index))

    def log_probabilities(self, ids: Sequence[int], ffns: Sequence[Ffn]) -> F64:
        """Return [T, V]."""
        hidden = self.embed[list(ids)]
        for layer, (gate, up, down) in enumerate(ffns):
            hidden = hidden + self._attention(layer, self._norm(hidden, f"{layer}.attention.norm"))
            normed = self._norm(hidden, f"{layer}.ffn.norm")
            opened = normed @ gate.T
            hidden = hidden + (normed @ up.T * (opened / (1 + np.exp(-opened)))) @ down.T
        logits = self._rms(hidden, self.tensors["norm"]) @ self.head.T
        logits -= logits.max(axis=1, keepdims=True)
        result: F64 = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
        return result

    def _norm(self, x: F64, name: str) -> F64:
        return self._rms(x, self.tensors[f"layers.{name}"])

    def _rms(self, x: F64, weight: F64) -> F64:
        scaled: F64 = x / np.sqrt((x * x).mean(axis=1, keepdims=True) + self.spec.norm_eps)
        return scaled * weight

    def _attention(self, layer: int, x: F64) -> F64:
        spec, count = self.spec.attention, len(x)
        angle = np.arange(count)[:, None, None] * self.inv_freq
        cos, sin = np.cos(angle), np.sin(angle)

        def heads(letter: str) -> F64:
            flat = x @ self.tensors[f"layers.{layer}.attention.{letter}"].T
            shaped: F64 = flat.reshape(count, -1, spec.head_dim)
            return shaped

        def turned(a: F64) -> F64:
            low, high = np.split(a, 2, axis=2)
            return np.concatenate([low * cos - high * sin, high * cos + low * sin], axis=2)

        repeat = spec.num_heads // spec.num_kv_heads
        q, k = turned(heads("q")), np.repeat(turned(heads("k")), repeat, axis=1)
        v = np.repeat(heads("v"), repeat, axis=1)
        scores = np.matmul(q.transpose(1, 0, 2), k.transpose(1, 2, 0)) * spec.scale
        scores += np.triu(np.full((count, count), -np.inf), 1)
        weights = np.exp(scores - scores.max(axis=2, keepdims=True))
        weights /= weights.sum(axis=2, keepdims=True)
        mixed = np.matmul(weights, v.transpose(1, 0, 2)).transpose(1, 0, 2).reshape(count, -1)
        branch: F64 = mixed @ self.tensors[f"layers.{layer}.attention.o"].T
        return branch


def column_weights(model: Model) -> list[list[tuple[F32, F32]]]:
    """Return (of gate and up, of down) of every expert of every layer."""
    text = TextPass.of(model.artifact)
    assert text is not None, "the model has no tokenizer"
    layers = []
    for layer in range(model.spec.num_layers):
        text.enter(layer)
        inputs = text.input_weights()
        experts = enumerate(model.experts(layer))
        layers.append([(inputs, text.through_expert(index, *parts)) for index, parts in experts])
        text.leave()
    return layers


def rounded_ffns(
    model: Model, candidate: Candidate | None, weights: list[list[tuple[F32, F32]]]
) -> tuple[list[Ffn], float]:
    """Return every layer's FFN as a candidate rounds it (None: as it is), and its relative rms."""
    ffns: list[Ffn] = []
    errors = squares = 0.0
    for layer in range(model.spec.num_layers):
        parts: tuple[list[F64], list[F64], list[F64]] = ([], [], [])
        for values, (inputs, hidden) in zip(model.experts(layer), weights[layer], strict=True):
            for part, value, weigh in zip(parts, values, (inputs, inputs, hidden), strict=True):
                exact = value.astype(np.float64)
                if candidate is None:
                    part.append(exact)
                    continue
                part.append(candidate.round(value, weigh if candidate.weighed else None))
                errors += float(((part[-1] - exact) ** 2).sum())
                squares += float((exact**2).sum())
        gate, up, down = parts
        ffns.append((np.concatenate(gate), np.concatenate(up), np.concatenate(down, axis=1)))
    return ffns, float((errors / squares) ** 0.5) if squares else 0.0


def continuations(model: str, max_tokens: int) -> list[tuple[list[int], int]]:
    """Return (ids, where the model's own begin) of the greedy text after each prompt."""
    texts = []
    for prompt in PROMPTS:
        command = [sys.executable, "-m", "client.cli", "run", model, prompt, "--json"]
        command += ["--temperature", "0", "--max-tokens", str(max_tokens), "--ignore-eos"]
        ran = subprocess.run(command, check=True, capture_output=True, text=True)
        report = json.loads(ran.stdout)
        texts.append((report["prompt_ids"] + report["token_ids"], len(report["prompt_ids"])))
    return texts


def tokens_a_pass(agrees: Sequence[NDArray[np.bool_]]) -> float:
    """Return what drafts of DRAFT tokens yield: accepted ones and the target's own next."""
    tokens = passes = 0
    for run in agrees:
        at = 0
        while at < len(run):
            accepted = int(np.cumprod(run[at : at + DRAFT]).sum())
            tokens, passes, at = tokens + accepted + 1, passes + 1, at + accepted + 1
    return tokens / passes


def score(
    model: Model, ffns: list[Ffn], texts: list[tuple[list[int], int]], truth: list[F64]
) -> dict[str, float]:
    agrees, divergence = [], []
    for (ids, start), exact in zip(texts, truth, strict=True):
        guessed = model.log_probabilities(ids[:-1], ffns)[start - 1 :]
        agrees.append(guessed.argmax(axis=1) == exact.argmax(axis=1))
        divergence.append((np.exp(exact) * (exact - guessed)).sum(axis=1))
    return {
        "agreement": float(np.concatenate(agrees).mean()),
        "kl": float(np.concatenate(divergence).mean()),
        "tokens_a_pass": tokens_a_pass(agrees),
    }


def main() -> None:
    """Score every candidate; print the table and save it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", nargs="?", default="smollm2")
    parser.add_argument("--max-tokens", type=int, default=96)
    arguments = parser.parse_args()
    model = Model(Artifact.open(resolve_model(arguments.model)))
    texts = continuations(arguments.model, arguments.max_tokens)
    weights = column_weights(model)
    exact, _ = rounded_ffns(model, None, weights)
    truth = [model.log_probabilities(ids[:-1], exact)[start - 1 :] for ids, start in texts]
    num_tokens = sum(map(len, truth))
    rows = []
    for candidate in CANDIDATES:
        ffns, error = rounded_ffns(model, candidate, weights)
        row = {"format": candidate.name, "bits": candidate.bits, "weighed": candidate.weighed}
        rows.append({**row, "rms_error": error, **score(model, ffns, texts, truth)})
        print(rows[-1], flush=True)
    columns = {
        "format": lambda r: str(r["format"]) + (", weighed" if r["weighed"] else ""),
        "bits": lambda r: f"{r['bits']:.1f}",
        "weight error": lambda r: f"{100 * r['rms_error']:.1f} %",
        "agreement": lambda r: f"{100 * r['agreement']:.1f} %",
        "KL": lambda r: f"{r['kl']:.4f}",
        f"tokens a pass of {DRAFT}": lambda r: f"{r['tokens_a_pass']:.1f}",
    }
    show(f"{model.artifact.name}, {num_tokens} tokens, teacher forced", rows, columns)
    save("shadow-formats", rows, model=model.artifact.name, num_tokens=num_tokens)


if __name__ == "__main__":
    main()
