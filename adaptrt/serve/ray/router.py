"""Which replica a request goes to: always the same one for a tenant. This file is the only one that imports ray when it is imported."""

from __future__ import annotations

from typing import Any

from ray.serve.experimental.consistent_hash_router import ConsistentHashRouter  # pyright: ignore[reportMissingImports]


class OneReplicaPerTenant(ConsistentHashRouter):
    """Ray's router by consistent hashing with the tenant's name as the key, and without its way round a busy replica.

    Ray's own sends requests on to the next replica when one is busy. Two replicas would then adapt one tenant at the same time, meet in the
    store, and compute again. Here requests wait, but go to the next living replica at once when theirs is dead.
    """

    def initialize_state(self, **kwargs: Any) -> None:
        """As Ray's; replicas that may be tried where others are dead."""
        super().initialize_state(**{"num_fallback_replicas": 8, **kwargs})

    async def choose_replicas(self, candidate_replicas: Any, pending_request: Any = None) -> Any:
        """Returns the first living replica from the tenant's place on the ring."""
        if pending_request is not None and not pending_request.metadata.session_id:
            tenant = pending_request.args[0] if pending_request.args else pending_request.kwargs.get("tenant")
            if isinstance(tenant, str):  # the replica refuses what is none, and `ascii` writes what UTF-8 cannot
                pending_request.metadata.session_id = ascii(tenant)
        return (await super().choose_replicas(candidate_replicas, pending_request))[:1]
