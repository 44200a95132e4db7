"""Artifact: an opened NAME.shoal, whole or slice. Reads are positional and checked by hash."""

import json
import os
from collections import deque
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
from blake3 import blake3 as Blake3
from numpy.typing import NDArray

from shoal import ops
from shoal.artifact.inventory import Kind
from shoal.artifact.manifest import (
    DENSE_FILE,
    MANIFEST_NAME,
    DenseTensor,
    ExpertLayer,
    Manifest,
    TextFile,
    decode_manifest,
)
from shoal.artifact.pregate import PREGATE_FILE, PregateEntry
from shoal.errors import ArtifactError, CorruptArtifact, NotOwned
from shoal.limits import MAX_MANIFEST_BYTES
from shoal.model_spec import ModelSpec
from shoal.paths import SUFFIX
from shoal.quant import Scheme

U8 = NDArray[np.uint8]
F32 = NDArray[np.float32]

_PIECE_BYTES = 16 << 20
_MAX_READERS = 4  # threads that read one tensor


@dataclass(frozen=True, slots=True)
class ExpertLocation:
    """Where an expert lies: `num_bytes` (a multiple of 4096) at `offset` (one too) of `path`."""

    path: Path
    offset: int
    num_bytes: int
    blake3: str


class Artifact:
    """One model on disk. Immutable; safe to share between threads; holds no open file."""

    def __init__(self, path: Path, manifest: Manifest) -> None:
        self.path = path
        self.manifest = manifest
        self.spec: ModelSpec = manifest.spec
        self.identity: str = manifest.identity
        self._dense = {tensor.name: tensor for tensor in manifest.dense}
        self._experts = {layer.layer: layer for layer in manifest.experts}

    @staticmethod
    def open(path: Path) -> "Artifact":
        """Read and check the manifest and the size of every file; hashes are checked at each read.

        Raises:
            CorruptArtifact: names the file that is missing, truncated or not what it should be.
            UnsupportedModel: the artifact was written in another format version.
        """
        artifact = Artifact.open_unchecked(path)
        for name, expected in artifact.file_sizes().items():
            check_size(path / name, expected)
        return artifact

    @staticmethod
    def open_unchecked(path: Path) -> "Artifact":
        """Read the manifest and look at no other file: for `shoal verify` and `shoal inspect`."""
        return Artifact(path, decode_manifest(_read_manifest(path), str(path / MANIFEST_NAME)))

    @property
    def name(self) -> str:
        """The folder's name without `.shoal`."""
        return self.path.resolve().name.removesuffix(SUFFIX)

    @property
    def kv_dtype(self) -> type[np.float16] | type[np.float32]:
        """What the KV cache holds: float32 for float artifacts, else float16 (exactness rule 6)."""
        formats = {tensor.format for tensor in self.manifest.dense}
        formats |= {layer.weights.gate_up for layer in self.manifest.experts}
        return np.float32 if all(fmt.is_float for fmt in formats) else np.float16

    @property
    def owned_experts(self) -> Mapping[int, tuple[int, ...]]:
        """The experts whose bytes are here: layer -> indices, ascending; only layers with some."""
        return {
            layer.layer: tuple(i for first, last in layer.present for i in range(first, last + 1))
            for layer in self.manifest.experts
            if layer.present
        }

    def file_sizes(self) -> dict[str, int]:
        """The files that must be here, and the exact size of each."""
        sizes: dict[str, int] = {}
        if self.manifest.has_dense:
            last = self.manifest.dense[-1]
            sizes[DENSE_FILE] = last.offset + last.num_bytes
        for layer in self.manifest.experts:
            if layer.present:
                sizes[layer.file] = layer.offset + layer.num_present * layer.expert_bytes
        if self.manifest.pregates:
            final = self.manifest.pregates[-1]
            sizes[PREGATE_FILE] = final.offset + final.plan.num_bytes
        sizes.update({file.name: file.num_bytes for file in self.manifest.files if file.present})
        return sizes

    def has(self, name: str) -> bool:
        """Whether the model has a dense tensor of that name (a slice may not hold its bytes)."""
        return name in self._dense

    def scheme(self, layer: int) -> Scheme:
        """What the coordinator quantises that layer's FFN input rows to."""
        entry = self._experts.get(layer)
        if entry is not None:
            return entry.weights.scheme
        return self._dense[f"layers.{layer}.ffn.dense"].format.scheme

    def dense_scheme(self, name: str) -> Scheme:
        """What rows are quantised to before that matrix."""
        return self._dense[name].format.scheme

    def matrix(self, name: str) -> ops.Matrix:
        """Read a matrix into kernel-ready memory.

        Raises: CorruptArtifact naming file and tensor; ArtifactError where the slice lacks it.
        """
        tensor = self._dense[name]
        assert tensor.slot.kind is Kind.MATRIX, f"{name} is a {tensor.slot.kind}"
        rows, cols = tensor.slot.shape
        return ops.Matrix(tensor.format, rows, cols, self._read_dense(tensor))

    def vector(self, name: str) -> F32:
        """Read a vector. Raises as `matrix` does."""
        tensor = self._dense[name]
        assert tensor.slot.kind is Kind.VECTOR, f"{name} is a {tensor.slot.kind}"
        return self._read_dense(tensor).view(np.float32)

    def dense_values(self, name: str) -> F32:
        """Read a vector [n], or a matrix [rows, cols] as float32. Raises as `matrix` does."""
        if self._dense[name].slot.kind is Kind.VECTOR:
            return self.vector(name)
        return ops.unpack_matrix(self.matrix(name))

    def dense_ffn(self, name: str) -> tuple[ops.ExpertLayout, U8]:
        """Read a dense layer's FFN, packed as one expert. Raises as `matrix` does."""
        tensor = self._dense[name]
        assert tensor.slot.kind is Kind.FFN and tensor.down is not None, name
        dim, ffn_dim = tensor.slot.shape
        layout = ops.ExpertLayout(dim, ffn_dim, tensor.format, tensor.down)
        return layout, self._read_dense(tensor)

    def expert_layer(self, layer: int) -> ExpertLayer:
        """The manifest's entry of a layer that has experts (KeyError otherwise)."""
        return self._experts[layer]

    def expert_layout(self, layer: int) -> ops.ExpertLayout:
        """Shape and formats of one expert of that layer."""
        weights = self._experts[layer].weights
        return ops.ExpertLayout(weights.dim, weights.ffn_dim, weights.gate_up, weights.down)

    def grid(self, layer: int) -> int:
        """g of that layer: its outputs are counted in steps of 2^-g."""
        return self._experts[layer].grid

    def expert_location(self, layer: int, index: int) -> ExpertLocation:
        """Say where an expert's bytes are.

        Raises: NotOwned naming the expert where this slice, or this model, does not have it.
        """
        entry = self._experts.get(layer)
        position = entry.position(index) if entry is not None else None
        if entry is None or position is None:
            raise NotOwned(f"expert {index} of layer {layer} is not in {self.path}")
        size = entry.expert_bytes
        offset = entry.offset + position * size
        return ExpertLocation(self.path / entry.file, offset, size, entry.blake3[index])

    def read_expert(self, layer: int, index: int) -> U8:
        """Read one expert and its padding into aligned memory. Raises as `matrix`, or NotOwned."""
        where = self.expert_location(layer, index)
        data = ops.aligned_empty(where.num_bytes)
        read_checked(
            where.path, where.offset, data, where.blake3, f"expert {index} of layer {layer}"
        )
        return data

    def read_pregate(self, entry: PregateEntry) -> ops.Matrix:
        """Read a pre-gate matrix, all parts in one. Raises CorruptArtifact naming it."""
        plan = entry.plan
        data = ops.aligned_empty(plan.num_bytes)
        path = self.path / PREGATE_FILE
        read_checked(path, entry.offset, data, entry.blake3, f"tensor {plan.name}")
        return ops.Matrix(plan.format, plan.rows, plan.dim, data)

    @cached_property
    def tokenizer_path(self) -> Path:
        """tokenizer.json, its hash checked once."""
        self.text("tokenizer.json")
        return self.path / "tokenizer.json"

    @property
    def chat_template_path(self) -> Path | None:
        """chat_template.jinja, or None where the model has none."""
        template = self.text_file("chat_template.jinja")
        return self.path / template.name if template is not None and template.present else None

    @cached_property
    def generation_config(self) -> dict[str, Any]:
        """generation_config.json; empty where the model has none."""
        if self.text_file("generation_config.json") is None:
            return {}
        value = json.loads(self.text("generation_config.json"))
        assert isinstance(value, dict), "convert writes an object, and the hash proves it unchanged"
        return value

    def text_file(self, name: str) -> TextFile | None:
        """The manifest's entry of a text file, if the model has it."""
        return next((file for file in self.manifest.files if file.name == name), None)

    def text(self, name: str) -> str:
        """Read a text file whose hash the manifest lists.

        Raises: CorruptArtifact naming it; ArtifactError where the model or the slice lacks it.
        """
        file = self.text_file(name)
        if file is None or not file.present:
            raise ArtifactError(f"{self.path} has no {name}: {self._fix(file is not None)}")
        data = np.empty(file.num_bytes, np.uint8)
        read_checked(self.path / name, 0, data, file.blake3, "text")
        return data.tobytes().decode()

    def _read_dense(self, tensor: DenseTensor) -> U8:
        if not self.manifest.has_dense:
            raise ArtifactError(f"{self.path} has no {tensor.name}: {self._fix(True)}")
        data = ops.aligned_empty(tensor.num_bytes, huge=True)
        what = f"tensor {tensor.name}"
        read_checked(self.path / DENSE_FILE, tensor.offset, data, tensor.blake3, what)
        return data

    @staticmethod
    def _fix(is_slice: bool) -> str:
        if is_slice:
            return "this slice holds experts only; use the whole artifact or a coordinator slice"
        return "convert the model again with --tokenizer DIR"


def read_checked(path: Path, offset: int, out: U8, blake3: str, what: str) -> None:
    """Fill `out` from the file and compare its hash.

    Raises: CorruptArtifact naming file and tensor when it is missing, too short, or different.
    """
    with _named(path, what):
        read_exact(path, offset, out)
    if _digest(out) != blake3:
        raise _differs(path, offset, out.nbytes, what)


def _digest(data: U8) -> str:
    # Threads of its own cost it more than a small tensor does.
    threads = Blake3.AUTO if data.nbytes > _PIECE_BYTES else 1
    return Blake3(data.data, max_threads=threads).hexdigest()


def check_hash(path: Path, offset: int, num_bytes: int, blake3: str, what: str) -> None:
    """Compare the hash of a part of a file, a piece at a time. Raises as `read_checked` does."""
    hasher = Blake3()
    buffer = np.empty(min(num_bytes, _PIECE_BYTES), np.uint8)
    with _named(path, what):
        for done in range(0, num_bytes, _PIECE_BYTES):
            piece = buffer[: min(_PIECE_BYTES, num_bytes - done)]
            read_exact(path, offset + done, piece)
            hasher.update(piece.data)
    if hasher.hexdigest() != blake3:
        raise _differs(path, offset, num_bytes, what)


@contextmanager
def _named(path: Path, what: str) -> Iterator[None]:
    fix = "fetch or convert the model again"
    try:
        yield
    except FileNotFoundError:
        raise CorruptArtifact(f"{path} is missing ({what}); {fix}") from None
    except EOFError:
        raise CorruptArtifact(f"{path}: truncated inside {what}; {fix}") from None


def _differs(path: Path, offset: int, num_bytes: int, what: str) -> CorruptArtifact:
    return CorruptArtifact(
        f"{path}: {what}: its bytes are not those that were written"
        f" ({num_bytes} bytes at {offset}); fetch or convert the model again"
    )


def read_exact(path: Path, offset: int, out: U8) -> None:
    """Fill `out` from the file, by positional reads. Raises EOFError when the file ends before."""
    view = out.data
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        if len(view) <= _PIECE_BYTES:
            _fill(descriptor, offset, view)
            return
        # Of a warm file the time goes to copying and to the first touch of memory: to processors.
        with ThreadPoolExecutor(min(_MAX_READERS, os.cpu_count() or 1)) as threads:
            starts = range(0, len(view), _PIECE_BYTES)
            pieces = [view[start : start + _PIECE_BYTES] for start in starts]
            places = [offset + start for start in starts]
            deque(threads.map(partial(_fill, descriptor), places, pieces), maxlen=0)
    finally:
        os.close(descriptor)


def _fill(descriptor: int, offset: int, view: memoryview) -> None:
    done = 0
    while done < len(view):
        count = os.preadv(descriptor, [view[done:]], offset + done)
        if count == 0:
            raise EOFError
        done += count


def check_size(path: Path, expected: int) -> None:
    """Raise CorruptArtifact unless the file exists and has exactly that size."""
    try:
        found = path.stat().st_size
    except FileNotFoundError:
        raise CorruptArtifact(f"{path} is missing; fetch or convert the model again") from None
    if found != expected:
        problem = "truncated" if found < expected else "too long"
        raise CorruptArtifact(
            f"{path}: {problem}: {found} bytes, the manifest says {expected};"
            " fetch or convert the model again"
        )


def _read_manifest(path: Path) -> bytes:
    file = path / MANIFEST_NAME
    try:
        if file.stat().st_size > MAX_MANIFEST_BYTES:
            raise CorruptArtifact(f"{file}: more than {MAX_MANIFEST_BYTES} bytes: not a manifest")
        return file.read_bytes()
    except (FileNotFoundError, NotADirectoryError):
        raise CorruptArtifact(
            f"{path} is not an artifact: it has no {MANIFEST_NAME};"
            " make one with `shoal convert SRC OUT`"
        ) from None
