"""One model at a time on a device: what is brought there sends what was there back to the host."""

from collections.abc import Callable
from dataclasses import dataclass

from utils.selective_finetune import TrainedSlice
from utils.swap.placement import Placement
from utils.swap.streamer import WaitingTime
from wan.model import WanModel


@dataclass(frozen=True, eq=False)
class LoadedModel:
    """A model with its slice attached; `place` puts it on the device, where `input_bytes` of each block do not stay."""

    model: WanModel
    trained: TrainedSlice
    place: Callable[[], Placement]
    input_bytes: int


class Stage:
    """Holds the placement of the model that is on the device; as a context it ends with none there."""

    def __init__(self):
        self._placement: Placement | None = None
        self._on: LoadedModel | None = None
        self._waits: WaitingTime | None = None

    def __enter__(self) -> "Stage":
        return self

    def __exit__(self, *_) -> None:
        self.clear()

    def bring(self, loaded: LoadedModel) -> Placement:
        """The placement of the model, made now if it is not on the device already."""
        if self._on is not loaded:
            self.clear()
            self._placement, self._on = loaded.place(), loaded
            streamer = self._placement.streamer
            self._waits = streamer.time_waits() if streamer else None
        return self._placement

    def take_waits(self) -> float:
        """For how many seconds the device has waited for streamed weights since this was last asked."""
        return self._waits.take() if self._waits else 0.0

    def clear(self) -> None:
        """Sends the model that is on the device back, if there is one."""
        if self._placement is not None:
            self._placement.undo.close()
        self._placement = self._on = None
