"""The engine from code without an event loop: one runs on a thread of its own, or is the one that the engine was started on."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Coroutine, Sequence
from typing import Any, Protocol, TypeVar

from adaptrt.errors import NotServing
from adaptrt.serve.work import Outcome, Prediction

Result = TypeVar("Result")


class Serving(Protocol):
    """An engine, as `Engine` documents it."""

    @property
    def loop(self) -> asyncio.AbstractEventLoop | None: ...
    async def start(self) -> None: ...
    async def adapt(self, tenant: str, support: Any, deadline_s: float | None = None) -> Outcome: ...
    async def adapt_all(self, requests: Sequence[tuple[str, Any]], deadline_s: float | None = None) -> list[Outcome | Exception]: ...
    async def predict(self, tenant: str, inputs: Any, deadline_s: float | None = None) -> Any: ...
    async def adapt_predict(self, support: Any, inputs: Any, deadline_s: float | None = None) -> Prediction: ...
    async def forget(self, tenant: str) -> bool: ...
    async def drain(self) -> None: ...


class Sync:
    """The methods of an engine, which wait for their results. Any thread may call them, but not one whose event loop the engine runs on.

    `with engine.sync as engine:` starts the engine on a thread of its own, and drains it at the end.

    Args:
      engine: whose methods they are.

    Example:
      >>> import torch
      >>> from adaptrt import compile_unroll, optim
      >>> from adaptrt.serve import Engine
      >>> unroll = compile_unroll(torch.nn.Linear(3, 2), optim.sgd(lr=0.1), k=2, backend="eager")
      >>> support, inputs = (torch.randn(6, 3), torch.randint(2, (6,))), torch.randn(4, 3)
      >>> with Engine(unroll, (support, inputs), lanes=(1, 2)).sync as engine:
      ...     engine.adapt("ann", support).kept, engine.predict("ann", inputs).shape
      (True, torch.Size([4, 2]))
    """

    def __init__(self, engine: Serving) -> None:
        self._engine = engine
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread: threading.Thread | None = None

    def __enter__(self) -> Sync:
        self.start()
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.drain()

    def start(self) -> None:
        """As `Engine.start`, on the event loop of a thread of its own."""
        if self._engine.loop is not None:
            raise NotServing("the engine was started already; its sync methods can be called from threads without that event loop")
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="adaptrt-loop", daemon=True)
        self._thread.start()
        try:
            self._wait(self._engine.start())
        except BaseException:
            self._end()
            raise

    def adapt(self, tenant: str, support: Any, deadline_s: float | None = None) -> Outcome:
        """As `Engine.adapt`."""
        return self._wait(self._engine.adapt(tenant, support, deadline_s))

    def adapt_all(self, requests: Sequence[tuple[str, Any]], deadline_s: float | None = None) -> list[Outcome | Exception]:
        """As `Engine.adapt_all`."""
        return self._wait(self._engine.adapt_all(requests, deadline_s))

    def predict(self, tenant: str, inputs: Any, deadline_s: float | None = None) -> Any:
        """As `Engine.predict`."""
        return self._wait(self._engine.predict(tenant, inputs, deadline_s))

    def adapt_predict(self, support: Any, inputs: Any, deadline_s: float | None = None) -> Prediction:
        """As `Engine.adapt_predict`."""
        return self._wait(self._engine.adapt_predict(support, inputs, deadline_s))

    def forget(self, tenant: str) -> bool:
        """As `Engine.forget`."""
        return self._wait(self._engine.forget(tenant))

    def drain(self) -> None:
        """As `Engine.drain`; ends the thread that `start` made."""
        if self._engine.loop is None:
            return
        try:
            self._wait(self._engine.drain())
        finally:
            self._end()

    def _wait(self, call: Coroutine[Any, Any, Result]) -> Result:
        loop = self._engine.loop or self._loop
        error = None
        if loop is None or not loop.is_running():
            error = NotServing("the engine is not started, or its event loop has ended; call engine.sync.start() first")
        elif loop is _running_loop():
            error = NotServing("the engine runs on this thread's event loop, which a sync call would stop; await the engine's own methods")
        if loop is None or error is not None:
            call.close()
            raise error or NotServing("the engine is not started")
        return asyncio.run_coroutine_threadsafe(call, loop).result()

    def _end(self) -> None:
        if self._loop is not None and self._thread is not None:
            self._loop.call_soon_threadsafe(self._loop.stop)
            self._thread.join()
            self._loop.close()
            self._loop = self._thread = None


def _running_loop() -> asyncio.AbstractEventLoop | None:
    try:
        return asyncio.get_running_loop()
    except RuntimeError:
        return None
