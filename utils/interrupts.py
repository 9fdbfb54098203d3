"""Ctrl-C and the other requests to end: the first asks for a stop at the next good place, the second stops at once."""

import os
import signal
import threading
import time
from contextlib import suppress

# A closed terminal sends SIGHUP, a cluster or `kill` SIGTERM, Ctrl-Break on Windows SIGBREAK.
_NAMES = ("SIGINT", "SIGTERM", "SIGHUP", "SIGBREAK")
_SIGNALS = [getattr(signal, name) for name in _NAMES if hasattr(signal, name)]
# One request often comes as several signals: a terminal that closes sends SIGHUP from the kernel and from its shell, a
# service manager SIGTERM with SIGHUP, torchrun hands on what has reached its workers too.
_ONE_REQUEST = 1.0  # seconds
# accelerate's launcher ends at the first Ctrl-C, and the terminal's next one goes to the shell.
_ASKED = (
    "\nstopping after this step: it is finished, a state is saved, the run exits. Ctrl-C again exits immediately (if "
    "the prompt is already back, as under accelerate launch, end process {pid} instead)\n"
)


class StopRequest:
    """While entered, the first signal only sets `asked`; a second one raises KeyboardInterrupt.

    Signals that were ignored when the process started stay ignored, as SIGHUP under nohup. It `is_urgent` where the
    process is killed soon after the first signal.
    """

    def __init__(self):
        self.asked = False
        self.is_urgent = is_under_torchrun()

    def __enter__(self) -> "StopRequest":
        self._before = {}
        if threading.current_thread() is threading.main_thread():  # signals reach no other
            for number in _SIGNALS:
                if signal.getsignal(number) is not signal.SIG_IGN:
                    self._before[number] = signal.signal(number, self._on_signal)
        return self

    def __exit__(self, *_) -> None:
        for number, handler in self._before.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)  # None: set by no Python code

    def _on_signal(self, number: int, _) -> None:
        if self.asked:
            if self._is_same_request(number):
                return
            raise KeyboardInterrupt
        self.asked, self._first, self._asked_at = True, number, time.monotonic()
        with suppress(OSError):  # the terminal may be gone, and Ctrl-C ends `| tee` as well
            os.write(2, _ASKED.format(pid=os.getpid()).encode())  # print may be at work where the signal came in

    def _is_same_request(self, number: int) -> bool:
        is_repeated = number != self._first or number == getattr(signal, "SIGHUP", None) or is_under_torchrun()
        return is_repeated and time.monotonic() - self._asked_at < _ONE_REQUEST


def is_under_torchrun() -> bool:
    """Whether this is a worker of torch.distributed.run, which `accelerate launch` uses for several GPUs."""
    return "TORCHELASTIC_RUN_ID" in os.environ


def torchrun_line() -> str | None:
    """What a run under torchrun should know at its start about being stopped; None elsewhere."""
    if not is_under_torchrun():
        return None
    return (
        "note: torchrun ends its workers 30 seconds after Ctrl-C or another signal (--shutdown-timeout in new "
        "versions). The run stops after the current batch or the one after it, and saves the last finished step; if "
        "these take longer than that, only states saved before are left (--save_state with --save_every_n_steps)"
    )


def ignore_interrupts(*_) -> None:
    """For worker processes: signals reach every process of a terminal or job, and the main one ends its workers."""
    for number in _SIGNALS:
        signal.signal(number, signal.SIG_IGN)
