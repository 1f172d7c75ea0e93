"""What a call costs on a 64x64 array, where memory is no limit: bursts of warm calls, contenders in turns."""

from __future__ import annotations

import math
from dataclasses import replace
from functools import partial

from bench.cases import OURS, SMALL, TABLE
from npscope.bench import Case, Plan, contenders, fresh
from npscope.clock import Row, Timed, significant, summary
from npscope.options import thread_count

BURST = 100
CALL_MS = 0.015
OBJECT_MS = 0.010


def rows(plan: Plan) -> list[Row]:
    """All small cases; the method of a spec built once is judged by what it adds to the function."""
    found = [row for case in SMALL for row in _measure(case, plan)]
    function = {row.contender: row.median_ms for row in found if row.case == SMALL[0].name}
    return [
        replace(row, bar=OBJECT_MS, judged_by="added", base_ms=function[row.contender])
        if row.case == SMALL[1].name and row.bar is not None
        else row
        for row in found
    ]


def _measure(case: Case, plan: Plan) -> list[Row]:
    pristine = fresh(case, plan.mib)
    timed = {
        name: Timed(partial(setup, case), pristine.copy(), pristine, backend)
        for name, (backend, setup) in contenders(case, TABLE).items()
        if name != "sparsekit"  # selects in many small scopes on a GPU only
    }
    firsts = {name: entry.run() for name, entry in timed.items()}
    for _ in range(plan.rounds):
        for entry in timed.values():
            entry.seconds.append(math.fsum(entry.run() for _ in range(BURST)) / BURST)
    return [
        Row(
            "small", case.name, case.group, name, case.dtype, case.data, pristine.size, thread_count(), plan.rounds,
            *summary(entry.seconds), first_ms=significant(1e3 * firsts[name]),
            bar=CALL_MS if name == OURS else None, judged_by="ms",
        )
        for name, entry in timed.items()
    ]  # fmt: skip
