"""Stores of tenants' states: in memory, in a file, in a server."""

from adaptrt.serve.stores.base import Change, Store
from adaptrt.serve.stores.memory import MemoryStore
from adaptrt.serve.stores.redis import RedisStore
from adaptrt.serve.stores.sqlite import SQLiteStore

__all__ = ["Change", "MemoryStore", "RedisStore", "SQLiteStore", "Store"]
