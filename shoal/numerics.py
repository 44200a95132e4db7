"""`numerics`: which bits this build computes, and the check that it really computes them.

`golden_digests.txt` has a digest of every op and format, one line each; all instruction sets give
the same. Its hash, NUMERICS, travels in every handshake: two processes with one value give equal
bits for equal inputs. A process recomputes its digests when it starts and refuses to run on a
difference (exactness rule 9; docs/numerics.md). tools/golden_digests.py writes the file.
"""

import os
from pathlib import Path

from blake3 import blake3

from shoal.errors import NumericsMismatch
from shoal.ops import available_isas, isa, set_isa
from shoal.ops.digests import compute_digests

GOLDEN_PATH = Path(__file__).with_name("golden_digests.txt")

NUMERICS = blake3(GOLDEN_PATH.read_bytes()).hexdigest()


def compute() -> str:
    """Return the text of the golden file as this process computes it: `op format digest` lines."""
    return "".join(f"{op} {fmt} {digest:016x}\n" for op, fmt, digest in compute_digests())


def verify() -> str:
    """Return NUMERICS once every op has reproduced its golden digest here, on this CPU.

    AMX is used from here on if the CPU has it, gives these digests too and SHOAL_ISA does not say
    otherwise: no CPU that has it was at hand to test the kernels on.

    Raises:
        NumericsMismatch: names the first op and format that did not, and the instruction set.
    """
    golden = GOLDEN_PATH.read_text()
    check(compute(), golden, isa())
    if "amx" in available_isas() and not os.environ.get("SHOAL_ISA"):
        _prefer("amx", golden)
    return NUMERICS


def _prefer(isa_name: str, golden: str) -> None:
    """Switch to that instruction set unless it gives other bits."""
    before = isa()
    set_isa(isa_name)
    if compute() != golden:
        set_isa(before)


def check(computed: str, golden: str, isa_name: str) -> None:
    """Raise NumericsMismatch if the two texts of digests differ."""
    if computed == golden:
        return
    ours, agreed = _parse(computed), _parse(golden)
    wrong = [name for name in agreed if ours.get(name) != agreed[name]]
    wrong += [name for name in ours if name not in agreed]
    named = wrong[0] if wrong else "the order of ops"
    raise NumericsMismatch(
        f"{named} on {isa_name}: computed {ours.get(named, 'nothing')}, agreed "
        f"{agreed.get(named, 'nothing')} ({len(wrong)} of {len(agreed)} digests differ). This "
        "build's results would differ from other nodes': rebuild it with the project's own flags, "
        "or choose another instruction set with SHOAL_ISA"
    )


def _parse(text: str) -> dict[str, str]:
    """Return {"op format": digest}."""
    return {
        name: digest for name, _, digest in (line.rpartition(" ") for line in text.splitlines())
    }
