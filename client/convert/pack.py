"""From source rows to kernel layout, in bounded pieces."""

from collections.abc import Iterator, Mapping

from client.convert.source import U8, SourceTensor
from client.convert.transcode import Region
from shoal import ops
from shoal.artifact import Weights
from shoal.families import FfnRule, TensorSlice
from shoal.quant import LANES, Format, group_bytes, round_up


def packed_rows(region: Region) -> Iterator[U8]:
    """Yield a matrix in kernel layout, some row groups at a time; each piece is fresh memory."""
    size = group_bytes(region.format, region.num_cols)
    for first in range(0, region.num_rows, region.chunk_rows):
        last = min(first + region.chunk_rows, region.num_rows)
        packed = ops.aligned_empty(_groups(last - first) * size)
        ops.pack_rows(region.format, region.rows(first, last), region.padded_cols, packed)
        yield packed


def pack_ffn(rule: FfnRule, weights: Weights, tensors: Mapping[str, SourceTensor], out: U8) -> None:
    """Fill `out` with [gate|up|down] of one FFN: gate and up groups alternate, down follows."""
    num_groups = _groups(weights.ffn_dim)
    size = group_bytes(weights.gate_up, weights.dim)
    end = 2 * num_groups * size
    pairs = out[:end].reshape(num_groups, 2, size)

    def region(part: TensorSlice, fmt: Format) -> Region:
        return Region(rule.name, tensors[part.tensor], part, fmt)

    for which, part in enumerate((rule.gate, rule.up)):
        group = 0
        for piece in packed_rows(region(part, weights.gate_up)):
            count = len(piece) // size
            pairs[group : group + count, which] = piece.reshape(count, size)
            group += count
        assert group == num_groups, (rule.name, group, num_groups)
    for piece in packed_rows(region(rule.down, weights.down)):
        out[end : end + len(piece)] = piece
        end += len(piece)
    assert end == weights.num_bytes, (rule.name, end, weights.num_bytes)


def _groups(rows: int) -> int:
    return round_up(rows, LANES) // LANES
