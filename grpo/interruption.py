"""Ctrl-C and SIGTERM as a wish that a loop grants at its next good moment.

with interruption(tell=print) as interrupted:
    while not interrupted.is_set():
        step()
"""

import contextlib
import signal
import threading
from collections.abc import Callable, Iterator


@contextlib.contextmanager
def interruption(tell: Callable[[str], None]) -> Iterator[threading.Event]:
    """Set by the first Ctrl-C or SIGTERM within the block; a second one interrupts as usual. In the main thread only,
    where Python handles signals."""
    asked = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield asked
        return
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def handle(number: int, frame: object) -> None:
        asked.set()
        for each, handler in before.items():
            signal.signal(each, handler)
        tell("stopping: this step is finished and saved; once more to stop at once")

    for number in before:
        signal.signal(number, handle)
    try:
        yield asked
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
