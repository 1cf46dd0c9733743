"""One decoding step recorded as a CUDA graph and replayed: its thousands of kernels run faster than they launch."""

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch

Step = Callable[[], None]


class CudaGraphStep:
    """Calls one step, without arguments or result, many times, on tensors that keep their places.

    On a GPU the first call runs it, the second records it as a CUDA graph, and from then on the recording is replayed,
    until `forget` says that tensors have moved. A step that waits for the GPU (experts chosen on the host, say) cannot
    be recorded: it runs as it is from then on, and once repeats what it had done before it waited. On other devices
    every step runs as it is.

    A recording waits for the GPU and gives back the memory that torch keeps unused.
    """

    def __init__(self, device: torch.device):
        self.device = device
        self.records = device.type == "cuda"  # until a step is found that cannot be recorded
        self.stream = torch.cuda.Stream(device) if self.records else None
        self.warm = False
        self.graph: torch.cuda.CUDAGraph | None = None

    def __call__(self, step: Step) -> None:
        if self.records and self.warm and self.graph is None:
            self.graph = self._recorded(step)
        if not self.records:
            step()
        elif self.warm:
            self.graph.replay()
        else:
            self._first(step)

    def forget(self) -> None:
        self.warm, self.graph = False, None

    def _first(self, step: Step) -> None:
        """Run it, so that libraries are loaded and tuned before the recording, and see that it never waits."""
        current = torch.cuda.current_stream(self.device)
        self.stream.wait_stream(current)
        try:
            with waiting_is_an_error(), torch.cuda.stream(self.stream):
                step()
            self.warm = True
        except RuntimeError as error:
            if "synchronizing" not in str(error):
                raise
            self.records = False
        current.wait_stream(self.stream)
        if not self.records:
            step()

    def _recorded(self, step: Step) -> torch.cuda.CUDAGraph | None:
        """Nothing runs meanwhile. None, and no more attempts, where it fails: a wait that was not found, or memory."""
        graph = torch.cuda.CUDAGraph()
        try:
            # The outer context: a recording that fails leaves its stream the current one. Other threads, such as
            # NCCL's watchdog, may go on asking the driver.
            with (
                torch.cuda.stream(torch.cuda.current_stream(self.device)),
                torch.cuda.graph(graph, stream=self.stream, capture_error_mode="thread_local"),
            ):
                step()
        except RuntimeError as error:
            warnings.warn(f"a decoding step could not be recorded and is slower: {error}", stacklevel=2)
            self.records = False
            return None
        return graph


@contextmanager
def waiting_is_an_error() -> Iterator[None]:
    """In all threads: whatever makes the host wait for the GPU raises RuntimeError, as far as torch notices."""
    before = torch.cuda.get_sync_debug_mode()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the mode is a prototype
        torch.cuda.set_sync_debug_mode("error")
        try:
            yield
        finally:
            torch.cuda.set_sync_debug_mode(before)
