"""The engine on several machines: a deployment of Ray Serve, whose replicas hold an engine each and share a store.

Ray starts replicas, watches them, queues requests and refuses those that are too many. Nothing imports ray before `deployment` is called.
docs/serving.md shows how to use it, and says what is promised.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from adaptrt.errors import InvalidArgument, InvalidType
from adaptrt.serve import Store
from adaptrt.serve.ray.replica import BuildEngine, Replica, ReplicaStats

__all__ = ["BuildEngine", "Replica", "ReplicaStats", "deployment"]


def deployment(
    build_engine: BuildEngine,
    open_store: Callable[[], Store],
    *,
    num_replicas: int | str | None = 2,
    config: Mapping[str, Any] | None = None,
    reread: bool = True,
    device: str = "cpu",
    max_ongoing_requests: int = 64,
    max_queued_requests: int = 1024,
    **options: Any,
) -> Any:
    """Returns an application of Ray Serve whose replicas serve tenants. `ray.serve.run` runs it and returns its handle.

    The handle has the methods of `Replica`: `await handle.adapt.remote("ann", support)`. All requests of a tenant go to one replica, chosen
    by consistent hashing, as long as the replicas stay the same. When that one dies they go to another, which reads the tenant's state.

    Both functions are called in the process of each replica, which must be able to import what they need.

    Args:
      build_engine: `(store, config) -> Engine`. The engine is not to be started. Threads of PyTorch are set here.
      open_store: opens what all replicas share: a `RedisStore`, or on one machine a `SQLiteStore`.
      num_replicas: as for Ray; None with `autoscaling_config=`.
      config: what `build_engine` gets as a dict, Ray's `user_config`. It is of what JSON can write. A new one that reaches a replica while
        it runs makes it warm another engine, send requests there, and drain the one before.
      reread: whether the store is asked whenever a tenant that has no open requests gets one. A replica then sees what others committed.
        Otherwise predictions may be of an old state after tenants have moved, but go on with it when the store does not answer.
      device: of the engine's model; data are moved there.
      max_ongoing_requests: how many requests a replica has at a time, of which the engine makes batches.
      max_queued_requests: how many more may wait in one handle. Beyond that it raises `ray.serve.exceptions.BackPressureError`.
      options: of `ray.serve.deployment`, such as `name`, `ray_actor_options`, `health_check_period_s`, `graceful_shutdown_timeout_s`.
    Raises:
      ImportError: the package ray is not installed.
      InvalidType, InvalidArgument: an argument is not as above.
    """
    for name, function in (("build_engine", build_engine), ("open_store", open_store)):
        if not callable(function):
            raise InvalidType(f"{name} must be a function that each replica calls, got {type(function).__name__}")
    if config is not None and not isinstance(config, Mapping):
        raise InvalidType(f"config must be a dict, which build_engine gets, got {type(config).__name__}")
    for name in ("user_config", "request_router_config"):
        if name in options:
            raise InvalidArgument(f"{name} is what adaptrt.serve.ray sets itself; pass config= for what build_engine is to know")
    try:
        from ray import serve  # pyright: ignore[reportMissingImports, reportAttributeAccessIssue]

        from adaptrt.serve.ray import router
    except ImportError as error:
        raise ImportError("adaptrt.serve.ray needs the package ray with Ray Serve; pip install 'adaptrt[ray]'") from error
    wrapped: Any = serve.deployment(
        Replica,
        num_replicas=num_replicas,
        user_config=dict(config or {}),
        max_ongoing_requests=max_ongoing_requests,
        max_queued_requests=max_queued_requests,
        request_router_config={"request_router_class": router.OneReplicaPerTenant},
        **{"name": "adaptrt", **options},
    )
    return wrapped.bind(build_engine, open_store, reread, device)
