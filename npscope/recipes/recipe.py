"""What to do with each tensor of a file: which rule takes it, and the exact counts that follow.

Everything here is decided from names, dtypes and shapes, before a value is read, so a plan can
be shown, checked and refused at no cost. The one exception is an allocation by LAMP, which asks
for the norms of blocks.
"""

from __future__ import annotations

import fnmatch
import math
import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from fractions import Fraction
from typing import Literal, Self

from npscope.counts import nnz_from_sparsity
from npscope.errors import SpecError, about
from npscope.recipes import allocation
from npscope.recipes.layout import Axis, Layout, lay, meaning, require_axis
from npscope.recipes.members import CouplingRule, couple
from npscope.recipes.pattern import Pattern
from npscope.recipes.plans import Budget, Decision, Plan, Skip
from npscope.recipes.scores import scores_of
from npscope.weights import Tensor, WeightFile

DEFAULT_SKIPS = (
    # embeddings: looked up row by row, not multiplied
    "*embed*",
    "*wte*",
    "*wpe*",
    "*position_bias*",
    # norms
    "*norm*",
    "*_bn.*",
    "*.bn*",
    # heads: the last layer is small and sensitive
    "*lm_head*",
    "head.*",
    "*.head.*",
    "*classifier*",
    "output.weight",
    "score.*",
    # fixed bases of Fourier, constant-Q and mel transforms
    "*fft*",
    "*stft*",
    "*cqt*",
    "*mel_basis*",
    "*mel_filter*",
)
"""Globs of tensors that are left alone unless somebody names them; compared in lower case."""

NODE_SKIPS = (
    "*lm_head*",
    "*classifier*",
    "*fft*",
    "*stft*",
    "*cqt*",
    "*cq_t*",
    "*mel_basis*",
    "*mel_filter*",
)
"""The same for the path of the node that uses a tensor, where names of tensors say nothing.

Only heads and bases: embeddings and norms are used by other nodes than products, and converters
call a convolution by the norm that they fold into it.
"""

Spread = Literal["each", "budget", "uniform", "erk", "lamp"]
"""How the amount of a pattern is spread over the tensors of a rule: the same for each scope, as one
budget for which all blocks compete, or as a share for each tensor (`npscope.recipes.allocation`)."""

NormsOf = Callable[[Plan], allocation.Norms]
"""Reads the norms of all blocks of a plan."""


@dataclass(frozen=True)
class Rule:
    """Which tensors, and what is done with them; `pattern` None leaves them alone.

    `names` are globs, or regular expressions after ``re:``, that match whole names; no names is
    every name. `op`, `node` (a glob) and `shape` (-1 is any length) choose by what a file with a
    graph says. `spread` says what the amount of the pattern is a share of, and `bounds` the least
    and the largest share that a budget prunes of one tensor. `scores` is a file to rank by. A
    tensor that cannot take the pattern is an error, or with `misfit` "skip" left alone;
    `default_skips` are respected unless a name is given in full. `label` is what messages say.
    """

    label: str
    names: tuple[str, ...] = ()
    op: str | None = None
    node: str | None = None
    shape: tuple[int, ...] | None = None
    pattern: Pattern | None = None
    axis: Axis = "in"
    layout: Layout = "out-in"
    spread: Spread = "each"
    bounds: tuple[str, str] = ("0", "1")
    scores: str | None = None
    misfit: Literal["error", "skip"] = "error"
    default_skips: bool = True

    def __post_init__(self) -> None:
        if self.pattern is None:
            return
        require_axis(self.pattern, self.axis)
        if self.spread == "each":
            return
        if self.pattern.scope is not None or not isinstance(self.pattern.amount, str):
            raise SpecError(
                f"{self.label}: {self.spread} spreads a sparsity over whole tensors; leave out scope and keep"
            )
        if self.spread == "lamp" and self.scores is not None:
            raise SpecError(f"{self.label}: lamp is a function of the weights; leave out scores, or take a budget")
        if Fraction(self.bounds[0]) > Fraction(self.bounds[1]):
            raise SpecError(f"{self.label}: min_sparsity {self.bounds[0]} exceeds max_sparsity {self.bounds[1]}")

    @property
    def is_default(self) -> bool:
        """Takes every tensor that comes to it."""
        return not self.names and self.op is None and self.node is None and self.shape is None


@dataclass(frozen=True)
class Recipe:
    """Couplings first, then rules, of which the first that matches takes a tensor.

    `names` maps names in the file to the names that rules, scores and the order of tensors go by,
    so that one recipe serves two files with the same weights. `rest` is said of a tensor that no
    rule takes. `path` is the file that it was read from.
    """

    rules: tuple[Rule, ...]
    couplings: tuple[CouplingRule, ...] = ()
    names: Mapping[str, str] = field(default_factory=dict)
    rest: str = "no rule takes it"
    path: str | None = field(default=None, compare=False)

    def __post_init__(self) -> None:
        for rule in self.rules[:-1]:
            if rule.is_default:
                raise SpecError(f"{rule.label} takes every tensor, so no rule after it has an effect; put it last")

    @classmethod
    def shorthand(
        cls,
        pattern: Pattern,
        include: Sequence[str] = (),
        exclude: Sequence[str] = (),
        axis: Axis = "in",
        layout: Layout = "out-in",
    ) -> Self:
        """One pattern for the tensors that `include` names and `exclude` does not, as on the command line.

        Without `include` it is meant for every tensor that `DEFAULT_SKIPS` does not name. What
        cannot take the pattern is left alone.

        >>> [rule.label for rule in Recipe.shorthand(Pattern.parse("2:4"), include=["*.weight"]).rules]
        ['--include']
        """
        require_axis(pattern, axis)
        rule = Rule("--pattern", pattern=pattern, axis=axis, layout=layout, misfit="skip")
        if include:
            rule = replace(rule, label="--include", names=tuple(include), default_skips=False)
        left = (Rule("--exclude", tuple(exclude)),) if exclude else ()
        return cls((*left, rule), rest="not in --include")

    def with_scores(self, path: str) -> Self:
        """The same recipe, which ranks by the file `path` wherever it names no scores itself."""
        rules = (rule if rule.pattern is None or rule.scores else replace(rule, scores=path) for rule in self.rules)
        couplings = (rule if rule.scores else rule._replace(scores=path) for rule in self.couplings)
        return replace(self, rules=tuple(rules), couplings=tuple(couplings))

    @property
    def score_files(self) -> tuple[str, ...]:
        """The files that the recipe ranks by, each once."""
        rules: tuple[Rule | CouplingRule, ...] = (*self.rules, *self.couplings)
        return tuple(dict.fromkeys(rule.scores for rule in rules if rule.scores is not None))


def resolve(
    recipe: Recipe,
    tensors: Iterable[Tensor],
    *,
    scores: Mapping[str, WeightFile] | None = None,
    norms: NormsOf | None = None,
) -> list[Decision]:
    """What happens to each tensor: decisions in the order of the first tensor of each.

    `scores` holds an open file for each of `recipe.score_files`, and `norms` reads what LAMP needs.
    SpecError (a ValueError) when a rule matches nothing, is given twice, has no effect, names a
    tensor of unknown dtype or meets one that cannot take its pattern.
    """
    listed = list(tensors)
    known = _canonical(recipe.names, listed)
    files = scores or {}
    couplings = couple(recipe.couplings, {known[tensor.name]: tensor for tensor in listed}, files)
    coupled = {tensor.name: coupling for coupling in couplings for tensor in coupling.tensors}
    taken = _chosen(recipe.rules, listed, known, coupled.keys())
    single: dict[str, Plan | Skip] = {}
    for tensor in listed:
        if tensor.name not in coupled:
            rule, texts = taken[tensor.name]
            decision = Skip(tensor, recipe.rest) if rule is None else _decide(rule, texts, tensor, known[tensor.name])
            if isinstance(decision, Plan) and rule is not None and rule.scores is not None:
                assigned = scores_of(files[rule.scores], rule.scores, tensor, known[tensor.name], decision.axes)
                decision = decision._replace(scores=assigned)
            single[tensor.name] = decision
    shared = _shared(recipe.rules, taken, single, known, norms)
    decisions = {name: coupled.get(name) or shared.get(name) or single[name] for name in known}
    return list({id(decision): decision for decision in decisions.values()}.values())


def _canonical(names: Mapping[str, str], tensors: Sequence[Tensor]) -> dict[str, str]:
    """The name that a recipe knows each tensor by."""
    there = {tensor.name for tensor in tensors}
    for stored, name in names.items():
        if stored not in there and name not in there:
            raise SpecError(f"names: the file holds neither {stored!r:.120} nor {name!r:.120}")
    known = {tensor.name: names.get(tensor.name, tensor.name) for tensor in tensors}
    owners: dict[str, str] = {}
    for stored, name in known.items():
        if name in owners:
            raise SpecError(f"names: {owners[name]!r:.120} and {stored!r:.120} would both be {name!r:.120}")
        owners[name] = stored
    return known


# --- which rule takes which tensor ---------------------------------------------------------------


class Names:
    """The names that a glob, or ``re:`` and a regular expression, matches from end to end."""

    def __init__(self, text: str, option: str) -> None:
        self.text, self.option = text, option
        expression = text.removeprefix("re:") if text.startswith("re:") else fnmatch.translate(text)
        try:
            self._match = re.compile(expression, re.DOTALL).fullmatch
        except (re.error, OverflowError, RecursionError) as error:
            raise SpecError(f"{option} {text!r:.80} is no regular expression: {error}") from None

    def __contains__(self, name: str) -> bool:
        return self._match(name) is not None


class _Selector:
    """A rule with the texts by which it selects, and what became of each."""

    def __init__(self, rule: Rule) -> None:
        self.rule = rule
        self.texts = rule.names or ("",)
        self.matched: set[str] = set()
        self.effective: set[str] = set()
        self._names = [Names(text, rule.label) for text in rule.names]
        self._node = None if rule.node is None else Names(rule.node, f"{rule.label} node")

    def texts_for(self, tensor: Tensor, name: str) -> list[str]:
        """The texts that select this tensor; [""] where every name will do."""
        if not (self._fits_graph(tensor) and self._fits_shape(tensor.shape)):
            return []
        return [names.text for names in self._names if name in names] if self._names else [""]

    def _fits_graph(self, tensor: Tensor) -> bool:
        if self.rule.op is None and self._node is None:
            return True
        if tensor.use is None:
            return False
        return self.rule.op in (None, tensor.use.op) and (self._node is None or tensor.use.node in self._node)

    def _fits_shape(self, shape: tuple[int, ...]) -> bool:
        wanted = self.rule.shape
        return wanted is None or (
            len(wanted) == len(shape) and all(w in (-1, n) for w, n in zip(wanted, shape, strict=True))
        )


def _chosen(
    rules: Sequence[Rule], tensors: Sequence[Tensor], known: Mapping[str, str], coupled: Iterable[str]
) -> dict[str, tuple[Rule | None, list[str]]]:
    """For each tensor the first rule that matches, with the texts that did."""
    selectors = [_Selector(rule) for rule in rules]
    _require_different(rules)
    gone, taken = set(coupled), {}
    for tensor in tensors:
        first: tuple[Rule | None, list[str]] = (None, [])
        for selector in selectors:
            texts = selector.texts_for(tensor, known[tensor.name])
            selector.matched.update(texts)
            if texts and first[0] is None and tensor.name not in gone:
                first = (selector.rule, texts)
                selector.effective.update(texts)
        taken[tensor.name] = first
    for selector in selectors:
        _require_effect(selector, tensors)
    return taken


def _require_different(rules: Sequence[Rule]) -> None:
    seen: dict[tuple[object, ...], str] = {}
    for rule in rules:
        for text in rule.names:
            key = (text, rule.op, rule.node, rule.shape)
            if key in seen:
                raise SpecError(f"{rule.label} {text!r:.80} is already given as {seen[key]}")
            seen[key] = rule.label


def _require_effect(selector: _Selector, tensors: Sequence[Tensor]) -> None:
    """SpecError when a rule, or one of its texts, decides nothing."""
    rule = selector.rule
    if rule.is_default:
        return
    for text in selector.texts:
        subject = f"{rule.label} {text!r:.80}" if text else rule.label
        if text not in selector.matched:
            graph = rule.op is not None or rule.node is not None
            why = "; the file has no graph" if graph and all(tensor.use is None for tensor in tensors) else ""
            raise SpecError(
                f"{subject} matches none of the {len(tensors)} tensors{why}; `npscope plan` and `inspect` list them"
            )
        if text not in selector.effective:
            raise SpecError(f"{subject} has no effect: couplings and rules before it take all that it matches")


def _decide(rule: Rule, texts: Sequence[str], tensor: Tensor, name: str) -> Plan | Skip:
    in_full = name in texts
    said = " ".join([rule.label, *filter(None, texts[:1])])
    if rule.pattern is None:
        return Skip(tensor, said, rule=said)
    if rule.default_skips and not in_full and (skip := _default_skip(tensor, name)):
        return Skip(tensor, f"{skip} (--include or a rule with the name in full overrides)", rule=said)
    if rule.names and tensor.is_opaque:
        raise SpecError(f"tensor {tensor.name!r:.120}: dtype {tensor.dtype} cannot be pruned; leave it out of {said}")
    if reason := _ineligible(tensor, in_full):
        return _misfit(rule, said, tensor, reason) if in_full else Skip(tensor, reason, rule=said)
    try:
        return lay(rule.pattern, tensor, axis=rule.axis, layout=rule.layout, rule=said)
    except SpecError as error:
        return _misfit(rule, said, tensor, str(error))


def _misfit(rule: Rule, said: str, tensor: Tensor, reason: str) -> Skip:
    if rule.misfit == "error":
        raise SpecError(
            f'{said}: tensor {tensor.name!r:.120} cannot take the pattern: {reason}; misfit = "skip" leaves it alone'
        )
    axes = meaning(tensor, rule.layout) if len(tensor.shape) >= 2 else None
    return Skip(tensor, reason, misfit=True, rule=said, axes=axes)


def _default_skip(tensor: Tensor, name: str) -> str | None:
    """The glob by which a tensor is left alone unless it is named, in words."""
    for glob in DEFAULT_SKIPS:
        if fnmatch.fnmatchcase(name.lower(), glob):
            return f"default skip {glob}"
    for glob in NODE_SKIPS if tensor.use is not None else ():
        if tensor.use is not None and fnmatch.fnmatchcase(tensor.use.node.lower(), glob):
            return f"default skip of nodes {glob}"
    return None


def _ineligible(tensor: Tensor, in_full: bool) -> str | None:
    """Why a tensor can take no pattern at all."""
    if tensor.use is not None and tensor.use.axes is None:
        return tensor.use.reason
    if not tensor.is_ranked:
        return f"dtype {tensor.dtype} cannot be pruned"
    if not (tensor.is_float or in_full):
        return f"dtype {tensor.dtype} is pruned only where --include or a rule gives the name in full"
    if len(tensor.shape) < 2:
        return f"rank {len(tensor.shape)}, at least 2 is needed"
    return "no elements" if 0 in tensor.shape else None


# --- amounts that tensors share ------------------------------------------------------------------


def _shared(
    rules: Sequence[Rule],
    taken: Mapping[str, tuple[Rule | None, list[str]]],
    single: Mapping[str, Plan | Skip],
    known: Mapping[str, str],
    norms: NormsOf | None,
) -> dict[str, Plan | Budget]:
    """The decisions of tensors whose rule spreads its amount over all of them."""
    plans: dict[int, list[Plan]] = defaultdict(list)
    places = {id(rule): place for place, rule in enumerate(rules)}
    for name in sorted(single, key=lambda name: known[name].encode()):
        decision, (rule, _) = single[name], taken[name]
        if isinstance(decision, Plan) and rule is not None and rule.spread != "each":
            plans[places[id(rule)]].append(decision)
    shared: dict[str, Plan | Budget] = {}
    for place, members in plans.items():
        rule = rules[place]
        with about(rule.label):
            if rule.spread == "budget":
                shared |= dict.fromkeys((plan.tensor.name for plan in members), _budget(rule, members))
            else:
                keeps = _allocated(rule, members, norms)
                shared |= {plan.tensor.name: plan._replace(keep=keeps[plan.tensor.name]) for plan in members}
    return shared


def _budget(rule: Rule, plans: Sequence[Plan]) -> Budget:
    counts = [plan.scopes * plan.blocks for plan in plans]
    keep = nnz_from_sparsity(_amount(rule), sum(counts))
    least, most = rule.bounds
    bounds = tuple((nnz_from_sparsity(most, n), math.floor((1 - Fraction(least)) * n)) for n in counts)
    for (low, high), plan in zip(bounds, plans, strict=True):
        if low > high:
            raise SpecError(f"no count of the blocks of {plan.tensor.name!r:.120} lies within its bounds")
    low, high = sum(low for low, _ in bounds), sum(high for _, high in bounds)
    if not low <= keep <= high:
        raise SpecError(
            f"the budget keeps {keep} of {sum(counts)} blocks, but min_sparsity {least} and max_sparsity {most} "
            f"of every tensor leave between {low} and {high}"
        )
    return Budget(rule.label, tuple(plans), keep, bounds)


def _allocated(rule: Rule, plans: Sequence[Plan], norms: NormsOf | None) -> dict[str, int]:
    """Blocks to keep of each tensor."""
    sparsity, counts = _amount(rule), {plan.tensor.name: plan.scopes * plan.blocks for plan in plans}
    if rule.spread == "uniform":
        return allocation.uniform(counts, sparsity)
    if rule.spread == "erk":
        return allocation.erk({plan.tensor.name: _layer(plan) for plan in plans}, sparsity, counts)
    if norms is None:
        raise SpecError("lamp needs the values of the tensors, and here are only their shapes")
    return allocation.lamp({plan.tensor.name: norms(plan) for plan in plans}, sparsity)


def _amount(rule: Rule) -> str:
    return str(rule.pattern.amount) if rule.pattern is not None else "0"


def _layer(plan: Plan) -> tuple[int, ...]:
    """``(out, in, *kernel)`` of a layer; that of one matrix where several are stacked."""
    shape, axes = plan.tensor.shape, plan.axes
    return shape if axes is None else tuple(shape[axis] for axis in (axes.out, axes.into, *axes.kernel))
