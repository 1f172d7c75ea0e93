"""Threads, forks, nesting and interrupts: the right result, no hang, every block wholly old or wholly new."""

from __future__ import annotations

import contextvars
import gc
import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from faults import interrupted
from strategies import same_bits

import npscope
from npscope import BlockCoupling, BlockSpec, ScopeSpec
from npscope.backends import threads


@pytest.fixture
def no_garbage_collection():
    """An interrupt that Python delivers inside a callback of the collector (Hypothesis has one) is lost."""
    gc.disable()
    yield
    gc.enable()


needs_fork = pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")


def large(seed=0, shape=(1024, 2048)):
    return np.random.default_rng(seed).standard_normal(shape, dtype=np.float32)


def run(code: str, timeout: float = 60) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, timeout=timeout, check=False
    )


def test_two_threads_at_once():
    arrays = [large(i, (512, 1024)) for i in range(4)]
    expected = [npscope.keep_largest(a, 2, (1, 1), (1, 4)) for a in arrays]
    with ThreadPoolExecutor(4) as pool:
        for _ in range(5):
            got = list(pool.map(lambda a: npscope.keep_largest(a, 2, (1, 1), (1, 4)), arrays))
            assert all(same_bits(g, e) for g, e in zip(got, expected, strict=True))


def test_threads_prune_slices_of_one_array():
    x = large(1)
    expected = npscope.keep_largest(x, 2, (1, 1), (1, 4))
    slices = [x[i * 256 : (i + 1) * 256] for i in range(4)]
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda a: npscope.keep_largest(a, 2, (1, 1), (1, 4), out=a), slices))
    assert same_bits(x, expected)


def test_the_first_call_may_come_from_many_threads():
    code = """
        import numpy as np, npscope, threading
        x = np.random.default_rng(0).standard_normal((256, 1024)).astype('f4')
        results, gate = [], threading.Barrier(6)
        def work():
            gate.wait()
            results.append(npscope.keep_largest(x, 2, (1, 1), (1, 4)).tobytes())
        threads = [threading.Thread(target=work) for _ in range(6)]
        [t.start() for t in threads]; [t.join() for t in threads]
        assert len(results) == 6 and len(set(results)) == 1
        print('done')
    """
    done = run(code)
    assert done.stdout == "done\n", done.stderr


def test_settings_of_one_thread_are_not_seen_by_another():
    seen = []
    with npscope.use_backend("reference"):
        worker = threading.Thread(
            target=lambda: seen.append(npscope.namespace(np.ones(3)).name),
        )
        worker.start()
        worker.join()
        context = contextvars.copy_context()
        worker = threading.Thread(target=lambda: seen.append(context.run(lambda: npscope.namespace(np.ones(3)).name)))
        worker.start()
        worker.join()
    assert seen == ["numba", "reference"]


@needs_fork
def test_case95_fork_then_call_in_the_child():
    """Before any call, after a small one (compiled, no threads) and after a large one (threads)."""
    code = """
        import os, signal, numpy as np, npscope
        x = np.random.default_rng(0).standard_normal((1024, 2048)).astype('f4')
        def call(a):
            with npscope.config(threads=2):
                return npscope.keep_largest(a, 2, (1, 1), (1, 4)).tobytes()
        for a in (None, x[:1, :4], x):
            if a is not None:
                call(a)
            pid = os.fork()
            if pid == 0:
                signal.alarm(30)
                os._exit(0 if call(x) == call(x) else 7)
            print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))
        call(x)
    """
    done = run(code)
    assert done.stdout.split() == ["0", "0", "0"], done.stderr


@needs_fork
def test_case95_pool_of_forked_processes():
    code = """
        import multiprocessing, numpy as np, npscope
        x = np.random.default_rng(0).standard_normal((1024, 2048)).astype('f4')
        def work(i):
            return npscope.keep_largest(x, 2, (1, 1), (1, 4)).sum(dtype='f8')
        if __name__ == '__main__':
            here = work(0)
            with multiprocessing.get_context('fork').Pool(2) as pool:
                assert pool.map(work, range(4)) == [here] * 4
            print('done')
    """
    done = run(code)
    assert done.stdout == "done\n", done.stderr


def test_calls_at_exit_run_inline():
    code = """
        import atexit, numpy as np, npscope
        x = np.ones((1024, 2048), 'f4')
        npscope.keep_largest(x, 2, (1, 1), (1, 4))
        atexit.register(lambda: print(int(npscope.keep_largest(x, 2, (1, 1), (1, 4)).sum())))
    """
    done = run(code)
    assert done.stdout == "1048576\n", done.stderr


def test_calls_in_a_thread_that_outlives_main():
    code = """
        import threading, time, numpy as np, npscope
        x = np.ones((1024, 2048), 'f4')
        npscope.keep_largest(x, 2, (1, 1), (1, 4))
        def late():
            time.sleep(0.3)
            print(int(npscope.keep_largest(x, 2, (1, 1), (1, 4)).sum()))
        threading.Thread(target=late).start()
    """
    done = run(code)
    assert done.stdout == "1048576\n", done.stderr


def test_nested_calls_inside_a_full_pool():
    """Callers on many threads of a pool, each of which calls: none waits for a worker that waits for it."""
    x = large(2, (256, 1024))
    expected = npscope.keep_largest(x, 2, (1, 1), (1, 4))

    def outer(_):
        with ThreadPoolExecutor(2) as inner:
            return list(inner.map(lambda _: npscope.keep_largest(x, 2, (1, 1), (1, 4)), range(2)))

    with ThreadPoolExecutor(8) as pool:
        for pair in pool.map(outer, range(8), timeout=60):
            assert all(same_bits(r, expected) for r in pair)


@pytest.mark.skipif(sys.platform == "win32", reason="signals")
@pytest.mark.usefixtures("no_garbage_collection")
@pytest.mark.parametrize("delay", [0.002, 0.01, 0.03])
@pytest.mark.parametrize("operation", ["2:4", "rows", "soft"])
def test_an_interrupt_leaves_every_block_old_or_new(operation, delay):
    x = large(3, (2048, 4096))
    call, width = {
        "2:4": (lambda a, out: npscope.keep_largest(a, 2, (1, 1), (1, 4), out=out), 1),
        "rows": (lambda a, out: npscope.keep_largest(a, 20_000, (1, 64), (-1, -1), out=out), 64),
        "soft": (lambda a, out: npscope.soft_threshold(a, 0.5, (1, 4), out=out), 4),
    }[operation]
    before, after = x.copy(), call(x, None)
    call(x[:64, :256].copy(), None) if operation != "rows" else None
    timer = threading.Timer(delay, lambda: os.kill(os.getpid(), signal.SIGINT))
    try:
        timer.start()
        call(x, x)
        timer.join()
        time.sleep(0.05)
    except KeyboardInterrupt:
        pass
    old = (x.view("u4") == before.view("u4")).reshape(2048, -1, width).all(-1)
    new = (x.view("u4") == after.view("u4")).reshape(2048, -1, width).all(-1)
    assert (old | new).all()
    if operation == "2:4":
        assert same_bits(call(x, x), after), "repeating a hard threshold completes it"


COUPLED = {
    "small scopes": lambda block, h: ScopeSpec(block, (8,)).hard_threshold(nnz=3),
    "large scope": lambda block, h: ScopeSpec(block, ()).hard_threshold(nnz=700),
    "level": lambda block, h: block.hard_threshold(64.0),
    "soft": lambda block, h: block.soft_threshold(1.0),
    "conditioned": lambda block, h: block.soft_threshold(1.0, dict.fromkeys(block.specs(), h)),
    "mask": lambda block, h: block.apply_mask((np.arange(block.numblk()) % 2 == 0).reshape(-1, 1)),
    "multiplier": lambda block, h: block.apply_multiplier(0.5),
}


@pytest.mark.sampled(2)
@pytest.mark.skipif(not hasattr(signal, "setitimer"), reason="signals")
@pytest.mark.usefixtures("no_garbage_collection")
@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("operation", COUPLED)
def test_an_interrupt_never_splits_a_coupled_block(operation, threads):
    """A row of one array and a row of another are one block: both old or both new, whenever Ctrl-C comes."""
    before = [large(seed, (2048, 2048)) for seed in (4, 5)]
    arrays, h = [a.copy() for a in before], np.full((2048, 2048), 2.0, dtype=np.float32)
    block = BlockCoupling([BlockSpec(a, (1, -1)) for a in arrays])
    handler, interrupted, seconds = signal.signal(signal.SIGALRM, signal.default_int_handler), 0, 0.0
    try:
        with npscope.use_backend("numba"), npscope.config(threads=threads):
            for _ in range(2):  # the first compiles
                block.set_data(dict(zip(block.specs(), before, strict=True)))
                start = time.perf_counter()
                COUPLED[operation](block, h)
                seconds = time.perf_counter() - start
            after = [a.copy() for a in arrays]
            for trial in range(16):
                block.set_data(dict(zip(block.specs(), before, strict=True)))
                try:
                    signal.setitimer(signal.ITIMER_REAL, max(seconds * (trial + 1) / 15, 1e-4))
                    COUPLED[operation](block, h)
                    signal.setitimer(signal.ITIMER_REAL, 0)
                    time.sleep(0)
                except KeyboardInterrupt:
                    interrupted += 1
                old = [(a.view("u4") == b.view("u4")).all(axis=1) for a, b in zip(arrays, before, strict=True)]
                new = [(a.view("u4") == b.view("u4")).all(axis=1) for a, b in zip(arrays, after, strict=True)]
                assert ((old[0] & old[1]) | (new[0] & new[1])).all()
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, handler)
    assert interrupted, "the test is meant to interrupt"


@pytest.mark.skipif(sys.platform == "win32", reason="signals")
@pytest.mark.parametrize(
    ("shape", "call"),
    [
        ((2048, 4096), "npscope.block_norms(x, (1, 64), ord=3)"),
        pytest.param(
            (8192, 8192),
            "npscope.ScopeSpec(npscope.BlockSpec(x, (32, 32)), ()).kth_largest(nnz=99)",
            marks=pytest.mark.slow,
        ),
        ((8192, 8192), "npscope.ScopeSpec(npscope.BlockSpec(x, (32, 32)), ()).kth_largest(nnz=99, ord=3)"),
    ],
)
def test_case96_an_interrupt_is_prompt(shape, call):
    code = f"""
        import os, signal, threading, time, numpy as np, npscope
        x = np.random.default_rng(0).standard_normal({shape}, dtype='f4')
        {call}
        sent = []
        def strike():
            sent.append(time.perf_counter())
            os.kill(os.getpid(), signal.SIGINT)
        threading.Timer(0.4, strike).start()
        try:
            while True:
                {call}
        except KeyboardInterrupt:
            print(time.perf_counter() - sent[0])
        y = npscope.block_norms(x[:8], (1, 64), ord=3)
        assert y.shape == (8, {shape[1] // 64})
    """
    done = run(code)
    assert float(done.stdout or "inf") < 0.6, done.stderr


@pytest.mark.parametrize("shielded", [False, True])
def test_an_interrupt_between_any_two_instructions_blocks_nothing(shielded):
    """Nor leaves anything that still runs: no later call, no thread of the pool, and not the end of the process."""
    running = []

    def work(slot, piece):
        running.append(piece)
        time.sleep(0.0005)
        running.remove(piece)

    at, is_interrupted = 0, True
    while is_interrupted:
        at += 1
        is_interrupted = interrupted(lambda: threads.run(4, work, 3, shielded=shielded), at)
        assert not running, at
        done = []
        threads.run(3, lambda slot, piece, done=done: done.append(piece), 3, shielded=shielded)
        assert sorted(done) == [0, 1, 2]
    assert at > 50


@pytest.mark.parametrize(
    "refused",
    ["True", "n % 2 == 0", *(pytest.param(c, marks=pytest.mark.slow) for c in ("n == 0", "n > 0", "n % 2 == 1"))],
)
def test_case79_threads_that_do_not_start(refused):
    """The system refuses the n-th thread: the others do the work, and nothing still runs or runs later."""
    code = f"""
        import _thread, itertools, time, numpy as np, npscope
        from npscope.backends import threads
        from npscope import BlockCoupling, BlockSpec, ScopeSpec
        fresh = np.random.default_rng(0).standard_normal((2, 1024, 2048), dtype='f4')
        calls = [
            lambda a: npscope.keep_largest(a, 2, (1, 1, 1), (1, 1, 4), out=a),
            lambda a: ScopeSpec(BlockCoupling([BlockSpec(w, (1, 2)) for w in a]), ()).hard_threshold(nnz=1000),
        ]
        start, attempts = _thread.start_new_thread, itertools.count()
        def limited(*arguments):
            n = next(attempts)
            if {refused}:
                raise RuntimeError("can't start new thread")
            return start(*arguments)
        _thread.start_new_thread = limited
        entered, left = [], []
        def work(slot, piece):
            entered.append((slot, piece))
            time.sleep(0.01 if slot == 0 else 0.03)
            left.append((slot, piece))
        with npscope.config(threads=4):
            for _ in range(4):
                entered.clear(), left.clear()
                threads.run(10, work, 4)
                assert len(left) == 10, 'a piece was still running'
                assert sorted(piece for _, piece in entered) == list(range(10))
                assert all(0 <= slot < 4 for slot, _ in entered)
            arrays = [fresh.copy() for _ in calls]
            for call, x in zip(calls, arrays):
                call(x)
            results = [x.copy() for x in arrays]
            for x in arrays:
                x[...] = fresh
            _thread.start_new_thread = start
            for count in (4, 1):
                for call, result in zip(calls, results):
                    y = fresh.copy()
                    with npscope.config(threads=count):
                        call(y)
                    assert (y == result).all()
            time.sleep(0.1)
        assert all((x == fresh).all() for x in arrays), 'a job of an earlier call was still queued and ran'
        assert len(left) == 10
        print('done')
    """
    done = run(code)
    assert done.stdout == "done\n", done.stderr
