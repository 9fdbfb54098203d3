"""Reads the outcome of every step once: checks it, keeps the loss, logs the step, moves the bar."""

from collections.abc import Mapping

from utils.run.finite import check_slice_is_finite, check_step_is_finite
from utils.run.outcome import Outcome
from utils.run.progress import StepBar
from utils.run.run import Place, Run
from utils.run.turns import log_step


class Readings:
    """What a run, or one of two experts, has not read yet: nothing, or the outcome of the last step.

    A late outcome has to be read before the next step, and before anything else: a save, a validation, samples, the
    end of an epoch, the other expert's turn. Until then no one knows that the step counts.
    """

    def __init__(self, run: Run, place: Place, bar: StepBar):
        self._run, self._place, self._bar = run, place, bar
        self._unread: tuple[Outcome, Mapping[str, float], bool] | None = None

    def add(self, outcome: Outcome, rates: Mapping[str, float], preserves: bool) -> None:
        """The step up to `place`, which the device may still be at work on; `rates` are logged with it."""
        assert self._unread is None
        self._run.timer.launch_step()
        self._unread = outcome, rates, preserves

    def read(self) -> bool:
        """Waits for the last step if that is unread; whether any process was asked to stop when it was launched.

        InputError, with the slice as it was before the step, if something of it is not finite.
        """
        if self._unread is None:
            return False
        (outcome, rates, preserves), self._unread = self._unread, None
        if outcome.is_late:  # any other was checked before it could do harm
            check_step_is_finite(self._run, self._place, outcome)
            check_slice_is_finite(self._run, self._place, outcome)
        values = outcome.values
        self._place.losses.append(values["loss"])
        preserved = {"loss/preserve": values["preserve_loss"]} if preserves else {}
        log_step(self._run, self._place, {**preserved, **rates, "grad_norm": values["grad_norm"]}, self._bar)
        return outcome.stops
