"""How bytes reach a device: streams, events and page-locked memory, one small class for each kind of device."""

import contextlib

import torch
from torch import Tensor

_HOST_REGISTER_PORTABLE = 1
_CUDA_SUCCESS = 0


def make_backend(device: torch.device) -> "HostBackend | CudaBackend":
    """The backend of `device`; each has a copy stream of its own."""
    return CudaBackend(device) if device.type == "cuda" else HostBackend(device)


class HostBackend:
    """A device that computes in step with the host: the CPU, or `meta` for counting bytes. Its copies are immediate."""

    page_locks = False

    def __init__(self, device: torch.device):
        self.device = device

    def mark(self) -> None:
        """An event: the point that computing has come to."""

    def copy(self, target: Tensor, source: Tensor, after: None) -> None:
        """Copies on the copy stream once event `after` has passed; the event of its end comes back."""
        target.copy_(source)

    def wait(self, event: None) -> None:
        """Computing goes on once `event` has passed; the host does not wait."""

    def finish(self, event: None) -> None:
        """The host itself waits until `event` has passed."""

    def drain(self) -> None:
        """The host waits for all copies: before memory goes that they read or write."""

    def begin_thread(self) -> None:
        """To be called first in a thread that copies."""

    def host_buffer(self, size: int) -> Tensor:
        """uint8 [size] of host memory that copies quickly."""
        return torch.empty(size, dtype=torch.uint8, device=self.device)


class CudaBackend:
    """A CUDA device; every event is recorded before anything waits for it (else CUDA does not wait at all)."""

    page_locks = True

    def __init__(self, device: torch.device):
        # With its number: "cuda" alone means another GPU where a thread has its own current one.
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

    def drain(self) -> None:
        self.copies.synchronize()

    def begin_thread(self) -> None:
        torch.cuda.set_device(self.device)

    def host_buffer(self, size: int) -> Tensor:
        """Page-locked where that works; ordinary memory copies too, only slower."""
        try:
            # PyTorch rounds page-locked memory up to a power of two: ask for one.
            return torch.empty(size, dtype=torch.uint8, pin_memory=True)
        except RuntimeError:
            self._clear_error()
            return torch.empty(size, dtype=torch.uint8)

    def page_lock(self, region: Tensor) -> bool:
        """Page-locks `region` where it lies, for all of CUDA; False, with no error left behind, if it cannot be."""
        cudart = torch.cuda.cudart()
        return self._succeeded(cudart.cudaHostRegister(region.data_ptr(), region.nbytes, _HOST_REGISTER_PORTABLE))

    def page_unlock(self, region: Tensor) -> None:
        """Ends page_lock(); to be called before the memory is freed. A refusal leaves no error behind."""
        self._succeeded(torch.cuda.cudart().cudaHostUnregister(region.data_ptr()))

    def _succeeded(self, code: int) -> bool:
        if int(code) != _CUDA_SUCCESS:
            self._clear_error()
        return int(code) == _CUDA_SUCCESS

    def _clear_error(self) -> None:
        # A failed call stays pending and would hit the next kernel; torch has no cudaGetLastError, but a kernel launch
        # reports the error and so clears it (torch/csrc/cuda/shared/cudart.cpp has the list of its calls).
        with contextlib.suppress(RuntimeError):
            torch.ones(1, device=self.device)
