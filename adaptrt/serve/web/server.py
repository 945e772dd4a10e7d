"""The server: uvicorn around the application, its signals and its log."""

from __future__ import annotations

import dataclasses
import ipaddress
import logging
import signal
import sys
import threading
from collections.abc import Callable
from types import FrameType

import uvicorn

from adaptrt.errors import AdaptrtError, InvalidArgument
from adaptrt.serve.web.app import Application
from adaptrt.serve.web.connections import Connection
from adaptrt.serve.web.limits import Limits
from adaptrt.serve.web.model import Built, Served, Stage
from adaptrt.serve.web.principals import Principals, Tokens, read_keys
from adaptrt.serve.web.telemetry import LOG, JSONLines


@dataclasses.dataclass(frozen=True, slots=True)
class Settings:
    """How a model is served.

    Attributes:
      name: of the model, in the addresses of the protocol.
      host, port: where to listen.
      keys: a file of keys, as `adaptrt key` writes it. SIGHUP has it read again.
      tokens: how JSON Web Tokens are checked, None to accept none.
      page: whether there is a page at `/`.
      open_health: whether health is told without a key.
      limits: what requests may ask for.
      max_state_bytes, max_steps: how large the state of a tenant, and how many inner steps, may be.
      max_connections: at the same time; others are answered 503.
      drain_s: how long requests under way may take once the server is told to end.
    """

    name: str = "model"
    host: str = "127.0.0.1"
    port: int = 8000
    keys: str | None = None
    tokens: Tokens | None = None
    page: bool = False
    open_health: bool = False
    limits: Limits = dataclasses.field(default_factory=Limits)
    max_state_bytes: int | None = None
    max_steps: int | None = None
    max_connections: int = 1024
    drain_s: int = 30

    @property
    def url(self) -> str:
        """Where the server is."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"http://{host}:{self.port}"


class Server(uvicorn.Server):
    """Serves a model until it is told to end, by `SIGTERM`, `SIGINT` or `stop`.

    Args:
      build: makes an engine; called again for each new version.
      settings: how to serve.
      ready: called when the model is.
    Raises:
      InvalidArgument: without keys or tokens it would listen to other machines, or the keys cannot be read.
    """

    def __init__(self, build: Callable[[], Built], settings: Settings, ready: Callable[[], object] = lambda: None) -> None:
        self.settings = settings
        self.failure: BaseException | None = None
        self.served = Served(settings.name, build, max_state_bytes=settings.max_state_bytes, max_steps=settings.max_steps)
        self.app = Application(
            self.served,
            _principals(settings),
            settings.limits,
            page=settings.page,
            open_health=settings.open_health,
            ready=ready,
            failed=self._failed,
        )
        config = uvicorn.Config(
            self.app,
            host=settings.host,
            port=settings.port,
            http=Connection,
            log_config=None,
            access_log=False,
            server_header=False,
            proxy_headers=False,
            ws="none",
            lifespan="on",
            limit_concurrency=settings.max_connections,
            timeout_graceful_shutdown=settings.drain_s,
        )
        super().__init__(config)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Drains at the first signal, and stops at a second SIGINT."""
        del frame
        self.served.stage = Stage.DRAINING
        if self.should_exit and sig == signal.SIGINT:
            self.force_exit = True
        else:
            self.stop()

    def stop(self) -> None:
        """Has it answer what is under way, and end. It may be called from any thread."""
        self.should_exit = True

    def run_until_stopped(self) -> None:
        """Serves.

        Raises:
          AdaptrtError: the model cannot be served.
        """
        can_handle = threading.current_thread() is threading.main_thread() and hasattr(signal, "SIGHUP")
        before = signal.signal(signal.SIGHUP, lambda *_: self._read_keys_again()) if can_handle else None
        try:
            self.run()
        except SystemExit:  # uvicorn's, if it cannot listen
            if self.started:
                raise
        finally:
            if can_handle:
                signal.signal(signal.SIGHUP, before)
        if self.failure is not None:
            raise self.failure
        if not self.started:
            raise InvalidArgument(
                f"{self.settings.host}:{self.settings.port} cannot be listened on; pass another --port, or end who has it"
            )

    def _failed(self, error: BaseException) -> None:
        self.failure = error if isinstance(error, Exception) else None
        self.stop()

    def _read_keys_again(self) -> None:
        try:
            self.app.principals = _principals(self.settings)
            LOG.info("keys were read again")
        except AdaptrtError as error:
            LOG.error("keys stay as they were", extra={"fields": {"message": str(error)}})


def log_to_stderr() -> None:
    """Has requests, and what uvicorn has to say, logged as lines of JSON on standard error."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JSONLines())
    for name, level in (("adaptrt.serve", logging.INFO), ("uvicorn", logging.WARNING)):
        logger = logging.getLogger(name)
        logger.handlers, logger.propagate = [handler], False
        logger.setLevel(level)


def _principals(settings: Settings) -> Principals:
    if settings.keys is None and settings.tokens is None:
        if not _is_loopback(settings.host):
            raise InvalidArgument(
                f"without keys anyone who reaches {settings.host} could read and change states; pass --keys, or listen on 127.0.0.1"
            )
        return Principals({}, asks=False)
    return Principals({} if settings.keys is None else read_keys(settings.keys), settings.tokens)


def _is_loopback(host: str) -> bool:
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
