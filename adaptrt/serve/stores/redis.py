"""A store in Redis or Valkey, which several machines share."""

from __future__ import annotations

import secrets
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from adaptrt.errors import InvalidArgument, StoreUnavailable
from adaptrt.serve.records import Record, checked_tenant, key_of
from adaptrt.serve.stores.base import Change, Store, checked_ttl

# A commit whose answer was lost is sent again by the client: what is there already is then the record offered, and counts as committed.
_COMMIT = """
local found = redis.call('HMGET', KEYS[1], 'version', 'record')
if found[2] == ARGV[3] then return 1 end
if (found[1] or '0') ~= ARGV[1] then return 0 end
redis.call('HSET', KEYS[1], 'version', ARGV[2], 'record', ARGV[3])
if ARGV[4] == '0' then redis.call('PERSIST', KEYS[1]) else redis.call('PEXPIRE', KEYS[1], ARGV[4]) end
return 1
"""
_NONCE_BYTES = 16


class RedisStore(Store):
    """Keeps records in a server. Comparing and replacing is one script, so engines on several machines can share it.

    Whether an acknowledged commit survives a crash of the server is up to its settings (`appendfsync always`). Names of tenants are
    not sent, only hashes of them.

    Args:
      url: of the server, as `redis.from_url` takes it, such as "redis://localhost:6379/0" or "unix:///run/valkey.sock".
      ttl_s: how many seconds a record lives after its last commit, None without limit. The server's clock counts.
      prefix: what all keys begin with.
      timeout_s: how long to wait for an answer.
    Raises:
      InvalidArgument: the package redis is not installed, or the URL or the prefix is none.
    """

    def __init__(self, url: str, ttl_s: float | None = None, *, prefix: str = "adaptrt", timeout_s: float = 1.0) -> None:
        try:
            import redis
        except ImportError as error:
            raise InvalidArgument("RedisStore needs the package redis; pip install 'adaptrt[redis]'") from error
        self.ttl_s = checked_ttl(ttl_s)
        if not isinstance(prefix, str) or not prefix or not prefix.isprintable():
            raise InvalidArgument(f"prefix must be a string of printable characters, got {prefix!r}")
        self._redis_error = redis.RedisError
        self._ttl_ms = 0 if self.ttl_s is None else max(1, round(1000 * self.ttl_s))
        self._prefix = prefix.encode()
        try:
            self._client: Any = redis.from_url(url, socket_timeout=timeout_s, socket_connect_timeout=timeout_s)
        except (ValueError, TypeError, AttributeError) as error:
            raise InvalidArgument(f"{url!r} is no URL of a server, such as 'redis://localhost:6379/0': {error}") from error

    def get(self, tenant: str) -> Record | None:
        """As `Store.get`."""
        key = self._key(tenant)
        with self._errors():
            data = self._client.hget(key, "record")
        return None if data is None else Record.from_bytes(data[_NONCE_BYTES:])

    def commit(self, tenant: str, expected_version: int, record: Record) -> bool:
        """As `Store.commit`."""
        return self.commit_all([Change(tenant, expected_version, record)])[0]

    def commit_all(self, changes: Sequence[Change]) -> list[bool]:
        """As `Store.commit_all`, in one message to the server."""
        with self._errors():
            pipeline = self._client.pipeline(transaction=False)
            for tenant, expected_version, record in changes:
                data = secrets.token_bytes(_NONCE_BYTES) + record.to_bytes()
                pipeline.eval(_COMMIT, 1, self._key(tenant), expected_version, record.version, data, self._ttl_ms)
            return [bool(found) for found in pipeline.execute()]

    def delete(self, tenant: str) -> bool:
        """As `Store.delete`."""
        key = self._key(tenant)
        with self._errors():
            return bool(self._client.delete(key))

    def close(self) -> None:
        """Closes the connections."""
        with self._errors():
            self._client.close()

    def _key(self, tenant: str) -> bytes:
        return self._prefix + b":" + key_of(checked_tenant(tenant)).hex().encode()

    @contextmanager
    def _errors(self) -> Iterator[None]:
        try:
            yield
        except (self._redis_error, OSError) as error:
            raise StoreUnavailable(f"the server of the store does not answer: {error}") from error
