"""What the tensors of an ONNX model are: which nodes compute with them, and what their axes mean there.

The same array is ``[in, out]`` for a MatMul, ``[out, in]`` for a Gemm with transB, and no weight at
all for a Gather. So every tensor is followed to the nodes that use it: through nodes that only
rearrange or convert it, into the bodies of If, Loop and Scan that see it by name, and out of the
branches of an If. Where the users disagree, or one of them is not understood, it is left alone.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

from npscope.errors import FormatError
from npscope.weights import Axes, Use
from npscope.weights.onnx_model import Graph, Model, Node, Stored

Ints = Callable[[Stored], tuple[int, ...] | None]
"""Reads a small tensor of integers, None if it is none."""

_MAX_STEPS = 256
"""Nodes that a tensor is followed through at most."""

_MAX_PARTS = 64
"""Inputs of a Concat that is followed at most, so that following every tensor takes linear time."""

_KEEP = {"Identity", "Cast", "Slice", "Split", "Concat"}
"""Nodes whose outputs have the axes of their input, and zeros where it has zeros."""

_BLIND = {"Shape", "Size"}
"""Nodes that do not look at values."""

_RECURRENT = {"RNN", "GRU", "LSTM"}

Stay = tuple[int | None, ...]
"""For each axis of a value the axis of the stored tensor that it is, None for one that was inserted."""


class _Value(NamedTuple):
    """A named value: the number of the graph that defines it, and the name there."""

    graph: int
    name: str


@dataclass(eq=False, slots=True)
class _Scope:
    """A graph in the model: its number, path, names, and the graph around it."""

    number: int
    path: str
    graph: Graph
    outer: _Scope | None
    names: set[str]

    def find(self, name: str) -> _Value | None:
        """The value that `name` means here: that of the innermost graph that defines it."""
        scope: _Scope | None = self
        while scope is not None:
            if name in scope.names:
                return _Value(scope.number, name)
            scope = scope.outer
        return None


class _User(NamedTuple):
    """A node that takes a value as its input of number `place`, or the output of a graph (`node` None)."""

    scope: _Scope
    node: Node | None
    place: int

    @property
    def path(self) -> str:
        return self.scope.path + (self.node.label if self.node else "output")


class Found(NamedTuple):
    """A tensor under the name that is unique in the model, and its use."""

    name: str
    stored: Stored
    use: Use


def find_tensors(model: Model, ints: Ints) -> list[Found]:
    """Every initializer and every tensor of a Constant node, in no order that matters.

    Those of the main graph are called as there, those of a graph in a node by the path to it too.
    FormatError when a graph gives one name to two values.
    """
    graphs = _Graphs(ints, model.functions)
    graphs.enter(model.graph, "", None)
    return graphs.found()


@dataclass(eq=False)
class _Graphs:
    """All graphs of a model and who uses what in them."""

    ints: Ints
    functions: frozenset[str]
    scopes: int = 0
    tensors: list[tuple[str, _Value | None, Stored]] = field(default_factory=list)
    users: dict[_Value, list[_User]] = field(default_factory=lambda: defaultdict(list))
    constants: dict[_Value, Stored | tuple[int, ...]] = field(default_factory=dict)
    results: dict[_Value, list[_Value]] = field(default_factory=lambda: defaultdict(list))
    """The outputs of an If for each value that its branches put out."""

    def enter(self, graph: Graph, path: str, outer: _Scope | None) -> _Scope:
        """Take in a graph and those inside it."""
        scope = _Scope(self.scopes, path, graph, outer, _names(graph))
        self.scopes += 1
        for index, stored in enumerate(graph.initializers):
            self._define(scope, stored.name, stored, f"initializer#{index}")
        for node in graph.nodes:
            if node.value is not None:
                self._define(scope, node.outputs[0] if node.outputs else "", node.value, node.label)
            elif node.op == "Constant" and node.outputs:
                for name in ("value_ints", "value_int"):
                    if name in node.ints:
                        self.constants[_Value(scope.number, node.outputs[0])] = node.ints[name]
            for index, name in enumerate(node.inputs):
                self._use(scope, name, node, index)
            for name, inner in node.graphs:
                body = self.enter(inner, f"{path}{node.label}.{name}/", scope)
                self._leave(body, node, scope)
        if outer is None:
            for index, name in enumerate(graph.outputs):
                self._use(scope, name, None, index)
        return scope

    def found(self) -> list[Found]:
        """Every tensor with its use, under a name of its own."""
        taken: dict[str, int] = {}
        found = []
        for name, value, stored in self.tensors:
            taken[name] = taken.get(name, 0) + 1
            unique = name if taken[name] == 1 else f"{name}#{taken[name]}"
            while unique != name and unique in taken:
                unique += "#"
            taken.setdefault(unique, 1)
            found.append(Found(unique, stored, self._use_of(value, stored)))
        return found

    def _define(self, scope: _Scope, name: str, stored: Stored, label: str) -> None:
        value = _Value(scope.number, name) if name else None
        self.tensors.append((scope.path + (name or label), value, stored))
        if value is not None and len(stored.shape) < 2:  # all that can name axes
            self.constants[value] = stored

    def _use(self, scope: _Scope, name: str, node: Node | None, index: int) -> None:
        value = scope.find(name) if name else None
        if value is not None:
            self.users[value].append(_User(scope, node, index))

    def _leave(self, body: _Scope, node: Node, outside: _Scope) -> None:
        """What the outputs of a graph inside `node` are outside of it."""
        for index, name in enumerate(body.graph.outputs):
            value = body.find(name)
            if value is None:
                continue
            if node.op == "If" and index < len(node.outputs) and value.graph == body.number:
                self.results[value].append(_Value(outside.number, node.outputs[index]))
            else:
                self.users[value].append(_User(body, None, index))

    def _use_of(self, value: _Value | None, stored: Stored) -> Use:
        """What a tensor is to all nodes that it reaches."""
        users: list[tuple[_User, Axes | None, str]] = []
        stay: Stay = tuple(range(len(stored.shape)))
        for user, here in self._reach(value, stay):
            if len(users) == _MAX_STEPS:
                return Use(_ops(users), users[0][0].path, None, f"more than {_MAX_STEPS} nodes use it")
            users.append((user, *self._meaning(user, here, len(stored.shape))))
        if not users:
            return Use("", "", None, "no node uses it")
        first, axes, _ = users[0]
        for _, other, reason in users:
            if other is None:
                return Use(_ops(users), first.path, None, reason)
        odd = next((user for user, other, _ in users if other != axes), None)
        if odd is not None:
            reason = f"its users disagree about its axes: {first.path} and {odd.path}"
            return Use(_ops(users), first.path, None, reason)
        return Use(_ops(users), first.path, axes)

    def _reach(self, value: _Value | None, stay: Stay) -> Iterator[tuple[_User, Stay]]:
        """Every user at the end of a chain of nodes that keep what the axes mean."""
        todo = [] if value is None else [(value, stay)]
        seen = set(todo)
        while todo:
            at, here = todo.pop()
            following = [(result, here) for result in self.results.get(at, ())]
            for user in self.users.get(at, ()):
                after = None if len(seen) > _MAX_STEPS else self._after(user, here)
                if after is None:
                    yield user, here
                else:
                    following += after
            for step in reversed(following):
                if step not in seen:
                    seen.add(step)
                    todo.append(step)

    def _after(self, user: _User, stay: Stay) -> list[tuple[_Value, Stay]] | None:
        """The values that a node makes of one and their axes; None when it computes with it."""
        node = user.node
        if node is None or node.op in self.functions:
            return None
        if node.op in _BLIND:
            return []
        moved: Stay | None = None
        if node.op in _KEEP and (user.place == 0 or node.op == "Concat") and len(node.inputs) <= _MAX_PARTS:
            moved = stay
        elif node.op == "Transpose":
            order = node.ints.get("perm", tuple(reversed(range(len(stay)))))
            moved = tuple(stay[axis] for axis in order) if sorted(order) == list(range(len(stay))) else None
        elif node.op in ("Unsqueeze", "Squeeze") and user.place == 0:
            axes = self._axes(user)
            moved = None if axes is None else (_unsqueezed if node.op == "Unsqueeze" else _squeezed)(stay, axes)
        return None if moved is None else [(_Value(user.scope.number, name), moved) for name in node.outputs if name]

    def _axes(self, user: _User) -> tuple[int, ...] | None:
        """The axes that an Unsqueeze or Squeeze names: by an attribute, or by a constant input in newer models."""
        node = user.node
        if node is None or len(node.inputs) < 2:
            return None if node is None else node.ints.get("axes")
        value = user.scope.find(node.inputs[1])
        constant = None if value is None else self.constants.get(value)
        return self.ints(constant) if isinstance(constant, Stored) else constant

    def _meaning(self, user: _User, stay: Stay, ndim: int) -> tuple[Axes | None, str]:
        """What a node takes the stored axes for, or None and why it does not see a weight there."""
        node = user.node
        if node is None:
            return None, f"it is an output of the graph ({user.path})"
        axes = None if node.op in self.functions else _axes_at(node, user.place, len(stay))
        if axes is None:
            return None, f"{node.op} uses it as input {user.place}, not as the weight of a product"
        out, into = stay[axes.out], stay[axes.into]
        if out is None or into is None:
            return None, f"its rows or columns are single for {node.op}"
        stack, kernel = ([stay[axis] for axis in part] for part in (axes.stack, axes.kernel))
        # Of an axis that was squeezed away the node sees one index: it stacks matrices.
        gone = [axis for axis in range(ndim) if axis not in stay]
        return Axes((*gone, *_stored(stack)), out, into, _stored(kernel)), ""


def _axes_at(node: Node, index: int, ndim: int) -> Axes | None:
    """The axes of input `index` of a node, of `ndim` axes, where that is a weight."""
    lead = tuple(range(ndim - 2))
    if node.op == "MatMul" and ndim >= 2 and index in (0, 1):
        out, into = (ndim - 1, ndim - 2) if index else (ndim - 2, ndim - 1)
        return Axes(lead, out, into, ())
    if node.op == "Gemm" and ndim == 2 and index in (0, 1):
        swapped = bool(_one(node, "transB" if index else "transA", 0))
        return Axes((), 0, 1, ()) if bool(index) == swapped else Axes((), 1, 0, ())
    if node.op == "Conv" and ndim >= 3 and index == 1:
        return Axes((), 0, 1, tuple(range(2, ndim)))
    if node.op == "ConvTranspose" and ndim >= 3 and index == 1 and _one(node, "group", 1) == 1:
        return Axes((), 1, 0, tuple(range(2, ndim)))
    if node.op in _RECURRENT and ndim == 3 and index in (1, 2):
        return Axes((0,), 1, 2, ())
    return None


def _one(node: Node, name: str, default: int) -> int:
    return node.ints.get(name, (default,))[0]


def _unsqueezed(stay: Stay, axes: tuple[int, ...]) -> Stay | None:
    """Axes after new ones were inserted, at their places in the result."""
    ndim = len(stay) + len(axes)
    new = {axis % ndim for axis in axes if -ndim <= axis < ndim}
    if len(new) != len(axes):
        return None
    old = iter(stay)
    return tuple(None if axis in new else next(old) for axis in range(ndim))


def _squeezed(stay: Stay, axes: tuple[int, ...]) -> Stay | None:
    ndim = len(stay)
    gone = {axis % ndim for axis in axes if -ndim <= axis < ndim}
    return None if len(gone) != len(axes) else tuple(axis for at, axis in enumerate(stay) if at not in gone)


def _stored(axes: list[int | None]) -> tuple[int, ...]:
    return tuple(axis for axis in axes if axis is not None)


def _names(graph: Graph) -> set[str]:
    """The names that a graph defines; FormatError when one is defined twice."""
    names: set[str] = set()
    defined = [stored.name for stored in graph.initializers]
    for node in graph.nodes:
        defined += node.outputs
    for name in defined:
        if name and name in names:
            raise FormatError(f"a graph gives the name {name!r:.120} to two values")
        names.add(name)
    # An input with the name of an initializer is that initializer, as a default for the caller.
    return names | set(graph.inputs)


def _ops(users: list[tuple[_User, Axes | None, str]]) -> str:
    return ", ".join(dict.fromkeys(user.node.op if user.node else "output" for user, _, _ in users))
