"""The generated parts of docs/fables.md: tables and stories as Markdown."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

_COLUMNS = ("unigram", "five_gram", "model", "bound")


def tables(figures: Mapping[str, Any], difference: float) -> str:
    """Return every table of the page. difference: of f32 logits from transformers'."""
    parts = [_training(figures), _perplexity(figures), _routing(figures["routing"])]
    parts.append(_fidelity(figures["fidelity"], difference))
    return "\n\n".join(parts)


def stories_page(prompt: str, told: Mapping[int, str]) -> str:
    """Return the stories, each with the command that tells it again."""
    parts: list[str] = []
    for seed, text in told.items():
        command = f'shoal run "{prompt}" --seed {seed}'
        quoted = "\n".join(f"> {line}".rstrip() for line in (prompt + text).strip().split("\n"))
        parts.append(f"`{command}`\n\n{quoted}")
    return "\n\n".join(parts)


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _training(figures: Mapping[str, Any]) -> str:
    end = figures["training"]
    minutes, rate = end["s"] / 60, end["tokens"] / end["s"]
    return (
        f"{end['step']:,} steps, {end['tokens']:,} tokens in {minutes:.0f} minutes of one core: "
        f"{rate:,.0f} tokens/s. Validation loss at the end: {end['valid']:.4f} nats a token "
        f"(perplexity {math.exp(end['valid']):.3f})."
    )


def _perplexity(figures: Mapping[str, Any]) -> str:
    parts: list[str] = []
    names = {"seed": "Unseen seeds", "held-out": "Unseen combinations"}
    for split, name in names.items():
        rows = [
            [domain, f"{row['tokens']:,}", *(f"{row[key]:.3g}" for key in _COLUMNS)]
            for domain, row in figures[split].items()
        ]
        head = [name, "tokens", "unigram", "5-gram", "**this model**", "grammar"]
        parts.append(_table(head, rows))
    return "\n\n".join(parts)


def _routing(routing: Mapping[str, Sequence[float]]) -> str:
    rows = []
    for layer in range(len(routing["dead"])):
        before = routing["top1_from_before"][layer]
        rows.append(
            [
                str(layer),
                f"{routing['dead'][layer]:.0f}",
                f"{routing['least'][layer]:.2f}, {routing['most'][layer]:.2f}",
                f"{routing['entropy_bits'][layer]:.2f}",
                f"{100 * routing['reuse'][layer]:.0f} %",
                "" if layer == 0 else f"{100 * before:.0f} %",
            ]
        )
    head = [
        "layer", "dead experts", "least, most used (1: fair share)", "entropy, bits (at most 5)",
        "experts that the token before had (12.5 % by chance)", "first expert told by the layer before",
    ]  # fmt: skip
    return _table(head, rows)


def _fidelity(fidelity: Mapping[str, float], difference: float) -> str:
    return (
        f"Q8_0 against the same weights in float32, on {fidelity['tokens']:,.0f} tokens: KL "
        f"{fidelity['kl_nats']:.2g} nats a token, the same likeliest token at "
        f"{100 * fidelity['top1_agreement']:.2f} %, perplexity {fidelity['perplexity']:.4f} against "
        f"{fidelity['exact_perplexity']:.4f}. The float32 artifact's logits are within "
        f"{difference:.1g} of those of transformers' Qwen3MoeForCausalLM."
    )
