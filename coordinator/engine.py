"""Engine: a request in, a stream of events out, one request at a time.

    prompt -> chunks of prefill -> (sample -> one-token pass)* -> Finished

Every accepted request ends in exactly one `Finished`, also when a node fails, a value becomes
non-finite, or somebody cancels. A request that cannot be served is refused before any work.
"""

from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass

from blake3 import blake3

from coordinator.array_types import F32
from coordinator.batch import Piece, make_batch
from coordinator.cancellation import Cancellation, Cancelled
from coordinator.kv_arrays import KvArrays
from coordinator.kv_cache import KvBlockPool, blocks_for
from coordinator.request import (
    Event,
    Finished,
    FinishReason,
    GenerationRequest,
    PromptRead,
    Timings,
    TokenGenerated,
)
from coordinator.sampler import choose
from coordinator.sequence import Sequence
from coordinator.text_stream import TextStream
from coordinator.tokenizer import Tokenizer
from coordinator.transformer import Transformer
from shoal import limits
from shoal.errors import RequestError, ShoalError


@dataclass(frozen=True, slots=True)
class EngineConfig:
    """max_context: tokens of one sequence; prefill_chunk: rows of one prefill pass."""

    max_context: int
    prefill_chunk: int = limits.PREFILL_CHUNK

    def __post_init__(self) -> None:
        if self.max_context < 2:
            raise RequestError(f"max_context = {self.max_context}: must be at least 2")
        if not 1 <= self.prefill_chunk <= limits.MAX_ROWS_PER_CALL:
            raise RequestError(
                f"prefill_chunk = {self.prefill_chunk}: must be in 1..{limits.MAX_ROWS_PER_CALL}"
            )


class Engine:
    """Owns the model, the KV cache and the sequence in it.

    The sequence outlives its request: the next one reuses the KV of the prefix they share. What
    it computes does not depend on that.
    """

    def __init__(
        self,
        transformer: Transformer,
        tokenizer: Tokenizer,
        kv_arrays: Callable[[int], KvArrays],
        config: EngineConfig,
        clock: Callable[[], float],
    ) -> None:
        num_blocks = blocks_for(config.max_context)
        self._transformer = transformer
        self._tokenizer = tokenizer
        self._config = config
        self._clock = clock
        self._pool = KvBlockPool(num_blocks)
        self._kv = kv_arrays(num_blocks)
        self._sequence = Sequence(self._pool)

    @property
    def config(self) -> EngineConfig:
        return self._config

    def generate(self, request: GenerationRequest, cancellation: Cancellation) -> Iterator[Event]:
        """Serve the request; every event is yielded as it happens, `Finished` last.

        Raises: RequestError, before any work, for a request that cannot be served.
        """
        request.check(self._transformer.spec.vocab_size, self._config.max_context)
        return self._serve(_Progress(request, self._clock, self._clock()), cancellation)

    def check_integrity(self) -> None:
        """Assert that blocks are neither lost nor shared. For tests and idle moments."""
        self._pool.check_integrity()
        self._sequence.check_integrity()
        assert self._pool.num_blocks - self._pool.num_free == len(self._sequence.blocks)

    def _serve(self, progress: "_Progress", cancellation: Cancellation) -> Iterator[Event]:
        request = progress.request
        text = TextStream(self._tokenizer, request.stop, request.prompt_ids)
        error: ShoalError | None = None
        try:
            logits = self._prefill(progress, cancellation)
            yield PromptRead(len(progress.request.prompt_ids), progress.num_reused)
            reason = yield from self._decode(progress, logits, text, cancellation)
        except Cancelled:
            reason = FinishReason.CANCELLED
        except ShoalError as failure:
            reason, error = FinishReason.ERROR, failure
        yield Finished(reason, text.finish(), progress.timings(), progress.logits_digest(), error)

    def _prefill(self, progress: "_Progress", cancellation: Cancellation) -> F32:
        """Run what is not cached of the prompt; return the logits [1, V] of its last token."""
        sequence, prompt_ids = self._sequence, list(progress.request.prompt_ids)
        # The last token always runs: its logits choose the first new token.
        progress.num_reused = min(
            sequence.common_prefix(prompt_ids), sequence.num_cached, len(prompt_ids) - 1
        )
        sequence.truncate(progress.num_reused)
        sequence.extend(prompt_ids[progress.num_reused :])
        while True:
            num_left = sequence.num_tokens - sequence.num_cached
            num_rows = min(num_left, self._config.prefill_chunk)
            logits = self._run(num_rows, int(num_rows == num_left), cancellation)
            if num_rows == num_left:
                progress.prefilled()
                return logits

    def _decode(
        self, progress: "_Progress", logits: F32, text: TextStream, cancellation: Cancellation
    ) -> Generator[Event, None, FinishReason]:
        request, sequence = progress.request, self._sequence
        eos_ids = frozenset[int]() if request.ignore_eos else self._tokenizer.eos_ids
        while True:
            progress.record_logits(logits)
            choice = choose(logits[0], request, sequence.token_ids)
            sequence.extend([choice.token_id])
            progress.generated()
            is_eos = choice.token_id in eos_ids
            piece = "" if is_eos else text.push(choice.token_id)
            yield TokenGenerated(choice.token_id, piece, choice.logprob, choice.top_logprobs)
            if is_eos:
                return FinishReason.EOS
            if text.is_stopped:
                return FinishReason.STOP
            if progress.num_generated == request.max_tokens:
                return FinishReason.LENGTH
            logits = self._run(1, 1, cancellation)

    def _run(self, num_rows: int, num_logits: int, cancellation: Cancellation) -> F32:
        sequence = self._sequence
        reserved = sequence.try_reserve(sequence.num_cached + num_rows)
        assert reserved, "the pool holds max_context tokens, and no request is longer"
        batch = make_batch([Piece(sequence, num_rows, num_logits)])
        logits = self._transformer.forward(batch, self._kv, cancellation)
        sequence.advance(num_rows)
        return logits


class _Progress:
    """What one request has done so far, and when."""

    def __init__(
        self, request: GenerationRequest, clock: Callable[[], float], started_s: float
    ) -> None:
        self.request = request
        self.num_reused = 0
        self.num_generated = 0
        self._clock = clock
        self._started_s = started_s
        self._prefilled_s = started_s
        self._first_token_s = started_s
        self._last_token_s = started_s
        self._digest = None if request.num_top_logprobs is None else blake3()

    def record_logits(self, logits: F32) -> None:
        if self._digest is not None:
            self._digest.update(logits.tobytes())

    def logits_digest(self) -> str | None:
        return None if self._digest is None else self._digest.hexdigest()

    def prefilled(self) -> None:
        self._prefilled_s = self._clock()

    def generated(self) -> None:
        self.num_generated += 1
        self._last_token_s = self._clock()
        if self.num_generated == 1:
            self._first_token_s = self._last_token_s

    def timings(self) -> Timings:
        return Timings(
            num_prompt_tokens=len(self.request.prompt_ids),
            num_reused_tokens=self.num_reused,
            num_generated_tokens=self.num_generated,
            prefill_s=self._prefilled_s - self._started_s,
            first_token_s=self._first_token_s - self._started_s,
            decode_s=self._last_token_s - self._first_token_s,
        )
