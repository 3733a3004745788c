"""How far a pass is, what it does, and how long it still takes: a bar on a terminal, else a line
every ten seconds.
"""

import sys
import time

from common.processes import is_main_process

DELAY, EVERY = 2.0, 10.0  # seconds before a bar shows, and between lines where there is no terminal
phase = ""  # what passes are made for, put before their names


def during(name: str) -> None:
    """Names what all passes from here on are made for; "" for nothing."""
    global phase
    phase = name


class Bar:
    """Counts steps of `total` on standard error, on the main process; short passes show nothing."""

    def __init__(self, what: str, total: int, initial: int = 0, unit: str = "batch", delay: float = DELAY):
        self.what = f"{phase}: {what}" if phase else what
        self.done = self.first = initial
        self.total, self.unit = total, unit
        self.started = self.shown = time.monotonic()
        self.is_shown, self.bar = is_main_process(), None
        if self.is_shown and sys.stderr.isatty():
            from tqdm import tqdm

            shape = {"total": total, "initial": initial, "unit": unit, "mininterval": 0.2, "maxinterval": 0.2}
            self.bar = tqdm(desc=self.what, delay=delay, leave=delay == 0, dynamic_ncols=True, **shape)

    def update(self) -> None:
        """One step more."""
        self.done += 1
        now = time.monotonic()
        if self.bar is not None:
            self.bar.update(1)
        elif self.is_shown and now - self.shown >= EVERY:
            self.shown = now
            left = (now - self.started) / (self.done - self.first) * (self.total - self.done)
            share = f"{self.done / max(1, self.total):.0%}"
            clock = f"{int(left) // 60}:{int(left) % 60:02d}"
            words = f"{self.what}: {self.unit} {self.done:,} of {self.total:,}, {share}, {clock} left"
            print(words, file=sys.stderr, flush=True)

    def close(self) -> None:
        """Takes a bar away."""
        if self.bar is not None:
            self.bar.close()


def track(items, what: str, unit: str = "batch"):
    """The items one by one, counted by a bar."""
    bar = Bar(what, len(items), unit=unit)
    try:
        for item in items:
            yield item
            bar.update()
    finally:
        bar.close()
