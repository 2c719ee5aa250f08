"""`Stopwatch`: what took how long, in seconds and in those of all processors, of child processes too, such as a compiler."""

import contextlib
import os
import pathlib
import time
from collections.abc import Generator


class Stopwatch:
    """Adds up seconds by name, in the order in which the names came first."""

    def __init__(self):
        self.spent: dict[str, tuple[float, float]] = {}  # seconds, and the processors' seconds
        self._last = _now()

    def lap(self, name: str) -> None:
        """Add to a name what went by since the last lap, or since this began."""
        now = _now()
        self._add(name, self._last, now)
        self._last = now

    @contextlib.contextmanager
    def timing(self, name: str) -> Generator[None]:
        """Add to a name what its body takes."""
        begun = _now()
        try:
            yield
        finally:
            self._add(name, begun, _now())

    def _add(self, name, begun, now):
        before = self.spent.get(name, (0.0, 0.0))
        self.spent[name] = (before[0] + now[0] - begun[0], before[1] + now[1] - begun[1])


def since_the_process_began() -> tuple[float, float]:
    """Return the seconds since then, where the system tells (Linux), and the processors' seconds."""
    with contextlib.suppress(OSError, ValueError, IndexError):
        ticks = pathlib.Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19]
        uptime = pathlib.Path("/proc/uptime").read_text().split()[0]
        return max(float(uptime) - int(ticks) / os.sysconf("SC_CLK_TCK"), 0.0), _now()[1]
    return _now()[1], _now()[1]


def _now() -> tuple[float, float]:
    times = os.times()
    return time.perf_counter(), time.process_time() + times.children_user + times.children_system


def table(rows: dict[str, tuple[float, float]]) -> str:
    """Return rows of seconds as text; those that begin with spaces are parts of the row before them, and count in no sum."""
    whole = [spent for name, spent in rows.items() if not name.startswith(" ")]
    rows = rows | {"in all": (sum(s for s, _ in whole), sum(p for _, p in whole))}
    width = max(map(len, rows))
    lines = (f"{name:<{width}} {seconds:>8.2f} {processor:>10.2f}" for name, (seconds, processor) in rows.items())
    return "\n".join([f"{'':<{width}}  seconds  processor", *lines])
