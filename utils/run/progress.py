"""How fast a run trains: seconds per step, tokens per second, the shares of time that wait for data and weights."""

import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import wraps

from tqdm import tqdm

_RECENT = 50  # steps, of which the bar's time left is an estimate
_END = object()


class StepTimer:
    """Measures the steps of this process, without the pauses between them in which it saves, samples or validates.

    By the monotonic clock of the host: every step brings its loss to the host, at the latest while the next step runs,
    so the times from one to the next are those of the device, and nothing has to wait for the sake of measuring.
    `waited_for_weights` tells for how many seconds the device has waited for swapped weights since it was last asked;
    None where no block is swapped.
    """

    def __init__(
        self,
        waited_for_weights: Callable[[], float] | None = None,
        clock: Callable[[], float] = time.perf_counter,
    ):
        self._waited_for_weights = waited_for_weights
        self._clock = clock
        self._recent: deque[float] = deque(maxlen=_RECENT)
        self._paused = 0  # depth
        self._launched = (0.0, 0)  # what the step that is launched waited for data, and its tokens
        self.restart()

    def restart(self) -> None:
        """The next step begins now."""
        self._forget_waits()
        self._began, self._waited, self._tokens = self._clock(), 0.0, 0

    @property
    def rate(self) -> float | None:
        """Steps per second, lately; None before the first step."""
        total = sum(self._recent)
        return len(self._recent) / total if total > 0 else None

    def batches(self, loader: Iterable[Mapping], patch_size: tuple[int, int, int]) -> Iterator[Mapping]:
        """The loader's batches, whose tokens and waiting time are counted."""
        began, source = self._clock(), iter(loader)
        while (batch := next(source, _END)) is not _END:
            self._waited += self._clock() - began
            self._tokens += _tokens(tuple(batch["latents"].shape), patch_size)
            yield batch
            began = self._clock()

    @contextmanager
    def paused(self) -> Iterator[None]:
        """What happens inside belongs to no step."""
        began = self._clock()
        self._paused += 1
        yield
        self._paused -= 1
        if not self._paused:  # else the outer pause counts this one, too
            self._began += self._clock() - began
            self._forget_waits()

    def launch_step(self) -> None:
        """The step has all its batches: those that come from now on are the next one's, although it is not finished."""
        self._launched, self._waited, self._tokens = (self._waited, self._tokens), 0.0, 0

    def finish_step(self) -> dict[str, float]:
        """What to log of the step that was launched and ends now."""
        now, (waited, tokens) = self._clock(), self._launched
        seconds, self._began = now - self._began, now
        values = {"time/step_seconds": seconds}
        if seconds > 0:
            values["time/tokens_per_second"] = tokens / seconds
            values["time/data_wait_share"] = min(waited / seconds, 1.0)
            if self._waited_for_weights:
                values["time/weight_wait_share"] = min(self._waited_for_weights() / seconds, 1.0)
        self._recent.append(seconds)
        return values

    def _forget_waits(self) -> None:
        """What waited for weights so far, in another step or in a pause, does not count."""
        if self._waited_for_weights:
            self._waited_for_weights()


def between_steps(turn: Callable) -> Callable:
    """For a function of a run that saves, samples or validates: its time belongs to no step."""

    @wraps(turn)
    def untimed(run, *args, **kwargs):
        with run.timer.paused():
            return turn(run, *args, **kwargs)

    return untimed


class StepBar(tqdm):
    """A progress bar of steps whose time left follows from the steps alone."""

    def __init__(self, timer: StepTimer, total: int, done: int, shown: bool):
        self._timer = timer
        self._losses: dict[str, str] = {}
        super().__init__(total=total, initial=done, desc="steps", disable=not shown)

    def show(self, expert: str, loss: float, average: float) -> None:
        """Moves on by a step; two experts have a loss each, since high noise makes it several times larger."""
        self._losses |= {expert: f"{loss:.4f} (average {average:.4f})"} if expert else {}
        shown = self._losses or {"loss": f"{loss:.4f}", "average": f"{average:.4f}"}
        self.set_postfix(shown, refresh=False)
        self.update()

    @property
    def format_dict(self) -> dict:
        return super().format_dict | {"rate": self._timer.rate}


def _tokens(shape_BCFHW: tuple[int, ...], patch_size: tuple[int, int, int]) -> int:
    batch, _, *latent = shape_BCFHW
    frames, rows, columns = (size // patch for size, patch in zip(latent, patch_size, strict=True))
    return batch * frames * rows * columns
