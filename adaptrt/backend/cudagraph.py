"""Makes a whole call one CUDA graph: k steps, query loss and meta-gradient are one launch.

Programs are compiled by another backend, and the calls of an unroll, which run them, are recorded (`launch.py`).

Besides its arguments a recording depends on the settings of PyTorch that choose kernels (`settings`): TF32, reduced precision of sums,
deterministic algorithms, and cuDNN's. If one of them changes, a new recording is made.

Known limits: a recording belongs to the process that made it, as everything of CUDA does. It copies its arguments and results once each.
Before PyTorch 2.12, which has one state of random numbers for a device, what another thread draws there itself while a call is recorded is
refused by PyTorch.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
from collections.abc import Callable, Generator, Hashable, Sequence
from typing import Any

import torch
from torch import Tensor

from adaptrt.backend.base import Backend, Runner
from adaptrt.backend.inductor import Inductor
from adaptrt.backend.launch import Launcher, Recorder
from adaptrt.errors import CannotRecord, InvalidArgument
from adaptrt.graph.ir import Graph
from adaptrt.graph.switches import CUDNN

WARM_UPS = 2
"""The first run compiles. In the second one kernels may still be tuned, and workspaces of libraries allocated."""


class CudaRecorder(Recorder):
    """Records CUDA graphs on one device. They share one pool of memory."""

    def __init__(self, device: torch.device) -> None:
        if device.type != "cuda":
            raise InvalidArgument(
                f"backend='cudagraph' needs a model on a CUDA device, this one is on {device}; use backend='inductor', or move the model"
            )
        self.device = device
        self._process = os.getpid()
        self._stream: torch.cuda.Stream | None = None
        self._pool: Any = None
        self._last: tuple[torch.cuda.Stream, torch.cuda.Event] | None = None

    def refuse(self) -> None:
        if os.getpid() != self._process:
            raise CannotRecord(
                "this unroll was made before the process was forked, and CUDA does not survive a fork; make model and unroll in the child "
                "process, which has to be started with the method 'spawn' if CUDA was in use before"
            )
        if torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing():
            raise CannotRecord(
                "an unroll with backend='cudagraph' was called while a CUDA graph is being captured, and graphs cannot be nested; call it "
                "outside, as it is one graph launch already"
            )

    def settings(self) -> Hashable:
        cuda, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
        return (
            torch.are_deterministic_algorithms_enabled(),
            # Of TF32; the public getters raise where old and new ways of setting it were mixed.
            *[torch._C._get_fp32_precision_getter("cuda", operation) for operation in ("matmul", "conv", "rnn")],  # type: ignore[attr-defined]
            cuda.allow_bf16_reduced_precision_reduction,
            cuda.allow_fp16_reduced_precision_reduction,
            CUDNN.users,  # captures of other threads switch it off in between
            cudnn.deterministic,
            cudnn.benchmark,
        )

    def warm_up(self, run: Callable[[], object]) -> int:
        with torch.cuda.device(self.device):
            if self._stream is None:
                self._stream = torch.cuda.Stream()
            current = torch.cuda.current_stream()
            before = torch.cuda.memory_allocated()
            self._stream.wait_stream(current)
            with torch.cuda.stream(self._stream):
                for _ in range(WARM_UPS):
                    run()
            current.wait_stream(self._stream)
            # At most that: the peak may be an earlier one, and the statistic is the process's, so it is not reset.
            return torch.cuda.max_memory_allocated() - before

    def record(self, run: Callable[[], list[Tensor]]) -> tuple[list[Tensor], Callable[[], None]]:
        with torch.cuda.device(self.device):
            graph = torch.cuda.CUDAGraph()
            if self._pool is None:
                self._pool = torch.cuda.graph_pool_handle()
            stream = torch.cuda.current_stream()
            # The workspaces of cuBLAS are the graph's own then: PyTorch frees a stream's as soon as one graph of that stream is freed.
            torch._C._cuda_clearCublasWorkspaces()  # type: ignore[attr-defined]
            reason: BaseException | None = None
            try:
                with torch.cuda.graph(graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local"):
                    try:
                        outputs = run()
                    except BaseException as error:
                        reason = error
                        raise
            except BaseException:
                torch.cuda.set_stream(stream)
                with contextlib.suppress(RuntimeError):  # where the device fails altogether, the first error is the one to read
                    _end_broken_capture(self.device, self._pool)
                self._pool = None  # the next recording takes another, whatever state this one is in
                if reason is None:
                    raise
            else:
                return outputs, graph.replay
            finally:
                torch._C._cuda_clearCublasWorkspaces()  # type: ignore[attr-defined]
            try:
                raise reason  # and not that of ending the capture, which only says that there was another before
            finally:
                del reason  # which knows this frame

    @contextlib.contextmanager
    def in_order(self, owned: Sequence[Tensor], streams: set[Hashable]) -> Generator[None]:
        with torch.cuda.device(self.device):
            stream = torch.cuda.current_stream()
            if self._last is None:
                self._last = stream, torch.cuda.Event()
            last, event = self._last
            if stream != last:
                stream.wait_event(event)
            if stream.cuda_stream not in streams:
                streams.add(stream.cuda_stream)
                for tensor in owned:  # the allocator must not give it away before this stream is done with it
                    tensor.record_stream(stream)
            try:
                yield
            finally:
                event.record(stream)
                self._last = stream, event


def _end_broken_capture(device: torch.device, pool: Any) -> None:
    """Cleans up after an operation has broken a capture. PyTorch then fails to end the capture, and leaves this undone."""
    index = torch.cuda.current_device() if device.index is None else device.index
    try:
        torch._C._cuda_endAllocateToPool(index, pool)  # type: ignore[attr-defined]
    except RuntimeError:
        return  # it was ended
    torch._C._cuda_releasePool(index, pool)  # type: ignore[attr-defined]
    # Before 2.12 the generator of random numbers takes every later draw for one of that capture, and refuses it, until another one ends.
    with torch.cuda.graph(torch.cuda.CUDAGraph(), stream=torch.cuda.Stream(device), capture_error_mode="thread_local"):
        torch.zeros(1, device=device)


@dataclasses.dataclass(frozen=True, slots=True)
class CudaGraph(Backend):
    """Compiles programs by `compiler`, and makes each call of an unroll one launch.

    Attributes:
      compiler: the backend that compiles programs.
      recorder: makes the recorder of an unroll for the device of its model.
    """

    compiler: Backend = dataclasses.field(default_factory=Inductor)
    recorder: Callable[[torch.device], Recorder] = CudaRecorder

    name = "cudagraph"
    fuses = True

    def lower(self, graph: Graph) -> Graph:
        return self.compiler.lower(graph)

    def private_parts(self) -> tuple[str, ...]:
        return self.compiler.private_parts()

    def compile(self, graph: Graph) -> Runner:
        from torch._inductor import config

        with config.patch({"triton.cudagraphs": False}):  # graphs of Inductor's own cannot be part of one
            return self.compiler.compile(graph)

    def launcher(self, device: torch.device) -> Launcher | None:
        return Launcher(self.recorder(device))
