"""The manifest of an artifact: dataclasses ↔ JSON, and the identity of a model (core).

Rules of this file: a manifest that parses is complete and consistent (every tensor of the spec is
listed once, sizes follow from shapes, offsets leave no hole), so nothing after it checks again. A
slice carries the same list as the whole; it says which part of the bytes it has.

Specification: docs/formats/artifact.md.
"""

from collections import Counter
from dataclasses import dataclass
from typing import Any

from shoal.artifact.canonical import JsonObject, MalformedJson, canonical_json, digest, parse_object
from shoal.artifact.fields import Fields, check_hash
from shoal.artifact.inventory import Kind, Slot, dense_slots
from shoal.artifact.pregate import PregateEntry, pregate_to_json, pregates_from_json
from shoal.artifact.spec_json import spec_from_json, spec_to_json
from shoal.errors import CorruptArtifact, UnsupportedModel
from shoal.limits import MAX_EXPERTS, MAX_GRID, MAX_LAYERS, MAX_MANIFEST_BYTES, MIN_GRID
from shoal.model_spec import ModelSpec
from shoal.quant import LANES, Format, Scheme, group_bytes, matrix_bytes, round_up

FORMAT_VERSION = 1
MANIFEST_NAME = "manifest.json"
DENSE_FILE = "dense.safetensors"
PAGE = 4096  # experts start on it and are padded to it, for O_DIRECT
TEXT_FILES = ("tokenizer.json", "chat_template.jinja", "generation_config.json")

_FIX = "fetch or convert the model again"
_FORMATS = {fmt.label: fmt for fmt in Format}
_SCHEMES = {scheme.name.lower(): scheme for scheme in Scheme}


@dataclass(frozen=True, slots=True)
class Weights:
    """Shape and formats of one packed FFN (an expert, or a dense layer's)."""

    dim: int  # D
    ffn_dim: int  # I
    gate_up: Format
    down: Format

    @property
    def scheme(self) -> Scheme:
        return self.gate_up.scheme

    @property
    def num_bytes(self) -> int:
        """Bytes of [gate|up|down] in kernel layout, not padded to a page."""
        gate_up_groups = 2 * (round_up(self.ffn_dim, LANES) // LANES)
        gate_up = gate_up_groups * group_bytes(self.gate_up, self.dim)
        return gate_up + matrix_bytes(self.down, self.dim, self.ffn_dim)


@dataclass(frozen=True, slots=True)
class DenseTensor:
    """One tensor of dense.safetensors. `offset` counts from the start of the file."""

    slot: Slot
    format: Format  # of an FFN: gate and up
    down: Format | None  # of an FFN only
    offset: int
    blake3: str

    @property
    def name(self) -> str:
        return self.slot.name

    @property
    def num_bytes(self) -> int:
        return slot_bytes(self.slot, self.format, self.down)


@dataclass(frozen=True, slots=True)
class ExpertLayer:
    """The experts of one layer: all listed, those in `present` stored here in ascending order."""

    layer: int
    weights: Weights
    grid: int  # g of exactness rule 5: an output counts in steps of 2^-g
    blake3: tuple[str, ...]  # of each expert's bytes, padding included
    present: tuple[tuple[int, int], ...]  # inclusive ranges, ascending, disjoint
    offset: int  # of the first present expert, from the start of the file; 0 when none is

    @property
    def file(self) -> str:
        return expert_file(self.layer)

    @property
    def num_experts(self) -> int:
        return len(self.blake3)

    @property
    def expert_bytes(self) -> int:
        """Bytes from one expert to the next: a multiple of 4096."""
        return round_up(self.weights.num_bytes, PAGE)

    @property
    def num_present(self) -> int:
        return sum(last - first + 1 for first, last in self.present)

    def position(self, index: int) -> int | None:
        """Return which of the stored experts `index` is, or None where it is not stored."""
        before = 0
        for first, last in self.present:
            if first <= index <= last:
                return before + index - first
            before += last - first + 1
        return None


@dataclass(frozen=True, slots=True)
class TextFile:
    name: str
    num_bytes: int
    blake3: str
    present: bool


@dataclass(frozen=True, slots=True)
class Manifest:
    spec: ModelSpec
    source: str  # base name of what it was converted from; not part of the identity
    notes: tuple[str, ...]  # what convert did that was not asked for; not part of the identity
    dense: tuple[DenseTensor, ...]
    has_dense: bool  # whether dense.safetensors is here
    experts: tuple[ExpertLayer, ...]  # ascending by layer, a layer with a router each
    files: tuple[TextFile, ...]
    pregates: tuple[PregateEntry, ...] = ()  # empty: not here; not part of the identity
    shadow_of: str | None = None  # of a shadow: the model's identity; not part of its own

    @property
    def quantisation(self) -> str:
        """The format that most weights have, experts first: what people call the model's."""
        votes: Counter[Format] = Counter()
        for layer in self.experts:
            votes[layer.weights.gate_up] += layer.num_experts * layer.expert_bytes
        if not votes:
            for tensor in self.dense:
                if tensor.slot.kind is Kind.FFN:
                    votes[tensor.format] += tensor.num_bytes
        return max(sorted(votes), key=lambda fmt: votes[fmt]).label

    @property
    def is_whole(self) -> bool:
        return self.has_dense and all(
            layer.present == ((0, layer.num_experts - 1),) for layer in self.experts
        )

    @property
    def identity(self) -> str:
        """What a node and a coordinator compare: the same for a whole artifact and its slices."""
        return digest(canonical_json(_identity_object(self)))

    def expert_layer(self, layer: int) -> ExpertLayer | None:
        return next((entry for entry in self.experts if entry.layer == layer), None)


def slot_bytes(slot: Slot, fmt: Format, down: Format | None = None) -> int:
    """Return the bytes of a dense tensor as stored."""
    match slot.kind:
        case Kind.VECTOR:
            return 4 * slot.shape[0]
        case Kind.MATRIX:
            return matrix_bytes(fmt, *slot.shape)
        case Kind.FFN:
            assert down is not None
            return Weights(slot.shape[0], slot.shape[1], fmt, down).num_bytes


def expert_file(layer: int) -> str:
    return f"experts/layer-{layer:03d}.safetensors"


def encode_manifest(manifest: Manifest) -> bytes:
    """Return the bytes of manifest.json: one line of canonical JSON with its own hash."""
    value = _to_json(manifest)
    value["manifest_blake3"] = digest(canonical_json(value))
    return canonical_json(value) + b"\n"


def decode_manifest(data: bytes, where: str) -> Manifest:
    """Read manifest.json.

    Raises:
        CorruptArtifact: it is not what some version-1 writer wrote; names the field.
        UnsupportedModel: another format version.
    """
    if len(data) > MAX_MANIFEST_BYTES:
        raise CorruptArtifact(f"{where}: {len(data)} bytes, more than {MAX_MANIFEST_BYTES}")
    try:
        value = parse_object(data)
    except MalformedJson as error:
        raise CorruptArtifact(f"{where}: not a manifest: {error}; {_FIX}") from None
    _check_version(value, where)
    try:
        manifest = _from_json(value, where)
    except CorruptArtifact as error:
        raise CorruptArtifact(f"{error}; {_FIX}") from None
    expected = _to_json(manifest)
    expected["manifest_blake3"] = digest(canonical_json(expected))
    for key, why in (
        ("identity", "the tensors and the spec listed here have another identity"),
        ("quantisation", "is not the format of most weights"),
        ("manifest_blake3", "the manifest was changed after it was written"),
    ):
        if value[key] != expected[key]:
            raise CorruptArtifact(f"{where}.{key}: {why}; {_FIX}")
    return manifest


def _check_version(value: JsonObject, where: str) -> None:
    if value.get("format") != "shoal":
        raise CorruptArtifact(f"{where}: field 'format' is not 'shoal': this is no artifact")
    version = value.get("format_version")
    if type(version) is not int:
        raise CorruptArtifact(f"{where}.format_version: expected an integer")
    if version != FORMAT_VERSION:
        raise UnsupportedModel(
            f"{where}: artifact format version {version}; this shoal reads {FORMAT_VERSION}:"
            " convert the model again, or use the shoal that made it"
        )


def _identity_object(manifest: Manifest) -> JsonObject:
    tensors: list[JsonObject] = [
        {
            "name": tensor.name,
            "format": tensor.format.label,
            "down_format": tensor.down.label if tensor.down is not None else None,
            "scheme": tensor.format.scheme.name.lower(),
            "grid": None,
            "shape": list(tensor.slot.shape),
            "blake3": tensor.blake3,
        }
        for tensor in manifest.dense
    ]
    tensors += [
        {
            "name": f"layers.{layer.layer}.experts.{index}",
            "format": layer.weights.gate_up.label,
            "down_format": layer.weights.down.label,
            "scheme": layer.weights.scheme.name.lower(),
            "grid": layer.grid,
            "shape": [layer.weights.dim, layer.weights.ffn_dim],
            "blake3": blake3,
        }
        for layer in manifest.experts
        for index, blake3 in enumerate(layer.blake3)
    ]
    return {
        "format_version": FORMAT_VERSION,
        "spec": spec_to_json(manifest.spec),
        "quantisation": manifest.quantisation,
        "tensors": tensors,
        "tokenizer": {f.name: f.blake3 for f in manifest.files}.get("tokenizer.json"),
    }


def _to_json(manifest: Manifest) -> JsonObject:
    value: JsonObject = {
        "format": "shoal",
        "format_version": FORMAT_VERSION,
        "identity": manifest.identity,
        "spec": spec_to_json(manifest.spec),
        "quantisation": manifest.quantisation,
        "source": manifest.source,
        "notes": list(manifest.notes),
        "has_dense": manifest.has_dense,
        "dense": [_dense_to_json(tensor) for tensor in manifest.dense],
        "experts": [_experts_to_json(layer) for layer in manifest.experts],
        "files": [
            {"name": f.name, "bytes": f.num_bytes, "blake3": f.blake3, "present": f.present}
            for f in manifest.files
        ],
    }
    if manifest.pregates:  # absent, not empty: manifests without them keep their bytes
        value["pregate"] = [pregate_to_json(entry) for entry in manifest.pregates]
    if manifest.shadow_of is not None:
        value["shadow_of"] = manifest.shadow_of
    return value


def _dense_to_json(tensor: DenseTensor) -> JsonObject:
    return {
        "name": tensor.name,
        "kind": tensor.slot.kind.value,
        "format": tensor.format.label,
        "down_format": tensor.down.label if tensor.down is not None else None,
        "scheme": tensor.format.scheme.name.lower(),
        "shape": list(tensor.slot.shape),
        "file": DENSE_FILE,
        "offset": tensor.offset,
        "bytes": tensor.num_bytes,
        "blake3": tensor.blake3,
    }


def _experts_to_json(layer: ExpertLayer) -> JsonObject:
    return {
        "layer": layer.layer,
        "format": layer.weights.gate_up.label,
        "down_format": layer.weights.down.label,
        "scheme": layer.weights.scheme.name.lower(),
        "shape": [layer.weights.dim, layer.weights.ffn_dim],
        "grid": layer.grid,
        "file": layer.file,
        "offset": layer.offset,
        "bytes": layer.expert_bytes,
        "present": [list(span) for span in layer.present],
        "blake3": list(layer.blake3),
    }


def _from_json(value: JsonObject, where: str) -> Manifest:
    fields = Fields(value, where)
    for key in ("format", "format_version"):
        fields.take(key)  # checked before
    for key in ("identity", "manifest_blake3"):
        fields.hash(key)
    fields.text("quantisation", 64)
    spec = spec_from_json(fields.take("spec"), f"{where}.spec")
    slots = dense_slots(spec)
    dense = tuple(
        _dense_from_json(item, place, slots[index] if index < len(slots) else None)
        for index, (item, place) in enumerate(fields.items("dense", len(slots) + 1))
    )
    if len(dense) != len(slots):
        raise fields.fail("dense", f"tensor {slots[len(dense)].name} is missing")
    _check_no_holes(dense, f"{where}.dense")
    experts = tuple(
        _experts_from_json(item, place, spec) for item, place in fields.items("experts", MAX_LAYERS)
    )
    expected = [index for index, layer in enumerate(spec.layers) if layer.router is not None]
    if [layer.layer for layer in experts] != expected:
        raise fields.fail("experts", "must list each layer that has a router, once, in order")
    schemes = {layer.layer: layer.weights.scheme for layer in experts}
    manifest = Manifest(
        spec=spec,
        source=fields.text("source"),
        notes=tuple(_note(*item) for item in fields.items("notes", 4096)),
        dense=dense,
        has_dense=fields.boolean("has_dense"),
        experts=experts,
        files=tuple(_file(*item) for item in fields.items("files", len(TEXT_FILES))),
        pregates=pregates_from_json(fields, spec, schemes),
        shadow_of=fields.hash("shadow_of") if fields.has("shadow_of") else None,
    )
    fields.done()
    if manifest.shadow_of is not None and manifest.has_dense:
        raise fields.fail("shadow_of", "a shadow has experts and no dense part")
    if manifest.pregates and manifest.pregates[0].offset % PAGE:
        raise fields.fail("pregate", f"the first offset is not a multiple of {PAGE}")
    if len({file.name for file in manifest.files}) != len(manifest.files):
        raise CorruptArtifact(f"{where}.files: a file is listed twice")
    return manifest


def _note(value: object, where: str) -> str:
    return Fields({"note": value}, where).text("note")


def _file(value: object, where: str) -> TextFile:
    fields = Fields(value, where)
    name = fields.text("name", 64)
    if name not in TEXT_FILES:
        raise fields.fail("name", f"expected one of {', '.join(TEXT_FILES)}")
    file = TextFile(
        name, fields.integer("bytes", 0, 2**31), fields.hash("blake3"), fields.boolean("present")
    )
    fields.done()
    return file


def _dense_from_json(value: object, where: str, slot: Slot | None) -> DenseTensor:
    fields = Fields(value, where)
    name = fields.text("name", 256)
    if slot is None or name != slot.name:
        raise fields.fail("name", f"expected {slot.name if slot else 'nothing'}, found {name}")
    _expect(fields, "kind", slot.kind.value)
    fmt = fields.choice("format", _FORMATS)
    down = fields.choice("down_format", _FORMATS) if fields.optional("down_format") else None
    if (down is not None) != (slot.kind is Kind.FFN):
        raise fields.fail("down_format", "belongs to an FFN, and to nothing else")
    if slot.always_f32 and fmt is not Format.F32:
        raise fields.fail("format", f"{name} is always f32, found {fmt.label}")
    _expect(fields, "scheme", fmt.scheme.name.lower())
    _expect(fields, "shape", list(slot.shape))
    _expect(fields, "file", DENSE_FILE)
    _expect(fields, "bytes", slot_bytes(slot, fmt, down))
    tensor = DenseTensor(slot, fmt, down, fields.integer("offset", 0, 2**62), fields.hash("blake3"))
    fields.done()
    return tensor


def _check_no_holes(dense: tuple[DenseTensor, ...], where: str) -> None:
    offset = dense[0].offset
    if offset % PAGE:
        raise CorruptArtifact(f"{where}[0].offset: {offset} is not a multiple of {PAGE}")
    for index, tensor in enumerate(dense):
        if tensor.offset != offset:
            raise CorruptArtifact(f"{where}[{index}].offset: {tensor.offset}, expected {offset}")
        offset += tensor.num_bytes


def _experts_from_json(value: object, where: str, spec: ModelSpec) -> ExpertLayer:
    fields = Fields(value, where)
    layer = fields.integer("layer", 0, spec.num_layers - 1)
    router = spec.layers[layer].router
    if router is None:
        raise fields.fail("layer", f"layer {layer} has no experts")
    weights = Weights(
        spec.model_dim,
        spec.layers[layer].ffn_dim,
        fields.choice("format", _FORMATS),
        fields.choice("down_format", _FORMATS),
    )
    _expect(fields, "scheme", weights.scheme.name.lower())
    _expect(fields, "shape", [weights.dim, weights.ffn_dim])
    hashes = tuple(check_hash(*item) for item in fields.items("blake3", MAX_EXPERTS))
    if len(hashes) != router.num_experts:
        raise fields.fail("blake3", f"{len(hashes)} hashes for {router.num_experts} experts")
    present = _spans(fields, router.num_experts)
    entry = ExpertLayer(
        layer=layer,
        weights=weights,
        grid=fields.integer("grid", MIN_GRID, MAX_GRID),
        blake3=hashes,
        present=present,
        offset=fields.integer("offset", 0, 2**62),
    )
    if entry.offset % PAGE or (entry.offset == 0) != (not present):
        raise fields.fail("offset", f"{entry.offset} is not where an expert can start")
    _expect(fields, "file", entry.file)
    _expect(fields, "bytes", entry.expert_bytes)
    fields.done()
    return entry


def _spans(fields: Fields, num_experts: int) -> tuple[tuple[int, int], ...]:
    spans: list[tuple[int, int]] = []
    lowest = 0
    for value, where in fields.items("present", num_experts):
        match value:
            case [int(first), int(last)] if lowest <= first <= last < num_experts:
                spans.append((int(first), int(last)))  # JSON's true is an int to Python
                lowest = last + 2  # ranges that touch are one range
            case _:
                raise CorruptArtifact(f"{where}: expected [first, last], ascending and disjoint")
    return tuple(spans)


def _expect(fields: Fields, key: str, expected: Any) -> None:
    found = fields.take(key)
    if found != expected or type(found) is not type(expected):
        raise fields.fail(key, f"expected {expected}, found {found!r}"[:200])
