"""GenerationRequest and the events that answer it.

    PromptRead  TokenGenerated*  Finished

Finished is last, comes exactly once whatever happens, and says why.
"""

from dataclasses import dataclass
from enum import StrEnum

from coordinator.speculation.figures import SpeculationFigures
from shoal.errors import RequestError, ShoalError
from shoal.ops import SamplingParams


class FinishReason(StrEnum):
    EOS = "eos"  # the model ended its text
    STOP = "stop"  # a stop string appeared
    LENGTH = "length"  # max_tokens were generated
    CANCELLED = "cancelled"  # somebody asked for it
    ERROR = "error"  # Finished.error says which


@dataclass(frozen=True, slots=True)
class GenerationRequest:
    """What somebody wants generated.

    prompt_ids: at least one id.
    max_tokens: tokens to generate at most, > 0.
    stop: strings that end the text; they are not part of it.
    ignore_eos: go on after an end-of-sequence token.
    num_top_logprobs: None: no logprobs; else the chosen token's and those of the K likeliest.
    """

    prompt_ids: tuple[int, ...]
    max_tokens: int
    sampling: SamplingParams
    stop: tuple[str, ...] = ()
    ignore_eos: bool = False
    num_top_logprobs: int | None = None

    def check(self, vocab_size: int, max_context: int) -> None:
        """Raise RequestError unless a model of that vocabulary and context can serve this."""
        if not self.prompt_ids:
            raise RequestError("the prompt is empty: give at least one token")
        for index, token_id in enumerate(self.prompt_ids):
            if not 0 <= token_id < vocab_size:
                raise RequestError(
                    f"prompt id {token_id} at index {index}: must be in 0..{vocab_size - 1}"
                )
        if self.max_tokens < 1:
            raise RequestError(f"max_tokens = {self.max_tokens}: must be at least 1")
        if any(not text for text in self.stop):
            raise RequestError("a stop string is empty: it would stop every text at once")
        if self.num_top_logprobs is not None and not 0 <= self.num_top_logprobs <= vocab_size:
            raise RequestError(
                f"top_logprobs = {self.num_top_logprobs}: must be in 0..{vocab_size}"
            )
        self._check_context(max_context)

    def _check_context(self, max_context: int) -> None:
        num_prompt = len(self.prompt_ids)
        if num_prompt >= max_context:
            raise RequestError(
                f"the prompt has {num_prompt} tokens, the context holds {max_context} and must "
                "have room for an answer: shorten the prompt"
            )
        if num_prompt + self.max_tokens > max_context:
            raise RequestError(
                f"{num_prompt} prompt tokens and max_tokens = {self.max_tokens} do not fit the "
                f"context of {max_context} tokens: set max_tokens to at most "
                f"{max_context - num_prompt}"
            )


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    token_id: int
    logprob: float


@dataclass(frozen=True, slots=True)
class PromptRead:
    """The prompt's KV is complete. `num_reused` of its tokens were still cached."""

    num_tokens: int
    num_reused: int


@dataclass(frozen=True, slots=True)
class TokenGenerated:
    """One more token. `text` is what has become certain with it, often with older tokens' bytes."""

    token_id: int
    text: str
    logprob: float | None
    top_logprobs: tuple[TokenLogprob, ...]


@dataclass(frozen=True, slots=True)
class Timings:
    """Seconds by the engine's clock; counts of tokens.

    prefill_s: from the start until the first logits; first_token_s: until the first token.
    decode_s: from the first token to the last.
    """

    num_prompt_tokens: int
    num_reused_tokens: int
    num_generated_tokens: int
    prefill_s: float
    first_token_s: float
    decode_s: float

    @property
    def prompt_tokens_per_s(self) -> float | None:
        """Prompt tokens that were run, not reused, per second."""
        num_run = self.num_prompt_tokens - self.num_reused_tokens
        return num_run / self.prefill_s if self.prefill_s > 0 else None

    @property
    def decode_tokens_per_s(self) -> float | None:
        """None below two tokens: the first belongs to the prompt's pass."""
        num_steps = self.num_generated_tokens - 1
        return num_steps / self.decode_s if num_steps > 0 and self.decode_s > 0 else None


@dataclass(frozen=True, slots=True)
class Finished:
    """The terminal event.

    text: what was held back in case it began a stop string.
    logits_digest: blake3 of every row of logits that was sampled from, in order; None unless
        logprobs were asked for. Two ways of serving one model have the same.
    speculation: how the tokens came; two ways of serving one model differ in it.
    """

    reason: FinishReason
    text: str
    timings: Timings
    logits_digest: str | None = None
    error: ShoalError | None = None
    speculation: SpeculationFigures | None = None


Event = PromptRead | TokenGenerated | Finished
