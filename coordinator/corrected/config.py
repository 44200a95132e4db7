"""MoeDispatchConfig: how many round trips a token takes, as the command line or a caller says."""

from dataclasses import dataclass
from enum import StrEnum

from shoal.errors import UsageError

DEFAULT_ITERS = 3  # KL falls until here with a stand-in of 3.5 bits (docs/batch-dispatch.md)
MAX_ITERS = 8  # more is dearer than it helps: it is exact after as many as the model has layers
MIN_SHADOW_BITS = 3.0  # a weight: with fewer a shadow guesses no better than chance


class MoeDispatch(StrEnum):
    """How a token meets its experts."""

    AUTO = "auto"  # measures the link; exact, whatever it finds
    STREAM = "stream"  # layer by layer: exact
    BATCH = "batch"  # all layers at once, a few times: approximate


@dataclass(frozen=True, slots=True)
class MoeDispatchConfig:
    """Checked here, once.

    num_iters: round trips a token of `batch`; None: the default.
    """

    mode: MoeDispatch = MoeDispatch.AUTO
    num_iters: int | None = None

    def __post_init__(self) -> None:
        """Raises UsageError naming the option."""
        if self.num_iters is None:
            return
        if self.mode is not MoeDispatch.BATCH:
            raise UsageError(
                "--moe-iters does nothing without --moe-dispatch batch: other modes are exact"
            )
        if not 1 <= self.num_iters <= MAX_ITERS:
            raise UsageError(f"--moe-iters {self.num_iters}: must be in 1..{MAX_ITERS}")

    @property
    def is_exact(self) -> bool:
        return self.mode is not MoeDispatch.BATCH

    @property
    def num_sweeps(self) -> int:
        """Of an approximate pass."""
        return DEFAULT_ITERS if self.num_iters is None else self.num_iters

    def check(self, shadow: str | None, speculates: bool) -> None:
        """Raise UsageError for what does not go with the mode.

        Args:
            shadow: what --shadow names. speculates: whether a way to guess tokens was asked for.
        """
        if self.is_exact:
            return
        if shadow is None:
            raise UsageError(
                "--moe-dispatch batch needs --shadow: without a copy of the experts that stands in"
                " for them, at 3 bits a weight or more, what it says is garbage. Use --shadow q4:"
                " it is made on first use where all experts are, elsewhere with `shoal shadow MODEL"
                " OUT --format q4`, or stay with --moe-dispatch stream, which is exact"
            )
        if speculates:
            raise UsageError(
                "--speculate and --moe-dispatch batch do not go together: what one verifies the"
                " other does not compute. For exact text on a slow link: --speculate batch"
            )
