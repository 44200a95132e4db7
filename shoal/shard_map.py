"""The `--moe-shards` grammar: who computes which experts, parsed, checked, printed (core).

    map      := entry ("," entry)*
    entry    := spans ["@" spans] "=" endpoint ("|" endpoint)*     experts @ layers = replicas
    spans    := span ("+" span)*
    span     := number ["-" number]                                both ends included
    endpoint := grpc://host:port | grpcs://host:port | unix:///path | local | ray://namespace

Blanks between these are ignored. Without `@` an entry holds for every layer. Whatever is wrong is
refused with the line, a caret under the character, and what to write instead. `str(parse(text))`
parses to an equal map. A map from a file is turned into this text first, so one grammar rules.
"""

import re
import tomllib
from dataclasses import dataclass, field
from enum import StrEnum

import numpy as np
from numpy.typing import NDArray

from shoal import limits
from shoal.errors import ShardMapError
from shoal.model_spec import ModelSpec


class EndpointKind(StrEnum):
    GRPC = "grpc"
    GRPCS = "grpcs"
    UNIX = "unix"
    LOCAL = "local"
    RAY = "ray"


@dataclass(frozen=True, slots=True)
class Endpoint:
    """Where experts are computed. `address`: host:port, a path, a namespace; "" for `local`."""

    kind: EndpointKind
    address: str
    at: int = field(default=0, compare=False)  # offset into the map's text

    def __str__(self) -> str:
        return "local" if self.kind is EndpointKind.LOCAL else f"{self.kind}://{self.address}"


@dataclass(frozen=True, slots=True)
class Span:
    """The indices first..last, both included."""

    first: int
    last: int
    at: int = field(default=0, compare=False)

    def __str__(self) -> str:
        return str(self.first) if self.first == self.last else f"{self.first}-{self.last}"


@dataclass(frozen=True, slots=True)
class ShardEntry:
    """Experts (of some layers, or of all when `layers` is empty) and the replicas that own them."""

    experts: tuple[Span, ...]
    layers: tuple[Span, ...]
    endpoints: tuple[Endpoint, ...]

    def __str__(self) -> str:
        at_layers = "@" + show_spans(self.layers) if self.layers else ""
        replicas = "|".join(map(str, self.endpoints))
        return f"{show_spans(self.experts)}{at_layers}={replicas}"


@dataclass(frozen=True, slots=True)
class ShardMap:
    """A parsed map. `text` is what the user wrote, `origin` where: both only for messages."""

    entries: tuple[ShardEntry, ...]
    text: str = field(compare=False)
    origin: str = field(default="--moe-shards", compare=False)

    def __str__(self) -> str:
        return ",".join(map(str, self.entries))

    def error(self, what: str, at: int) -> ShardMapError:
        """Build the error that points at offset `at` of the map's text."""
        return _error_at(self.origin, self.text, at, what)


def show_spans(spans: tuple[Span, ...]) -> str:
    """Return spans as the grammar writes them: `0-3+7`."""
    return "+".join(map(str, spans))


def spans_of(indices: NDArray[np.intp]) -> tuple[Span, ...]:
    """Return the fewest spans that hold exactly these ascending, distinct indices."""
    if indices.size == 0:
        return ()
    cuts = np.flatnonzero(np.diff(indices) != 1) + 1
    runs = np.split(indices, cuts)
    return tuple(Span(int(run[0]), int(run[-1])) for run in runs)


def parse(text: str, origin: str = "--moe-shards") -> ShardMap:
    """Parse a map. Raises ShardMapError that points at the first character that does not fit."""
    if len(text) > limits.MAX_SHARD_MAP_CHARS:
        raise ShardMapError(
            f"{origin}: {len(text)} characters, more than {limits.MAX_SHARD_MAP_CHARS}: "
            "join ranges of one endpoint with '+'"
        )
    return ShardMap(_Parser(text, origin).entries(), text, origin)


def parse_toml(text: str, origin: str) -> ShardMap:
    """Parse a map file of `[[shard]]` tables: experts = "0-63", layers = "0-14", endpoints = [...].

    `layers` may be left out. Raises ShardMapError that names the table, or points into the
    equivalent `--moe-shards` text.
    """
    try:
        document = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise ShardMapError(f"{origin}: not valid TOML: {error}") from error
    tables = document.get("shard")
    if set(document) != {"shard"} or not isinstance(tables, list) or not tables:
        raise ShardMapError(f"{origin}: expected [[shard]] tables and nothing else")
    entries = [_toml_entry(table, f"{origin}: shard {n}") for n, table in enumerate(tables, 1)]
    return parse(",".join(entries), origin)


def _toml_entry(table: object, where: str) -> str:
    form = 'experts = "0-63", optional layers = "0-14", endpoints = ["grpc://host:port"]'
    if not isinstance(table, dict):
        raise ShardMapError(f"{where}: must be a table with {form}")
    if unknown := sorted(set(table) - {"experts", "layers", "endpoints"}):
        raise ShardMapError(f"{where}: unknown key {unknown[0]!r}: expected {form}")
    experts, layers, endpoints = (table.get(key) for key in ("experts", "layers", "endpoints"))
    if not (
        isinstance(experts, str)
        and (layers is None or isinstance(layers, str))
        and isinstance(endpoints, list)
        and all(isinstance(endpoint, str) for endpoint in endpoints)
    ):
        raise ShardMapError(f"{where}: wrong type or missing key: expected {form}")
    at_layers = "" if layers is None else f"@{layers}"
    return f"{experts}{at_layers}={'|'.join(map(str, endpoints))}"


def entry_of_expert(shard_map: ShardMap, spec: ModelSpec) -> NDArray[np.int32]:
    """Check the map against the model and return which entry owns each expert.

    Returns [L, E] int32, the index into `shard_map.entries`; E is the largest layer's. Rows of
    layers without experts are meaningless.

    Raises ShardMapError: a span beyond the model, an expert owned twice, an expert owned by nobody,
    a kind of endpoint that does not exist yet.
    """
    num_experts = np.array([0 if x.router is None else x.router.num_experts for x in spec.layers])
    if not num_experts.any():
        raise ShardMapError(f"{shard_map.origin}: this model has no experts: leave the flag out")
    nobody = len(shard_map.entries)
    owner = np.full((spec.num_layers, int(num_experts.max())), nobody, np.int32)
    for index, entry in enumerate(shard_map.entries):
        _refuse_unsupported(shard_map, entry)
        for layers, experts in _rectangles(shard_map, entry, owner.shape):
            block = owner[layers.first : layers.last + 1, experts.first : experts.last + 1]
            if (taken := block != nobody).any():
                raise _overlap(shard_map, block, taken, layers, experts)
            block[:] = index
    exists = np.arange(owner.shape[1]) < num_experts[:, None]
    if (missing := exists & (owner == nobody)).any():
        raise ShardMapError(
            f"{shard_map.origin}: no endpoint for {describe(missing)}: give every expert of every "
            f"layer an owner (this model has experts 0-{owner.shape[1] - 1}, "
            f"layers 0-{spec.num_layers - 1}); `local` computes in this process"
        )
    return owner


def describe(cells: NDArray[np.bool_]) -> str:
    """Name the true cells of a [layers, experts] array: `experts 3-5 of layers 0-2; …`."""
    layers_of: dict[str, list[int]] = {}
    for layer in map(int, np.flatnonzero(cells.any(axis=1))):
        layers_of.setdefault(show_spans(spans_of(np.flatnonzero(cells[layer]))), []).append(layer)
    parts = [
        f"{_noun('expert', experts)} of {_noun('layer', show_spans(spans_of(np.array(layers))))}"
        for experts, layers in layers_of.items()
    ]
    shown = parts[:4] + ([f"{len(parts) - 4} more such groups"] if len(parts) > 4 else [])
    return "; ".join(shown)


def _noun(noun: str, spans: str) -> str:
    return f"{noun} {spans}" if spans.isdigit() else f"{noun}s {spans}"


def _refuse_unsupported(shard_map: ShardMap, entry: ShardEntry) -> None:
    instead = {
        EndpointKind.RAY: "Ray endpoints are not there yet: list the nodes as grpc://host:port",
    }
    for endpoint in entry.endpoints:
        if endpoint.kind in instead:
            raise shard_map.error(instead[endpoint.kind], endpoint.at)
        if endpoint.kind is EndpointKind.LOCAL and len(entry.endpoints) > 1:
            what = "`local` is no replica: what this process computes is lost with it anyway"
            raise shard_map.error(what, endpoint.at)


def _rectangles(
    shard_map: ShardMap, entry: ShardEntry, shape: tuple[int, ...]
) -> list[tuple[Span, Span]]:
    num_layers, num_experts = shape
    for span, count, noun in [
        *((span, num_experts, "experts") for span in entry.experts),
        *((span, num_layers, "layers") for span in entry.layers),
    ]:
        if span.last >= count:
            raise shard_map.error(
                f"{noun} {span} are out of range: this model has {noun} 0-{count - 1}", span.at
            )
    layers = entry.layers or (Span(0, num_layers - 1),)
    return [(layer, experts) for layer in layers for experts in entry.experts]


def _overlap(
    shard_map: ShardMap,
    block: NDArray[np.int32],
    taken: NDArray[np.bool_],
    layers: Span,
    experts: Span,
) -> ShardMapError:
    other = shard_map.entries[int(block[taken][0])]
    shared = np.zeros((layers.last + 1, experts.last + 1), np.bool_)
    shared[layers.first :, experts.first :] = taken
    return shard_map.error(
        f"{describe(shared)} already belong to '{other}': write replicas of one range as a|b",
        experts.at,
    )


def _error_at(origin: str, text: str, at: int, what: str) -> ShardMapError:
    # A window around the character, so that the caret lines up in a terminal of 80 columns. Any
    # blank or unprintable character takes one column.
    line = "".join(char if char.isprintable() else "?" for char in text)
    start = max(0, at - 40)
    head = "..." if start else ""
    tail = "..." if len(line) > start + 70 else ""
    caret = " " * (2 + len(head) + at - start) + "^"
    window = line[start : start + 70]
    return ShardMapError(f"{origin}, character {at + 1}: {what}\n  {head}{window}{tail}\n{caret}")


class _Parser:
    """Recursive descent over one text; `_at` is the next character."""

    def __init__(self, text: str, origin: str) -> None:
        self._text, self._origin, self._at = text, origin, 0

    def entries(self) -> tuple[ShardEntry, ...]:
        entries = [self._entry()]
        while self._take(","):
            entries.append(self._entry())
        if self._at < len(self._text):
            raise self._expected("',' or the end")
        return tuple(entries)

    def _entry(self) -> ShardEntry:
        experts = self._spans("expert", limits.MAX_EXPERTS)
        layers = self._spans("layer", limits.MAX_LAYERS) if self._take("@") else ()
        if not self._take("="):
            raise self._expected("'+', '=' or '-'" if layers else "'+', '@', '=' or '-'")
        endpoints = [self._endpoint()]
        while self._take("|"):
            endpoint = self._endpoint()
            if endpoint in endpoints:
                raise self._error(f"{endpoint} is listed twice", endpoint.at)
            endpoints.append(endpoint)
        return ShardEntry(experts, layers, tuple(endpoints))

    def _spans(self, noun: str, bound: int) -> tuple[Span, ...]:
        spans = [self._span(noun, bound)]
        while self._take("+"):
            spans.append(self._span(noun, bound))
        return tuple(spans)

    def _span(self, noun: str, bound: int) -> Span:
        first, at = self._number(noun, bound)
        last = self._number(noun, bound)[0] if self._take("-") else first
        if last < first:
            what = f"{noun}s {first}-{last} are reversed: write {last}-{first}"
            raise self._error(what, at)
        return Span(first, last, at)

    def _number(self, noun: str, bound: int) -> tuple[int, int]:
        self._skip_blanks()
        digits = re.compile(r"[0-9]+").match(self._text, self._at)
        if digits is None:
            raise self._expected(f"a number of a{'n' if noun == 'expert' else ''} {noun}")
        at = self._at
        if len(digits[0]) > 9 or int(digits[0]) >= bound:
            raise self._error(f"{noun} {digits[0][:12]} is out of range: at most {bound - 1}", at)
        self._at = digits.end()
        return int(digits[0]), at

    def _endpoint(self) -> Endpoint:
        self._skip_blanks()
        at = self._at
        word = re.compile(r"[^,|]*").match(self._text, at)
        assert word is not None  # it matches the empty string too
        self._at = word.end()
        text = word[0].rstrip()
        kind, colon, address = text.partition("://")
        if text == "local":
            return Endpoint(EndpointKind.LOCAL, "", at)
        match kind if colon else "":
            case "grpc" | "grpcs":
                self._check_host_port(address, at + len(kind) + 3)
            case "unix":
                if not address.startswith("/") or address.endswith("/"):
                    raise self._error("expected a socket's absolute path: unix:///path", at + 7)
                if len(address.encode()) > limits.MAX_SOCKET_PATH_BYTES:
                    what = f"a socket's path has at most {limits.MAX_SOCKET_PATH_BYTES} bytes"
                    raise self._error(what, at + 7)
            case "ray":
                if not re.fullmatch(r"[\w.-]+", address):
                    raise self._error("expected a namespace: ray://namespace", at + 6)
            case _:
                self._at = at
                raise self._expected("an endpoint (grpc://host:port, unix:///path or local)")
        if blank := re.search(r"\s|[^\x20-\x7e]", address) if kind != "unix" else None:
            raise self._error("a blank or odd character in an address", at + blank.start())
        return Endpoint(EndpointKind(kind), address, at)

    def _check_host_port(self, address: str, at: int) -> None:
        host, _, port = address.rpartition(":")
        if not re.fullmatch(r"\[[0-9A-Fa-f:.]+\]|[\w.-]+", host, re.ASCII):
            raise self._error("expected host:port, as in grpc://127.0.0.1:50051", at)
        if not re.fullmatch(r"[0-9]{1,5}", port) or not 0 < int(port) < 65536:
            raise self._error("expected a port in 1..65535", at + len(host) + 1)

    def _take(self, char: str) -> bool:
        self._skip_blanks()
        taken = self._text.startswith(char, self._at)
        self._at += taken
        return taken

    def _skip_blanks(self) -> None:
        while self._at < len(self._text) and self._text[self._at].isspace():
            self._at += 1

    def _expected(self, what: str) -> ShardMapError:
        self._skip_blanks()
        found = repr(self._text[self._at]) if self._at < len(self._text) else "the end"
        return self._error(f"expected {what}, found {found}", self._at)

    def _error(self, what: str, at: int) -> ShardMapError:
        return _error_at(self._origin, self._text, at, what)
