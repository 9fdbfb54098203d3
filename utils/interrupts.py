"""Ctrl-C: once asks for a stop at the next good place, twice stops at once."""

import os
import signal
import threading
from contextlib import suppress

# accelerate's launcher ends at the first Ctrl-C, and the terminal's next one goes to the shell.
_TOLD = (
    "\nstopping after this step, with a state to go on from; Ctrl-C again stops at once (where the prompt is back "
    "already, as under accelerate launch: end process {pid})\n"
)


class StopRequest:
    """While entered, the first Ctrl-C only sets `asked`; the second raises KeyboardInterrupt."""

    def __init__(self):
        self.asked = False

    def __enter__(self) -> "StopRequest":
        self._catches = threading.current_thread() is threading.main_thread()  # signals reach no other
        if self._catches:
            self._before = signal.signal(signal.SIGINT, self._on_interrupt)
        return self

    def __exit__(self, *_) -> None:
        if self._catches:
            signal.signal(signal.SIGINT, self._before)

    def _on_interrupt(self, *_) -> None:
        if self.asked:
            raise KeyboardInterrupt
        self.asked = True
        with suppress(OSError):  # Ctrl-C ends `| tee` as well
            os.write(2, _TOLD.format(pid=os.getpid()).encode())  # print may be at work where the signal came in


def ignore_interrupts(*_) -> None:
    """For worker processes: Ctrl-C reaches every process of a terminal, and the main one ends them."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
