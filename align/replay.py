"""A GPU's kernels recorded once and replayed: a decoding step is thousands of them, launched slower than they run."""

from collections.abc import Callable

import torch


class Replay:
    """A step without arguments or result on tensors that keep their places, called many times.

    On a GPU the first call runs it, the second records it as a CUDA graph, and from then on the recording is replayed,
    until `forget` says that tensors have moved. A step that waits for the GPU (experts chosen on the host, say) cannot
    be recorded and is called as it is; so is every step elsewhere.
    """

    def __init__(self, step: Callable[[], None], device: torch.device):
        self.step = step
        self.records = device.type == "cuda"
        self.stream = torch.cuda.Stream(device) if self.records else None
        self.warm = False
        self.graph: torch.cuda.CUDAGraph | None = None

    def __call__(self) -> None:
        if not self.records:
            self.step()
        elif not self.warm:
            self._first()
        else:
            if self.graph is None:
                self._record()
            self.graph.replay()

    def forget(self) -> None:
        self.warm, self.graph = False, None

    def _first(self) -> None:
        """Run once, so that libraries are loaded and tuned before the recording, and see that it never waits."""
        before = torch.cuda.get_sync_debug_mode()
        self.stream.wait_stream(torch.cuda.current_stream())
        try:
            torch.cuda.set_sync_debug_mode("error")
            with torch.cuda.stream(self.stream):
                self.step()
            self.warm = True
        except RuntimeError as error:
            if "synchronizing" not in str(error):
                raise
            self.records = False
        finally:
            torch.cuda.set_sync_debug_mode(before)
        torch.cuda.current_stream().wait_stream(self.stream)
        if not self.records:
            self.step()

    def _record(self) -> None:
        self.graph = torch.cuda.CUDAGraph()
        # Other threads, such as NCCL's watchdog, may go on asking the driver meanwhile.
        with torch.cuda.graph(self.graph, stream=self.stream, capture_error_mode="thread_local"):
            self.step()
