"""Bodies of requests: read piece by piece, and never more of them than the server is to hold."""

from __future__ import annotations

import asyncio
import zlib
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

from adaptrt.serve.web.errors import HTTPError, Invalid

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]

# How zlib is told the form: gzip's header, or zlib's, which HTTP calls deflate.
_ENCODINGS = {"gzip": 16 + zlib.MAX_WBITS, "deflate": zlib.MAX_WBITS}


class ClientGone(Exception):
    """The client has closed the connection, and waits for no answer."""


async def read(receive: Receive, headers: dict[str, str], max_bytes: int, timeout_s: float) -> bytearray:
    """Reads the body of a request, and unpacks it if it is packed.

    Args:
      receive: of the ASGI server.
      headers: of the request, names in lower case.
      max_bytes: how long it may be, packed or not.
      timeout_s: how long it may take.
    Raises:
      HTTPError: 413, 415 or 408: it is too long, packed in another way, or too slow.
      Invalid: it is not what its headers say.
      ClientGone: the client left.
    """
    encoding = headers.get("content-encoding", "identity").strip().lower()
    if encoding not in ("identity", "", *_ENCODINGS):
        raise HTTPError(415, f"this Content-Encoding is not read; send gzip, deflate or none. Got {encoding[:40]!r}")
    declared = headers.get("content-length", "")
    if declared.isascii() and declared.isdigit() and (len(declared) > 18 or int(declared) > max_bytes):
        raise _too_long(max_bytes)
    try:
        async with asyncio.timeout(timeout_s):
            return await _read(receive, _ENCODINGS.get(encoding), max_bytes)
    except TimeoutError:
        raise HTTPError(408, f"the body took longer than {timeout_s:g} s; send it faster, or less of it", {"Connection": "close"}) from None


async def _read(receive: Receive, window: int | None, max_bytes: int) -> bytearray:
    body = bytearray()
    unpack = None if window is None else zlib.decompressobj(window)
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise ClientGone
        part = message.get("body", b"")
        if unpack is None:
            body += part
        elif part:
            if unpack.eof:
                raise Invalid("the body goes on behind its packed data")
            try:
                body += unpack.decompress(part, max_bytes + 1 - len(body))
            except zlib.error:
                raise Invalid("the body is not packed as its Content-Encoding says") from None
        if len(body) > max_bytes or (unpack is not None and unpack.unconsumed_tail):
            raise _too_long(max_bytes)
        if not message.get("more_body", False):
            break
    if unpack is not None and (not unpack.eof or unpack.unused_data):
        raise Invalid("the packed body is not complete, or goes on behind its end")
    return body


def _too_long(max_bytes: int) -> HTTPError:
    message = f"the body is longer than {max_bytes:,} bytes; send fewer examples, or tensors as binary data"
    return HTTPError(413, message, {"Connection": "close"})
