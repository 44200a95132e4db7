"""Engine: a request in, a stream of events out, one request at a time.

    prompt -> chunks of prefill -> (sample -> draft -> pass)* -> Finished

A pass runs the last token and the guesses that follow it (perhaps none). Its rows are sampled from
in order, each with the path that leads to it, while the guess there is what was sampled: so the
tokens, and the logits they come from, are those of one pass a token.

Every accepted request ends in exactly one `Finished`, also when a node fails, a value becomes
non-finite, or somebody cancels. A request that cannot be served is refused before any work.
"""

from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass

from blake3 import blake3

from coordinator.array_types import F32
from coordinator.batch import Piece, make_batch
from coordinator.cancellation import Cancellation, Cancelled
from coordinator.corrected.corrected_pass import CorrectedPass
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
from coordinator.sampler import Choice, choose
from coordinator.sequence import Sequence
from coordinator.speculation.speculator import Speculator, no_speculation
from coordinator.text_stream import TextStream
from coordinator.tokenizer import Tokenizer
from coordinator.transformer import Transformer
from shoal import limits
from shoal.errors import NumericError, RequestError, ShoalError


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
        make_speculator: Callable[[KvArrays], Speculator] = lambda _kv: no_speculation(),
        approximate: CorrectedPass | None = None,
    ) -> None:
        """Args:
        make_speculator: makes who guesses, from the KV arrays of this engine.
        approximate: runs the passes after the prompt's, nearly; None: they are exact as well.
        """
        num_blocks = blocks_for(config.max_context) + limits.KV_SCRATCH_BLOCKS
        self._transformer = transformer
        self._approximate = approximate
        self._tokenizer = tokenizer
        self._config = config
        self._clock = clock
        self._pool = KvBlockPool(num_blocks)
        self._kv = kv_arrays(num_blocks)
        self._sequence = Sequence(self._pool)
        self._speculator = make_speculator(self._kv)

    @property
    def config(self) -> EngineConfig:
        return self._config

    def generate(self, request: GenerationRequest, cancellation: Cancellation) -> Iterator[Event]:
        """Serve the request; every event is yielded as it happens, `Finished` last.

        Raises: RequestError, before any work, for a request that cannot be served.
        """
        request.check(self._transformer.spec.vocab_size, self._config.max_context)
        return self._serve(_Progress(request, self._clock, self._clock()), cancellation)

    def close(self) -> None:
        """Let go of what guesses. No request may be under way."""
        self._speculator.close()

    def check_integrity(self) -> None:
        """Assert that blocks are neither lost nor shared. For tests and idle moments."""
        self._pool.check_integrity()
        self._sequence.check_integrity()
        assert self._pool.num_blocks - self._pool.num_free == len(self._sequence.blocks)

    def _serve(self, progress: "_Progress", cancellation: Cancellation) -> Iterator[Event]:
        request = progress.request
        text = TextStream(self._tokenizer, request.stop, request.prompt_ids)
        error: ShoalError | None = None
        self._speculator.begin(request)
        try:
            logits = self._prefill(progress, cancellation)
            yield PromptRead(len(progress.request.prompt_ids), progress.num_reused)
            reason = yield from self._decode(progress, logits, text, cancellation)
        except Cancelled:
            reason = FinishReason.CANCELLED
        except ShoalError as failure:
            reason, error = FinishReason.ERROR, failure
        finally:
            self._speculator.end()
            self._forget_approximate(len(request.prompt_ids))
        yield Finished(
            reason,
            text.finish(),
            progress.timings(),
            progress.logits_digest(),
            error,
            self._speculator.figures(),
        )

    def _forget_approximate(self, num_exact: int) -> None:
        """Keep the KV of exact passes alone: nothing is computed from another's (rule 8)."""
        if self._approximate is not None and self._sequence.num_tokens > num_exact:
            self._sequence.truncate(num_exact)

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
        request = progress.request
        while True:
            reason = yield from self._accept(progress, logits, text, cancellation)
            if reason is not None:
                return reason
            # A pass brings one token more than is guessed.
            room = request.max_tokens - progress.num_generated - 1
            draft = self._speculator.draft(self._sequence, room, cancellation)
            logits = self._verify(draft, cancellation)

    def _accept(
        self, progress: "_Progress", logits: F32, text: TextStream, cancellation: Cancellation
    ) -> Generator[Event, None, FinishReason | None]:
        """Sample from the logits [1 + K, V] of a pass until a guess was wrong or the text ends.

        The sequence ends with the K guesses; it is left with what was sampled in their place.
        """
        sequence, num_guesses = self._sequence, len(logits) - 1
        num_certain = num_first = sequence.num_tokens - num_guesses
        guesses = sequence.token_ids[num_first:].tolist()
        is_right, num_right, reason = True, 0, None
        try:
            while is_right and reason is None:
                index = num_certain - num_first
                if index:
                    cancellation.check()
                progress.record_logits(logits[index])
                choice = choose(logits[index], progress.request, sequence.token_ids[:num_certain])
                is_right = index < num_guesses and guesses[index] == choice.token_id
                if not is_right:
                    sequence.truncate(num_certain)
                    sequence.extend([choice.token_id])
                num_right += is_right
                num_certain += 1
                reason = yield from self._emit(choice, progress, text)
        finally:
            sequence.truncate(num_certain)
            num_judged = min(num_guesses, num_certain - num_first)
            self._speculator.judged(num_right, num_judged)
        return reason

    def _emit(
        self, choice: Choice, progress: "_Progress", text: TextStream
    ) -> Generator[Event, None, FinishReason | None]:
        """Tell of a new token; return why the text ends with it, or None."""
        request = progress.request
        progress.generated()
        is_eos = not request.ignore_eos and choice.token_id in self._tokenizer.eos_ids
        piece = "" if is_eos else text.push(choice.token_id)
        yield TokenGenerated(choice.token_id, piece, choice.logprob, choice.top_logprobs)
        if is_eos:
            return FinishReason.EOS
        if text.is_stopped:
            return FinishReason.STOP
        return FinishReason.LENGTH if progress.num_generated == request.max_tokens else None

    def _verify(self, draft: list[int], cancellation: Cancellation) -> F32:
        """Run the last token and the draft; return the logits [1 + K, V] of all that was run.

        A value that only a guess brings about must not fail the request: such rows are left out.
        """
        sequence = self._sequence
        num_certain = sequence.num_tokens
        sequence.extend(draft)
        try:
            while True:
                num_rows = sequence.num_tokens - sequence.num_cached
                try:
                    return self._run(num_rows, num_rows, cancellation, self._approximate)
                except NumericError as error:
                    if num_rows == 1:
                        raise
                    sequence.truncate(num_certain - 1 + max(1, min(error.rows, default=1)))
        except BaseException:
            sequence.truncate(num_certain)
            raise

    def _run(
        self,
        num_rows: int,
        num_logits: int,
        cancellation: Cancellation,
        approximate: CorrectedPass | None = None,
    ) -> F32:
        sequence = self._sequence
        reserved = sequence.try_reserve(sequence.num_cached + num_rows)
        assert reserved, "the pool holds max_context tokens, and no request is longer"
        batch = make_batch([Piece(sequence, num_rows, num_logits)])
        began_s = self._clock()
        hidden: F32 | None = None
        if approximate is None:
            hidden = self._transformer.run_layers(batch, self._kv, cancellation)
            logits = self._transformer.logits(hidden, batch)
        else:
            logits = approximate.forward(batch, self._kv, cancellation)
        self._speculator.ran(num_rows, self._clock() - began_s, hidden)
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
