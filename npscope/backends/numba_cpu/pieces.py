"""The pieces in which a call works off its blocks or scopes, and the threads that do."""

from __future__ import annotations

from collections.abc import Callable

from npscope.backends import threads
from npscope.options import thread_count, thread_limit

PIECE_ELEMENTS = 1 << 18
"""Elements of a piece: 1 MiB of float32, so that it stays in a core's cache between its passes."""

PIECE_WORKSPACE = 7 << 20
"""Bytes of work arrays of a piece at most, so that a thread stays within 8 MiB whatever the blocks."""

BLOCK_WORKSPACE = 48
"""Bytes of work arrays for a block, unless said otherwise: sums, norm, key, threshold, factor, mask."""

SCOPE_BLOCKS, SCOPE_ELEMENTS = 1 << 17, 1 << 22
"""A scope up to this size is decided in one piece, which takes a few milliseconds; larger ones are spread."""

SCOPE_BYTES = 3 << 20
"""Bytes of keys and masks of a scope up to which it is decided in one piece where no more is kept of its blocks."""

STRIPS_ELEMENTS = 1 << 20
"""Elements of a piece that one kernel works off strip by strip: 0.1 ms and more, so that pieces cost little."""

SOLVE_ELEMENTS = 1 << 17
"""Elements of a piece of which equations are solved, which takes ten times as long."""

PIECES_PER_THREAD = 4
"""Pieces that each thread gets at least, so that all finish together."""


def workers_for(elements: int, piece: int = STRIPS_ELEMENTS) -> int:
    """Threads worth using for this many elements, of work that is done in pieces of up to `piece`: one for each half.

    To hand work to a thread and to wait for it was seen to cost 0.1 ms, about what half a piece takes: two
    threads were slower than one up to 2 MiB of float32 at 2:4, norms and rows, and as fast at 4 MiB.
    """
    worth = 2 * elements // piece
    if worth < 2:
        thread_limit()  # asked always, so that a bad setting never goes unnoticed
        return 1
    return min(worth, thread_count())


def piece_length(
    total: int, elements: int, workers: int, workspace: int, piece: int = PIECE_ELEMENTS, *, fixed: bool = False
) -> int:
    """Items (blocks or scopes of `elements` elements each, `workspace` bytes of work arrays) to a piece."""
    if workers == 1 and total * elements <= piece and total * workspace <= PIECE_WORKSPACE:
        return total
    limit = max(1, piece // max(1, elements))
    if workspace:
        limit = max(1, min(limit, PIECE_WORKSPACE // workspace))
    fair = -(-total // (workers * PIECES_PER_THREAD))
    return max(1, min(limit, fair) if workers > 1 and not fixed else limit)


def is_one_piece(total: int, elements: int, piece: int) -> bool:
    """Whether `total` items of `elements` elements each are worked off at once by the caller's thread."""
    return workers_for(total * elements, piece) == 1 and total * elements <= piece


def ranges(
    total: int,
    elements: int,
    make_work: Callable[[int, int], Callable[[int, int, int], None]],
    *,
    workspace: int = BLOCK_WORKSPACE,
    piece: int = PIECE_ELEMENTS,
    shielded: bool = False,
    fixed: bool = False,
) -> Callable[[], None]:
    """A job that works off [0, total), items of `elements` elements each, in ranges on the pool.

    ``make_work(slots, length)`` allocates for that many threads and ranges up to that length, now,
    and returns ``work(slot, start, stop)``. So a writer has all its memory before it starts. `workspace`
    is the bytes of work arrays for one item, `piece` the elements of a range; writers of blocks with several
    leaves are `shielded`. `fixed` ranges are the same for any number of threads.
    """
    if total == 0:
        return lambda: None
    workers = workers_for(total * elements, piece)
    length = piece_length(total, elements, workers, workspace, piece, fixed=fixed)
    if length >= total and not shielded:
        all_of_it = make_work(1, total)
        return lambda: all_of_it(0, 0, total)
    pieces = -(-total // length)
    work = make_work(min(workers, pieces), min(length, total))

    def use(slot: int, p: int) -> None:
        work(slot, p * length, min(total, (p + 1) * length))

    return lambda: threads.run(pieces, use, workers, shielded=shielded)
