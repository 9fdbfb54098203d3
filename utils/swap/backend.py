"""How bytes reach a device: streams, events and page-locked memory, one small class for each kind of device."""

import contextlib
import time

import torch
from torch import Tensor

_HOST_REGISTER_PORTABLE = 1
_CUDA_SUCCESS = 0


def make_backend(device: torch.device) -> "HostBackend | CudaBackend":
    """The backend of `device`, with a copy stream of its own."""
    return CudaBackend(device) if device.type == "cuda" else HostBackend(device)


class HostBackend:
    """A device that computes synchronously: the CPU, or `meta` for counting bytes. Its copies are immediate."""

    page_locks = False

    def __init__(self, device: torch.device):
        self.device = device

    def mark(self) -> None:
        """An event: everything that has been asked of the device so far."""

    def copy(self, target: Tensor, source: Tensor, after: None) -> None:
        """Copies on the copy stream once event `after` has passed; returns the event of its end."""
        target.copy_(source)

    def wait(self, event: None) -> None:
        """Computing continues once `event` has passed; the host does not wait."""

    def finish(self, event: None) -> None:
        """The host itself waits until `event` has passed."""

    def moment(self) -> float:
        """When everything that has been asked of the device so far is computed, for seconds() to read."""
        return time.perf_counter()

    def seconds(self, begin: float, end: float) -> float | None:
        """From one moment to the next; None while the device has not come to `end`. The host does not wait."""
        return end - begin

    def drain(self) -> None:
        """The host waits for all copies; to be called before memory is freed that they read or write."""

    def begin_thread(self) -> None:
        """The first thing that a copying thread has to call."""

    def host_buffer(self, size: int) -> Tensor:
        """uint8 [size] of host memory that copies quickly."""
        return torch.empty(size, dtype=torch.uint8, device=self.device)


class CudaBackend:
    """A CUDA device. Events are recorded before anything waits for them: otherwise CUDA does not wait at all."""

    page_locks = True

    def __init__(self, device: torch.device):
        # With its number: "cuda" alone means the current GPU, which can be another one in each thread.
        index = torch.cuda.current_device() if device.index is None else device.index
        self.device = torch.device("cuda", index)
        # A stream of its own, so that copies run beside kernels; nothing is ever computed on it.
        self.copies = torch.cuda.Stream(self.device)

    def mark(self) -> torch.cuda.Event:
        event = torch.cuda.Event()
        event.record(torch.cuda.current_stream(self.device))
        return event

    def copy(self, target: Tensor, source: Tensor, after: torch.cuda.Event) -> torch.cuda.Event:
        self.copies.wait_event(after)
        with torch.cuda.stream(self.copies):
            target.copy_(source, non_blocking=True)
        event = torch.cuda.Event()
        event.record(self.copies)
        return event

    def wait(self, event: torch.cuda.Event) -> None:
        torch.cuda.current_stream(self.device).wait_event(event)

    def finish(self, event: torch.cuda.Event) -> None:
        event.synchronize()

    def moment(self) -> torch.cuda.Event:
        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(self.device))
        return event

    def seconds(self, begin: torch.cuda.Event, end: torch.cuda.Event) -> float | None:
        return begin.elapsed_time(end) / 1000 if end.query() else None

    def drain(self) -> None:
        self.copies.synchronize()

    def begin_thread(self) -> None:
        torch.cuda.set_device(self.device)

    def host_buffer(self, size: int) -> Tensor:
        """Page-locked if possible; ordinary memory works too, but is slower."""
        try:
            # PyTorch rounds page-locked memory up to a power of two, so sizes should be one.
            return torch.empty(size, dtype=torch.uint8, pin_memory=True)
        except RuntimeError:
            self._clear_error()
            return torch.empty(size, dtype=torch.uint8)

    def page_lock(self, region: Tensor) -> bool:
        """Page-locks `region` in place, for every CUDA context; False, with no error pending, if that fails."""
        cudart = torch.cuda.cudart()
        return self._succeeded(cudart.cudaHostRegister(region.data_ptr(), region.nbytes, _HOST_REGISTER_PORTABLE))

    def page_unlock(self, region: Tensor) -> None:
        """Undoes page_lock(), before the memory is freed. A failure leaves no error pending."""
        self._succeeded(torch.cuda.cudart().cudaHostUnregister(region.data_ptr()))

    def _succeeded(self, code: int) -> bool:
        if int(code) != _CUDA_SUCCESS:
            self._clear_error()
        return int(code) == _CUDA_SUCCESS

    def _clear_error(self) -> None:
        # The error stays pending and would be reported by the next kernel. PyTorch has no cudaGetLastError (its calls
        # are in torch/csrc/cuda/shared/cudart.cpp), but a kernel launch reports the error and so clears it.
        with contextlib.suppress(RuntimeError):
            torch.ones(1, device=self.device)
