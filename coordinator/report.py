"""What `run` and `chat` print of a finished request: a line of figures, or one JSON object."""

from dataclasses import dataclass, field
from typing import Any

import orjson

from coordinator.corrected.compose import MoeDispatchFigures
from coordinator.dispatch_stats import DispatchSummary
from coordinator.request import Finished, GenerationRequest, Timings, TokenGenerated, TokenLogprob
from shoal.transport import Wire

SHOWN_LOAD_S = 0.005


@dataclass(slots=True)
class Transcript:
    """Everything that one request brought, kept for the report.

    prefill, decode: dispatch figures of the prompt's passes and of the passes after it.
    moe_dispatch: how the latter met their experts.
    """

    request: GenerationRequest
    tokens: list[TokenGenerated] = field(default_factory=list)
    prefill: DispatchSummary | None = None
    decode: DispatchSummary | None = None
    finished: Finished | None = None
    moe_dispatch: MoeDispatchFigures | None = None

    @property
    def text(self) -> str:
        tail = "" if self.finished is None else self.finished.text
        return "".join(token.text for token in self.tokens) + tail


@dataclass(frozen=True, slots=True)
class ModelLabel:
    """Which model answered, and by which kernels: enough to reproduce the bits."""

    name: str
    identity: str
    numerics: str
    isa: str


def figures_line(transcript: Transcript) -> str:
    """Return what is worth knowing at a glance, for a person, without a newline."""
    finished = transcript.finished
    assert finished is not None, "the request is not over"
    timings = finished.timings
    parts = [
        _rate("prompt", _prompt_count(timings), timings.prompt_tokens_per_s),
        _rate("decode", str(timings.num_generated_tokens), timings.decode_tokens_per_s),
        f"first token {timings.first_token_s * 1e3:.0f} ms",
    ]
    # Without a decode step the prompt's passes are all there is to tell.
    summary = transcript.decode
    if summary is None or summary.num_fanouts == 0:
        summary = transcript.prefill
    if summary is not None and summary.num_fanouts:
        p50_us, p99_us = summary.latency_p50_s * 1e6, summary.latency_p99_s * 1e6
        parts.append(f"dispatch per layer p50 {p50_us:.0f} us, p99 {p99_us:.0f} us")
    load_s = sum(s.load_s for s in (transcript.prefill, transcript.decode) if s is not None)
    if load_s >= SHOWN_LOAD_S:
        parts.append(f"waited {load_s:.2f} s for experts to be read")
    if transcript.moe_dispatch is not None and not transcript.moe_dispatch.is_exact:
        parts.insert(0, transcript.moe_dispatch.words())
    if speculation := _speculation_words(transcript):
        parts.append(speculation)
    wire = wire_bytes_per_token(transcript)
    parts.append("experts in process" if wire == 0 else f"{wire / 1e3:.1f} KB per token")
    if summary is not None and summary.wire is not Wire.EXACT:
        parts.append(f"NOT exact: --wire {summary.wire}")
    return " | ".join([*parts, str(finished.reason)])


def wire_bytes_per_token(transcript: Transcript) -> float:
    """Bytes to and from nodes, prefill and decode together, per token that was run."""
    assert transcript.finished is not None, "the request is not over"
    timings = transcript.finished.timings
    num_run = timings.num_prompt_tokens - timings.num_reused_tokens
    num_run += max(0, timings.num_generated_tokens - 1)
    summaries = [s for s in (transcript.prefill, transcript.decode) if s is not None]
    return sum(s.bytes_up + s.bytes_down for s in summaries) / max(1, num_run)


def json_report(transcript: Transcript, label: ModelLabel) -> bytes:
    """Return the `--json` object, one line. Logprobs are null where they were not asked for."""
    finished = transcript.finished
    assert finished is not None, "the request is not over"
    report: dict[str, Any] = {
        "model": label.name,
        "identity": label.identity,
        "numerics": label.numerics,
        "isa": label.isa,
        "prompt_ids": transcript.request.prompt_ids,
        "token_ids": [token.token_id for token in transcript.tokens],
        "text": transcript.text,
        "finish_reason": finished.reason,
        "logits_digest": finished.logits_digest,
        "logprobs": [_logprobs(token) for token in transcript.tokens],
        "timings": _timings(finished.timings),
        "dispatch": {
            "prefill": _summary(transcript.prefill),
            "decode": _summary(transcript.decode),
            "wire_bytes_per_token": wire_bytes_per_token(transcript),
        },
        "moe_dispatch": _moe_dispatch(transcript.moe_dispatch),
        "speculation": _speculation(transcript),
    }
    return orjson.dumps(report, option=orjson.OPT_APPEND_NEWLINE)


def _tokens_per_pass(transcript: Transcript) -> float | None:
    """The first token belongs to the prompt's pass; None without a pass after it."""
    finished = transcript.finished
    assert finished is not None and finished.speculation is not None, "the engine counts passes"
    num_passes = finished.speculation.passes
    return (finished.timings.num_generated_tokens - 1) / num_passes if num_passes else None


def _round_trips_per_token(transcript: Transcript) -> float | None:
    """Waits for nodes, one after the other, per token after the first; None without such tokens.

    Counts layers of passes, and what a drafter asked of nodes.
    """
    finished = transcript.finished
    assert finished is not None and finished.speculation is not None, "the engine counts passes"
    num_tokens = finished.timings.num_generated_tokens - 1
    if num_tokens < 1:
        return None
    return finished.speculation.round_trips / num_tokens


def _moe_dispatch(figures: MoeDispatchFigures | None) -> dict[str, Any] | None:
    if figures is None:
        return None
    return {
        "asked": figures.asked,
        "mode": figures.mode,
        "is_exact": figures.is_exact,
        "iters": figures.num_iters,
        "shadow_format": figures.shadow_format,
        "shadow_expert_bytes": figures.shadow_expert_bytes,
        "link_rtt_ms": figures.link_rtt_ms,
    }


def _speculation_words(transcript: Transcript) -> str:
    assert transcript.finished is not None
    speculation = transcript.finished.speculation
    if speculation is None or not speculation.drafted:
        return ""
    share = 100 * speculation.accepted / speculation.drafted
    words = f"{_tokens_per_pass(transcript):.2f} tokens per pass"
    words += f", {share:.0f} % of {speculation.drafted} guesses right"
    num_bytes = speculation.local_expert_bytes
    return words + (f", {num_bytes / 1e6:.0f} MB of experts here to guess" if num_bytes else "")


def _speculation(transcript: Transcript) -> dict[str, Any] | None:
    assert transcript.finished is not None
    speculation = transcript.finished.speculation
    if speculation is None:
        return None
    return {
        "mode": speculation.mode,
        "passes": speculation.passes,
        "tokens_per_pass": _tokens_per_pass(transcript),
        "drafted": speculation.drafted,
        "accepted": speculation.accepted,
        "local_expert_bytes": speculation.local_expert_bytes,
        "per_drafter": {
            name: {
                "drafted": figures.drafted,
                "accepted": figures.accepted,
                "passes": figures.passes,
                "ahead": figures.ahead,
                "draft_s": figures.draft_s,
                "divergence": figures.divergence,
                "round_trips": figures.round_trips,
                "local_expert_bytes": figures.local_expert_bytes,
            }
            for name, figures in speculation.per_drafter.items()
        },
        "round_trips_per_token": _round_trips_per_token(transcript),
    }


def _prompt_count(timings: Timings) -> str:
    reused = f" ({timings.num_reused_tokens} reused)" if timings.num_reused_tokens else ""
    return f"{timings.num_prompt_tokens}{reused}"


def _rate(what: str, count: str, tokens_per_s: float | None) -> str:
    rate = "" if tokens_per_s is None else f" at {tokens_per_s:.1f} tok/s"
    return f"{what} {count}{rate}"


def _logprobs(token: TokenGenerated) -> dict[str, Any]:
    return {
        "token_id": token.token_id,
        "logprob": token.logprob,
        "top": [_top(candidate) for candidate in token.top_logprobs],
    }


def _top(candidate: TokenLogprob) -> dict[str, Any]:
    return {"token_id": candidate.token_id, "logprob": candidate.logprob}


def _timings(timings: Timings) -> dict[str, Any]:
    return {
        "prompt_tokens": timings.num_prompt_tokens,
        "reused_tokens": timings.num_reused_tokens,
        "generated_tokens": timings.num_generated_tokens,
        "prefill_s": timings.prefill_s,
        "first_token_s": timings.first_token_s,
        "decode_s": timings.decode_s,
        "prompt_tokens_per_s": timings.prompt_tokens_per_s,
        "decode_tokens_per_s": timings.decode_tokens_per_s,
    }


def _summary(summary: DispatchSummary | None) -> dict[str, Any] | None:
    if summary is None:
        return None
    return {
        "fanouts": summary.num_fanouts,
        "latency_p50_us": summary.latency_p50_s * 1e6,
        "latency_p99_us": summary.latency_p99_s * 1e6,
        "beyond_compute_p50_us": summary.beyond_compute_p50_s * 1e6,
        "beyond_compute_p99_us": summary.beyond_compute_p99_s * 1e6,
        "bytes_up": summary.bytes_up,
        "bytes_down": summary.bytes_down,
        "load_s": summary.load_s,
        "wire": summary.wire,
    }
