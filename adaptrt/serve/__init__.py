"""Adaptation as a service: an engine that many tenants share, and stores for their states. docs/serving.md shows how to use it."""

from adaptrt.serve.core import Lifecycle, Stats
from adaptrt.serve.engine import Engine
from adaptrt.serve.policies import History
from adaptrt.serve.records import Record
from adaptrt.serve.sizes import SizesTaken
from adaptrt.serve.stores import Change, MemoryStore, RedisStore, SQLiteStore, Store
from adaptrt.serve.sync import Sync
from adaptrt.serve.work import Outcome, Prediction

__all__ = [
    "Change",
    "Engine",
    "History",
    "Lifecycle",
    "MemoryStore",
    "Outcome",
    "Prediction",
    "Record",
    "RedisStore",
    "SQLiteStore",
    "SizesTaken",
    "Stats",
    "Store",
    "Sync",
]
