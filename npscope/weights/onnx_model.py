"""An ONNX model read from its file: graphs, nodes, and where the values of every tensor lie.

Only what decides about weights is read; what else a model holds, functions and training graphs
included, is neither looked at nor held. The numbers are those of the fields in the ONNX schema.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from types import MappingProxyType
from typing import NamedTuple

from npscope.errors import FormatError, about
from npscope.weights.external import MODEL, Files
from npscope.weights.payload import Block, Payload, Run, Runs, Varints
from npscope.weights.protobuf import BYTES, EIGHT_BYTES, FOUR_BYTES, VARINT, Field, Schema, Span, Wire

MAX_BYTES = (1 << 31) - 1
"""Bytes of a protobuf message at most; larger models keep their data in other files."""

MAX_GRAPHS = 32
"""Graphs inside one another at most: about as many as protobuf readers take."""

_MAX_COUNT = 1 << 63
_MAX_INTS = 64  # of an attribute; an axis or a permutation has fewer
_MAX_STEP = 16  # bytes between elements that each have a tag
_MAX_RANK = 64  # as NumPy has

_FLOATS, _INT32S, _STRINGS, _INT64S, _RAW, _DOUBLES, _UINT64S = 4, 5, 6, 7, 9, 10, 11
_NUMBER_BYTES = {_FLOATS: 4, _DOUBLES: 8}
_STRING = 8  # the data type


_NO_INTS: Mapping[str, tuple[int, ...]] = MappingProxyType({})
"""Shared by all nodes without attributes that are read."""


class _DataType(NamedTuple):
    name: str
    bits: int
    field: int
    width: int
    """Bytes of one number of the field, where it is not raw data."""


_DATA_TYPES = {
    1: _DataType("float32", 32, _FLOATS, 4),
    2: _DataType("uint8", 8, _INT32S, 1),
    3: _DataType("int8", 8, _INT32S, 1),
    4: _DataType("uint16", 16, _INT32S, 2),
    5: _DataType("int16", 16, _INT32S, 2),
    6: _DataType("int32", 32, _INT32S, 4),
    7: _DataType("int64", 64, _INT64S, 8),
    9: _DataType("bool", 8, _INT32S, 1),
    10: _DataType("float16", 16, _INT32S, 2),
    11: _DataType("float64", 64, _DOUBLES, 8),
    12: _DataType("uint32", 32, _UINT64S, 4),
    13: _DataType("uint64", 64, _UINT64S, 8),
    14: _DataType("complex64", 64, _FLOATS, 4),
    15: _DataType("complex128", 128, _DOUBLES, 8),
    16: _DataType("bfloat16", 16, _INT32S, 2),
    17: _DataType("float8_e4m3fn", 8, _INT32S, 1),
    18: _DataType("float8_e4m3fnuz", 8, _INT32S, 1),
    19: _DataType("float8_e5m2", 8, _INT32S, 1),
    20: _DataType("float8_e5m2fnuz", 8, _INT32S, 1),
    21: _DataType("uint4", 4, _INT32S, 1),
    22: _DataType("int4", 4, _INT32S, 1),
    23: _DataType("float4_e2m1fn", 4, _INT32S, 1),
    24: _DataType("float8_e8m0fnu", 8, _INT32S, 1),
    25: _DataType("uint2", 2, _INT32S, 1),
    26: _DataType("int2", 2, _INT32S, 1),
}

_MODEL = Schema("model", {7: BYTES}, {25: (BYTES,)})
_FUNCTION = Schema("function", {1: BYTES, 10: BYTES}, {})
_GRAPH = Schema("graph", {}, {1: (BYTES,), 5: (BYTES,), 11: (BYTES,), 12: (BYTES,)})
_VALUE_INFO = Schema("value info", {1: BYTES}, {})
_NODE = Schema("node", {3: BYTES, 4: BYTES, 7: BYTES}, {1: (BYTES,), 2: (BYTES,), 5: (BYTES,)})
_ATTRIBUTE = Schema(
    "attribute", {1: BYTES, 3: VARINT, 5: BYTES, 6: BYTES, 20: VARINT}, {8: (VARINT, BYTES), 11: (BYTES,)}
)
_TENSOR = Schema(
    "tensor",
    {2: VARINT, 3: BYTES, 8: BYTES, _RAW: BYTES, 14: VARINT},
    {
        1: (VARINT, BYTES),
        _FLOATS: (FOUR_BYTES, BYTES),
        _INT32S: (VARINT, BYTES),
        _STRINGS: (BYTES,),
        _INT64S: (VARINT, BYTES),
        _DOUBLES: (EIGHT_BYTES, BYTES),
        _UINT64S: (VARINT, BYTES),
        13: (BYTES,),
    },
)
_ENTRY = Schema("pair of strings", {1: BYTES, 2: BYTES}, {})
_TENSOR_KIND, _LAST_KIND = 4, 14
"""Types of an attribute: a tensor, and the highest one that there is."""


@dataclass(eq=False, slots=True)
class Stored:
    """A tensor of the model, described at byte `at`: dtype, shape, and its values, which lie in the file `location`.

    `payload` is None where npscope cannot read the values.
    """

    at: int

    name: str
    dtype: str
    shape: tuple[int, ...]
    location: str
    payload: Payload | None


@dataclass(eq=False, slots=True)
class Node:
    """A node; `op` has its domain in front unless that is ONNX's own. Attributes are the few that decide here."""

    label: str
    op: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    ints: Mapping[str, tuple[int, ...]]
    graphs: tuple[tuple[str, Graph], ...] = ()
    value: Stored | None = None


@dataclass(eq=False, slots=True)
class Graph:
    """A graph: names of its inputs and outputs, its initializers and nodes in the order of the file."""

    inputs: list[str] = field(default_factory=list)
    outputs: list[str] = field(default_factory=list)
    initializers: list[Stored] = field(default_factory=list)
    nodes: list[Node] = field(default_factory=list)


@dataclass(eq=False, slots=True)
class Model:
    """The main graph, and the operators that the model itself defines."""

    graph: Graph
    functions: frozenset[str]


def read_model(files: Files) -> Model:
    """The model whose file is open; FormatError when it is none, damaged or ambiguous."""
    return _Reader(files).model()


class _Reader:
    def __init__(self, files: Files) -> None:
        self._files = files
        self._size = files.status(MODEL).st_size
        self._fill = partial(files.read, MODEL)
        self._wire = Wire(self._bytes, self._size)

    def model(self) -> Model:
        graph: Graph | None = None
        functions: set[str] = set()
        for found in self._wire.known(Span(0, self._size), _MODEL):
            if found.number == 7:
                graph = self._graph(found.at, 1)
            else:
                functions.add(self._function(found.at))
        if graph is None:
            raise FormatError(f"{self._size} bytes without a graph; this is no ONNX model")
        return Model(graph, frozenset(functions))

    def _bytes(self, offset: int, nbytes: int) -> bytes:
        found = bytearray(nbytes)
        self._fill(offset, memoryview(found))
        return bytes(found)

    def _function(self, at: Span) -> str:
        names = {found.number: self._wire.text(found.at) for found in self._wire.known(at, _FUNCTION)}
        return _operator(names.get(10, ""), names.get(1, ""))

    def _graph(self, at: Span, depth: int) -> Graph:
        if depth > MAX_GRAPHS:
            raise FormatError(f"byte {at.start}: more than {MAX_GRAPHS} graphs lie inside one another")
        graph = Graph()
        for found in self._wire.known(at, _GRAPH):
            if found.number == 1:
                graph.nodes.append(self._node(found.at, len(graph.nodes), depth))
            elif found.number == 5:
                graph.initializers.append(self._tensor(found.at))
            else:
                names = graph.inputs if found.number == 11 else graph.outputs
                names += [self._wire.text(name.at) for name in self._wire.known(found.at, _VALUE_INFO)]
        return graph

    def _node(self, at: Span, index: int, depth: int) -> Node:
        inputs, outputs, attributes = [], [], []
        texts = {3: "", 4: "", 7: ""}
        for found in self._wire.known(at, _NODE):
            if found.number == 1:
                inputs.append(self._wire.text(found.at))
            elif found.number == 2:
                outputs.append(self._wire.text(found.at))
            elif found.number == 5:
                attributes.append(found.at)
            else:
                texts[found.number] = self._wire.text(found.at)
        op = _operator(texts[7], texts[4])
        node = Node(texts[3] or f"{op}#{index}", op, tuple(inputs), tuple(outputs), _NO_INTS)
        for attribute in attributes:
            self._attribute(attribute, node, depth)
        return node

    def _attribute(self, at: Span, node: Node, depth: int) -> None:
        """Add one attribute to `node`."""
        name, kind = "", 0
        ints: list[int] = []
        graphs: list[Span] = []
        value: Span | None = None
        for found in self._wire.known(at, _ATTRIBUTE):
            if found.number == 1:
                name = self._wire.text(found.at)
            elif found.number == 20:
                kind = found.value
            elif found.number == 5:
                value = found.at
            elif found.number in (6, 11):
                graphs.append(found.at)
            else:
                for number in self._wire.varints(found):
                    if len(ints) <= _MAX_INTS:
                        ints.append(_signed(number))
        if kind > _LAST_KIND:
            raise FormatError(f"byte {at.start}: an attribute of type {kind}, which is not in the format")
        if name in node.ints:
            raise FormatError(f"the attribute {name!r:.120} stands twice")
        if 0 < len(ints) <= _MAX_INTS:
            node.ints = {**node.ints, name: tuple(ints)}
        node.graphs += tuple((name, self._graph(graph, depth + 1)) for graph in graphs)
        if value is not None and node.op == "Constant" and name == "value" and kind in (0, _TENSOR_KIND):
            if node.value is not None:
                raise FormatError("the attribute 'value' stands twice")
            node.value = self._tensor(value)

    def _tensor(self, at: Span) -> Stored:
        name, data_type, is_external, is_segment = "", 0, 0, False
        dims: list[int] = []
        entries: list[Span] = []
        values = _Values()
        for found in self._wire.known(at, _TENSOR):
            if found.number == 1:
                for length in self._wire.varints(found):
                    dims.append(length)
                    if len(dims) > _MAX_RANK:
                        raise FormatError(f"byte {at.start}: a tensor of more than {_MAX_RANK} axes")
            elif found.number == 2:
                data_type = found.value
            elif found.number == 3:
                is_segment = True
            elif found.number == 8:
                name = self._wire.text(found.at)
            elif found.number == 13:
                entries.append(found.at)
            elif found.number == 14:
                is_external = found.value
            else:
                values.add(found)
        with about(f"tensor {name!r:.120}"):
            if data_type >> 31 or is_external not in (0, 1):
                raise FormatError(f"data type {data_type} and data location {is_external} are not in the format")
            known = _DATA_TYPES.get(data_type)
            dtype = known.name if known else "string" if data_type == _STRING else f"data type {data_type}"
            nbytes = _size_in_bytes(dims, known.bits) if known else None
            if is_segment:  # a part of a tensor, whatever its shape says
                return Stored(at.start, name, f"{dtype} segment", tuple(dims), MODEL, None)
            if is_external and values.numbers:
                raise FormatError("it holds values here and in another file")
            location, payload = MODEL, None
            if is_external:
                location, payload = self._outside(entries, nbytes)
            elif values.is_loose:
                dtype += " in single fields"
            elif known or _RAW in values.numbers:
                payload = self._inside(values, known)
            if payload is not None and nbytes not in (None, payload.nbytes):
                raise FormatError(f"{dtype} of shape {dims!s:.80} takes {nbytes} bytes, not {payload.nbytes}")
            return Stored(at.start, name, dtype, tuple(dims), location, payload)

    def _inside(self, values: _Values, known: _DataType | None) -> Payload:
        """The values of a tensor that lie in its own fields."""
        if _RAW in values.numbers:
            meant = _RAW
        else:
            meant = known.field if known else _RAW
        if values.numbers - {meant}:
            raise FormatError(f"it holds values in the fields {sorted(values.numbers)}; needed is {meant} alone")
        if known is not None and meant in (_INT32S, _INT64S, _UINT64S):
            return Varints(self._fill, values.chunks, known.width)
        if len(values.runs) == 1 and values.runs[0].elements == 1:
            return Block(values.runs[0].offset, values.runs[0].nbytes)
        return Runs(values.runs)

    def _outside(self, entries: list[Span], nbytes: int | None) -> tuple[str, Payload]:
        """Location and values of a tensor whose data lies in another file."""
        given: dict[str, str] = {}
        for entry in entries:
            pair = {found.number: self._wire.text(found.at) for found in self._wire.known(entry, _ENTRY)}
            key = pair.get(1, "")
            if key in given:
                raise FormatError(f"external data has the key {key!r:.40} twice")
            given[key] = pair.get(2, "")
        location = self._files.add(given.get("location", ""))
        size = self._files.status(location).st_size
        offset = _count("offset", given.get("offset", "0"))
        length = _count("length", given["length"]) if "length" in given else max(size - offset, 0)
        if offset + length > size:
            raise FormatError(
                f"external data {location!r:.120} from {offset} on, {length} bytes: the file has {size} bytes"
            )
        if nbytes not in (None, length):
            raise FormatError(f"external data {location!r:.120} of {length} bytes; its shape takes {nbytes}")
        return location, Block(offset, length)


class _Values:
    """What the value fields of one tensor hold: `runs` of bytes, or `chunks` of packed varints.

    `is_loose` when varints stand in fields of their own, as proto2 writes them without "packed".
    """

    def __init__(self) -> None:
        self.numbers: set[int] = set()
        self.runs: list[Run] = []
        self.chunks: list[Span] = []
        self.is_loose = False

    def add(self, found: Field) -> None:
        start, stop = found.at
        if start == stop and found.number in (_FLOATS, _DOUBLES, _INT32S, _INT64S, _UINT64S):
            return  # a packed field of no numbers
        self.numbers.add(found.number)
        if found.wire == VARINT:
            self.is_loose = True
        elif found.number in (_INT32S, _INT64S, _UINT64S):
            self.chunks.append(found.at)
        elif found.number != _STRINGS:
            if (stop - start) % _NUMBER_BYTES.get(found.number, 1):
                raise FormatError(f"byte {start}: {stop - start} bytes are no whole numbers")
            self._append(Run(start, stop - start, 1, 0))

    def _append(self, run: Run) -> None:
        """Add a run, or let it continue the one before when elements stand at equal steps."""
        if self.runs:
            last = self.runs[-1]
            step = run.offset - last.offset if last.elements == 1 else last.step
            if last.width == run.width and step <= _MAX_STEP and run.offset == last.offset + last.elements * step:
                self.runs[-1] = Run(last.offset, last.width, last.elements + 1, step)
                return
        self.runs.append(run)


def _operator(domain: str, name: str) -> str:
    return name if domain in ("", "ai.onnx") else f"{domain}.{name}"


def _signed(number: int) -> int:
    return number - (1 << 64) if number >> 63 else number


def _size_in_bytes(dims: list[int], bits: int) -> int:
    """Bytes of a tensor; FormatError when a length is negative or they are more than any file has."""
    size = 1
    for length in dims:
        size *= length or 1
        if size >= _MAX_COUNT:
            raise FormatError(f"shape {dims!s:.80} is negative or larger than any file")
    return 0 if 0 in dims else -(-math.prod(dims) * bits // 8)


def _count(key: str, text: str) -> int:
    if not (text.isascii() and text.isdecimal() and len(text) <= 19):
        raise FormatError(f"external data has the {key} {text!r:.40}; needed is a whole number")
    return int(text)
