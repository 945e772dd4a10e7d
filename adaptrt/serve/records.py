"""What a store keeps of a tenant, its form as bytes, and the time at which it was written."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import secrets
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from adaptrt import Adapted
from adaptrt.errors import InvalidArgument, InvalidState, InvalidType

MAX_NAME = 256
"""How many characters the name of a tenant may have."""

_FORMAT = 1
_DIGEST_BYTES = 32


def checked_tenant(tenant: Any) -> str:
    """Returns the name of a tenant after checking it.

    Raises:
      InvalidType: it is no string.
      InvalidArgument: it is empty, longer than 256 characters, or holds control characters or what UTF-8 cannot write.
    """
    if not isinstance(tenant, str):
        raise InvalidType(f"a tenant is named by a string, got {type(tenant).__name__}")
    if not 0 < len(tenant) <= MAX_NAME:
        raise InvalidArgument(f"the name of a tenant has 1 to {MAX_NAME} characters, got {len(tenant)}; pass a shorter id, or a hash of it")
    if not tenant.isprintable():
        raise InvalidArgument(f"the name of a tenant must hold printable characters only, got {tenant[:40]!r}; pass an id, or a hash of it")
    return tenant


def key_of(tenant: str) -> bytes:
    """Returns the key under which stores keep a tenant: a hash, so that no name can be part of another's key."""
    return hashlib.sha256(tenant.encode()).digest()


class Stamp(NamedTuple):
    """A moment, by the wall clock and by one that nobody sets.

    Attributes:
      wall_s: seconds since 1970, by a clock that may step.
      boot_id: what `boot_s` is counted from.
      boot_s: seconds since the machine was started, or another moment that does not change.
    """

    wall_s: float
    boot_id: str
    boot_s: float

    @staticmethod
    def now() -> Stamp:
        """Returns the present moment."""
        return Stamp(time.time(), _BOOT_ID, _seconds_since_boot())

    def age_s(self, now: Stamp) -> float:
        """Returns the seconds from this moment to `now`, at least 0.

        Where both are of one start of the machine the wall clock does not matter. Otherwise it is all there is.
        """
        passed = now.boot_s - self.boot_s if now.boot_id == self.boot_id else now.wall_s - self.wall_s
        return max(0.0, passed)


def _boot_id() -> str:
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return secrets.token_hex(16)  # the monotonic clock then counts for this process alone


_BOOT_ID = _boot_id()
_BOOT_CLOCK = getattr(time, "CLOCK_BOOTTIME", None)


def _seconds_since_boot() -> float:
    return time.monotonic() if _BOOT_CLOCK is None else time.clock_gettime(_BOOT_CLOCK)


class Shared:
    """The memory that the rows of one batch share.

    Args:
      num_rows: how many rows it has room for.

    Attributes:
      owners: the tenants whose rows a `MemoryStore` keeps in it.
    """

    __slots__ = ("num_rows", "owners")

    def __init__(self, num_rows: int) -> None:
        self.num_rows = num_rows
        self.owners: set[str] = set()


@dataclasses.dataclass(frozen=True, slots=True)
class Record:
    """The state of a tenant. It is immutable.

    Attributes:
      version: 1 or more; each commit of the tenant has the next. Stores compare it.
      state: what `Adapted.save` writes; or the adaptation itself, which only a store with `holds_live` takes.
      num_bytes: of the state, as it is bounded in memory.
      num_adaptations: how many there were since the tenant last started from the base, this one included.
      created: when the first of these was committed.
      updated: when this was committed.
      shared: the memory that an adaptation is a row of; None if its memory is its own.
      save: of an adaptation, turns it into bytes with the fingerprint of its base. An engine takes adaptations of its own base as they are.
    """

    version: int
    state: bytes | Adapted
    num_bytes: int
    num_adaptations: int
    created: Stamp
    updated: Stamp
    shared: Shared | None = None
    save: Callable[[Adapted], bytes] | None = None

    @staticmethod
    def of(version: int, state: bytes, now: Stamp | None = None) -> Record:
        """Returns the record of a state that was just adapted from the base."""
        moment = now or Stamp.now()
        return Record(version, state, len(state), 1, moment, moment)

    def to_bytes(self) -> bytes:
        """Returns the record with a digest of all of it, as stores write it.

        Raises:
          InvalidType: the state is an adaptation, not bytes.
        """
        if not isinstance(self.state, bytes):
            raise InvalidType(f"this store keeps bytes, as Adapted.save writes them, got a state of type {type(self.state).__name__}")
        header = json.dumps([_FORMAT, self.version, self.num_adaptations, self.created, self.updated]).encode()
        body = len(header).to_bytes(4, "little") + header + self.state
        return hashlib.sha256(body).digest() + body

    @staticmethod
    def from_bytes(data: bytes) -> Record:
        """Returns the record in what `to_bytes` returned.

        Raises:
          InvalidState: it is damaged, or of a newer format.
        """
        body = data[_DIGEST_BYTES:]
        if hashlib.sha256(body).digest() != data[:_DIGEST_BYTES]:
            raise InvalidState("the store's record of this tenant is damaged: its digest is not that of what it holds. Forget the tenant")
        end = 4 + int.from_bytes(body[:4], "little")
        header: Any = json.loads(body[4:end])
        if header[0] != _FORMAT:
            raise InvalidState(f"the store's record of this tenant is of format {header[0]}, this adaptrt reads {_FORMAT}; update adaptrt")
        _, version, num_adaptations, created, updated = header
        state = body[end:]
        return Record(version, state, len(state), num_adaptations, Stamp(*created), Stamp(*updated))
