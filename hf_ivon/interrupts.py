"""Signals that wait while weights are half written."""

from __future__ import annotations

import signal
import threading
from collections.abc import Generator
from contextlib import contextmanager
from types import FrameType


@contextmanager
def interrupts_deferred() -> Generator[None, None, None]:
    """Let signals' handlers wait until the block has ended: half-written weights could not be told from whole ones."""
    if threading.current_thread() is not threading.main_thread():  # handlers run in the main thread alone
        yield
        return
    waiting: list[tuple[int, FrameType | None]] = []
    handlers = {}
    for interrupt in (signal.SIGINT, signal.SIGTERM):
        handler = signal.getsignal(interrupt)
        if callable(handler):
            handlers[int(interrupt)] = handler
            signal.signal(interrupt, lambda number, frame: waiting.append((number, frame)))
    try:
        yield
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
        for number, frame in waiting:
            handlers[number](number, frame)
