"""Where a run's time goes, for the last line of its log."""

import contextlib
import time
from collections import Counter
from collections.abc import Iterator

import psutil

REST = "the rest"
seconds = Counter()
running = [REST]  # the innermost part is charged
charged_until = time.perf_counter()


def charge():
    global charged_until
    now = time.perf_counter()
    seconds[running[-1]] += now - charged_until
    charged_until = now


@contextlib.contextmanager
def timed(part: str) -> Iterator[None]:
    """Charge the time spent inside to `part`, except what nested parts take. Also a decorator."""
    charge()
    running.append(part)
    try:
        yield
    finally:
        charge()
        running.pop()


def charge_imports():
    """Charge the time since the process started to imports. Call it once everything is imported."""
    global charged_until
    charged_until = time.perf_counter()
    seconds.clear()
    seconds["imports"] = time.time() - psutil.Process().create_time()


def describe_times() -> str:
    charge()
    parts = [f"{part} {seconds[part]:.1f}" for part in seconds if part != REST]
    return f"took {sum(seconds.values()):.1f} s: {', '.join([*parts, f'{REST} {seconds[REST]:.1f}'])}"
