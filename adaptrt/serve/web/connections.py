"""Connections: uvicorn's, with bounds on what comes before an application is asked: how long a request's headers are, and how slow."""

from __future__ import annotations

import asyncio
from typing import Any

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

MAX_HEADER_BYTES = 2**16
"""Of a request; of the trailers behind its body, too."""

HEADERS_S = 10.0
"""How long a connection may take for the headers of a request."""


class TooLong(Exception):
    """Headers are too long. The parser answers 400 to any exception."""


class Connection(HttpToolsProtocol):
    """A connection of httptools', which by itself keeps headers of any length, and waits for them for ever. No key is asked for there."""

    _slow: asyncio.TimerHandle | None = None
    _num_bytes = 0
    _num_header_bytes = 0

    def connection_made(self, transport: Any) -> None:
        """As in asyncio."""
        super().connection_made(transport)
        self._watch()

    def connection_lost(self, exc: Exception | None) -> None:
        """As in asyncio."""
        self._rest()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """As in asyncio."""
        self._num_bytes += len(data)
        super().data_received(data)
        if self.transport.is_closing():
            return
        if self._num_bytes > MAX_HEADER_BYTES + len(data):
            self.send_400_response("The headers are too long.")
        elif self.cycle is None or self.cycle.response_complete:
            self._watch()

    def on_message_begin(self) -> None:
        """As httptools has it."""
        self._num_header_bytes = 0
        super().on_message_begin()

    def on_header(self, name: bytes, value: bytes) -> None:
        """As httptools has it."""
        self._num_header_bytes += len(name) + len(value) + 32
        if self._num_header_bytes > MAX_HEADER_BYTES:
            raise TooLong
        super().on_header(name, value)

    def on_headers_complete(self) -> None:
        """As httptools has it."""
        self._num_bytes = 0
        self._rest()
        super().on_headers_complete()

    def on_body(self, body: bytes) -> None:
        """As httptools has it."""
        self._num_bytes = 0
        super().on_body(body)

    def on_response_complete(self) -> None:
        """As uvicorn has it: its own timer waits for the next request's first byte."""
        self._rest()
        super().on_response_complete()

    def _watch(self) -> None:
        if self._slow is None:
            self._slow = self.loop.call_later(HEADERS_S, self.transport.abort)

    def _rest(self) -> None:
        if self._slow is not None:
            self._slow.cancel()
            self._slow = None
