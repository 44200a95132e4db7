"""Weight formats and activation schemes: names, block sizes and bytes in kernel layout (core).

A weight matrix [rows, cols] in kernel layout is ceil(rows / 16) *row groups*; a group is a run of
records along cols. docs/formats/kernel-layout.md draws every record.
"""

from enum import IntEnum

LANES = 16  # output rows in a row group
ALIGNMENT = 64  # bytes: every group and every record of a group starts on a cache line


class Format(IntEnum):
    """How the weights of one matrix are stored. The values are part of the artifact format."""

    F32 = 0
    F16 = 1
    BF16 = 2
    Q8_0 = 3
    Q4_0 = 4
    Q4_1 = 5
    Q4_K = 6
    Q4_T = 7  # a table of 16 levels, ours: shadows (docs/shadow.md)
    Q3_T = 8  # a table of 8 levels, ours

    @property
    def label(self) -> str:
        """The name that users type and manifests carry: `q4_k`."""
        return self.name.lower()

    @property
    def is_float(self) -> bool:
        return self in (Format.F32, Format.F16, Format.BF16)

    @property
    def block_cols(self) -> int:
        """Columns that share a scale (1 for float formats): cols are padded to a multiple."""
        return _BLOCK[self][0]

    @property
    def block_bytes(self) -> int:
        """Bytes of one block of one row in row-major (GGUF or plain) storage."""
        return _BLOCK[self][1]

    @property
    def scheme(self) -> "Scheme":
        """The activation scheme that this format's kernels take."""
        if self.is_float:
            return Scheme.F32
        return Scheme.INT8_256 if self is Format.Q4_K else Scheme.INT8_32


class Scheme(IntEnum):
    """How activation rows are handed to a matrix product. The values travel on the wire."""

    F32 = 0
    INT8_32 = 1  # int8 quants, one float32 scale per 32 columns
    INT8_256 = 2  # int8 quants, one float32 scale per 256 columns

    @property
    def span(self) -> int:
        """Columns per scale; a row is padded with zeros to a multiple (F32: not padded)."""
        return _SPANS[self]


_SPANS = (1, 32, 256)  # by Scheme; a tuple, as every message and every layer asks
_BLOCK = {
    Format.F32: (1, 4),
    Format.F16: (1, 2),
    Format.BF16: (1, 2),
    Format.Q8_0: (32, 34),
    Format.Q4_0: (32, 18),
    Format.Q4_1: (32, 20),
    Format.Q4_K: (256, 144),
    Format.Q4_T: (32, 18),
    Format.Q3_T: (32, 14),
}


def parse_format(label: str) -> Format:
    """Return the format of that label. Raises ValueError that lists the known ones."""
    for fmt in Format:
        if fmt.label == label.lower():
            return fmt
    raise ValueError(f"unknown quantisation {label!r}: one of {', '.join(f.label for f in Format)}")


def round_up(n: int, multiple: int) -> int:
    return -(-n // multiple) * multiple


def row_bytes(fmt: Format, cols: int) -> int:
    """Bytes of one row in row-major (GGUF or plain) storage; cols must be whole blocks."""
    assert cols % fmt.block_cols == 0, f"{cols} columns are not whole {fmt.label} blocks"
    return cols // fmt.block_cols * fmt.block_bytes


def group_bytes(fmt: Format, cols: int) -> int:
    """Bytes of one row group (16 rows x cols) in kernel layout."""
    blocks = round_up(cols, fmt.block_cols) // fmt.block_cols
    match fmt:
        case Format.F32:
            return cols * LANES * 4
        case Format.F16 | Format.BF16:
            return round_up(cols * LANES * 2, ALIGNMENT)
        case Format.Q8_0:  # records of two blocks, 64 + 2 x 512; an odd last block: 64 + 512
            return blocks // 2 * 1088 + blocks % 2 * 576
        case (
            Format.Q4_0 | Format.Q4_T
        ):  # records of two blocks, 64 + 2 x 256; an odd last block: 64 + 256
            return blocks // 2 * 576 + blocks % 2 * 320
        case Format.Q3_T:  # records of two blocks, 64 + 2 x 192; an odd last block: 64 + 192
            return blocks // 2 * 448 + blocks % 2 * 256
        case Format.Q4_1:  # 64 (d and m) + 256
            return blocks * 320
        case Format.Q4_K:
            return blocks * 2368


def matrix_bytes(fmt: Format, rows: int, cols: int) -> int:
    """Bytes of a whole matrix [rows, cols] in kernel layout."""
    return round_up(rows, LANES) // LANES * group_bytes(fmt, cols)
