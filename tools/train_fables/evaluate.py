"""What docs/fables.md reports, measured through shoal on text that training never saw.

    python -m tools.train_fables.evaluate OUT --artifact A.shoal --exact F32.shoal [--documents 400]

Writes OUT/figures.json and docs/fables-*.svg. `--exact` is the same checkpoint unquantised.
Perplexity is per token, of every token after a document's first, from an empty cache.
"""

import argparse
import json
import math
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tools.train_fables import pictures, routing
from tools.train_fables.corpus import DOMAINS
from tools.train_fables.ngrams import KneserNey, unigram_log_probs
from tools.train_fables.passes import Reader

DOCS = Path(__file__).resolve().parents[2] / "docs"
SPLITS = ("seed", "held-out")
FIDELITY_DOCUMENTS = 96  # of the comparison of two artifacts: every logit of both is kept


class TokenFile:
    """The documents of one split."""

    def __init__(self, path: Path) -> None:
        data = np.load(path)
        self.tokens: NDArray[np.uint16] = data["tokens"]
        self.starts: NDArray[np.int64] = data["starts"]
        self.domains = [list(DOMAINS)[i] for i in data["domains"]]
        self.nats: NDArray[np.float32] = data["nats"]
        self._ends = np.append(self.starts[1:], self.tokens.size)

    def document(self, index: int) -> NDArray[np.uint16]:
        """Return its tokens, the end of text included."""
        return self.tokens[self.starts[index] : self._ends[index]]


def read_by_model(train: TokenFile, num_tokens: int) -> int:
    """Return how many documents hold what training read: the baselines get as much."""
    return int(np.searchsorted(train.starts, min(num_tokens, train.tokens.size)))


def perplexities(
    split: TokenFile, count: int, scores: dict[str, list[NDArray[np.float64]]]
) -> dict[str, dict[str, float]]:
    """Return {domain or "all": {name: perplexity}}; scores: log probabilities by document."""
    found: dict[str, dict[str, float]] = {}
    for domain in ("all", *DOMAINS):
        chosen = [i for i in range(count) if domain in ("all", split.domains[i])]
        if not chosen:
            continue
        row = {
            name: math.exp(-float(np.concatenate([values[i] for i in chosen]).mean()))
            for name, values in scores.items()
        }
        tokens = sum(split.document(i).size for i in chosen)
        row["bound"] = math.exp(float(split.nats[chosen].sum()) / tokens)
        row["tokens"] = tokens
        found[domain] = row
    return found


def fidelity(artifact: Path, exact: Path, texts: list[list[int]]) -> dict[str, float]:
    """Return how far an artifact is from its unquantised self."""
    sums: dict[str, float] = defaultdict(float)
    ours = {r.index: r for r in Reader(artifact).read(texts, keep_logits=True)}
    for theirs in Reader(exact).read(texts, keep_logits=True):
        mine = ours.pop(theirs.index)
        p, q = _log_softmax(theirs.logits), _log_softmax(mine.logits)
        sums["tokens"] += len(p)
        sums["kl"] += float((np.exp(p) * (p - q)).sum())
        sums["top1"] += float((p.argmax(-1) == q.argmax(-1)).sum())
        sums["loss"] -= float(mine.log_probs.sum())
        sums["exact_loss"] -= float(theirs.log_probs.sum())
        sums["scored"] += len(mine.log_probs)
    return {
        "tokens": sums["tokens"],
        "kl_nats": sums["kl"] / sums["tokens"],
        "top1_agreement": sums["top1"] / sums["tokens"],
        "perplexity": math.exp(sums["loss"] / sums["scored"]),
        "exact_perplexity": math.exp(sums["exact_loss"] / sums["scored"]),
    }


def _log_softmax(logits: NDArray[np.float32]) -> NDArray[np.float64]:
    wide = logits.astype(np.float64)
    wide -= wide.max(-1, keepdims=True)
    return wide - np.log(np.exp(wide).sum(-1, keepdims=True))


def main() -> None:
    """Measure everything."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path)
    parser.add_argument("--artifact", type=Path, required=True)
    parser.add_argument("--exact", type=Path, required=True)
    parser.add_argument("--documents", type=int, default=400)
    parser.add_argument("--pictures", type=Path, default=DOCS)
    args = parser.parse_args()
    log = [json.loads(line) for line in (args.out / "log.jsonl").read_text().splitlines()]
    reader = Reader(args.artifact)
    spec = reader.artifact.spec
    train = TokenFile(args.out / "train.npz")
    seen = read_by_model(train, log[-1]["tokens"])
    seen_tokens = train.tokens[: train.starts[seen] if seen < train.starts.size else None]
    neighbours = KneserNey(seen_tokens, train.starts[:seen], spec.vocab_size)
    unigram = unigram_log_probs(seen_tokens, spec.vocab_size)
    figures: dict[str, Any] = {"training": log[-1], "baseline_tokens": int(seen_tokens.size)}
    for name in SPLITS:
        split = TokenFile(args.out / f"{name}.npz")
        count = min(args.documents, split.starts.size)
        texts = [split.document(i) for i in range(count)]
        read = sorted(reader.read([t.tolist() for t in texts]), key=lambda r: r.index)
        scores = {
            "unigram": [unigram[t[1:]] for t in texts],
            "five_gram": [neighbours.log_probs(t) for t in texts],
            "model": [r.log_probs for r in read],
        }
        figures[name] = perplexities(split, count, scores)
        if name == "seed":
            traces = [r.routing for r in read]
            router = spec.layers[0].router
            assert router is not None, "a model with experts in every layer"
            figures["routing"] = routing.statistics(traces, router.num_experts)
            shares = routing.domain_shares(traces, split.domains[:count], router.num_experts)
            pictures.write_heat_map(args.pictures / "fables-experts.svg", list(DOMAINS), shares)
            some = [t.tolist() for t in texts[:FIDELITY_DOCUMENTS]]
            figures["fidelity"] = fidelity(args.artifact, args.exact, some)
    baseline = {name: math.log(figures["seed"]["all"][name]) for name in ("five_gram", "bound")}
    pictures.write_curves(args.pictures / "fables-loss.svg", log, baseline)
    (args.out / "figures.json").write_text(json.dumps(figures, indent=1) + "\n")
    print(json.dumps(figures, indent=1))


if __name__ == "__main__":
    main()
