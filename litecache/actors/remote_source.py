"""Blocks of other nodes: where they are, and their bytes.

The engine asks here for what no local shard has. Without shards on other nodes it answers at once;
any failure is a miss.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

import ray

from litecache.actors.calls import result
from litecache.actors.coordinator import CoordinatorClient
from litecache.actors.naming import NAMESPACE
from litecache.errors import GroupUnavailableError, LiteCacheError
from litecache.hashing import BlockKey
from litecache.metrics import Metrics

logger = logging.getLogger(__name__)

FETCH_TIMEOUT_S = 10.0


class CoordinatedSource:
    """`RemoteSource` of the engine: locations by the coordinator, bytes by the other node's shard.

    Attributes:
        remote_shards: live shards on other nodes, as the last report said.
    """

    def __init__(
        self, group: str, node_id: str, coordinator: CoordinatorClient, metrics: Metrics
    ) -> None:
        self._group, self._node_id = group, node_id
        self._coordinator = coordinator
        self._metrics = metrics
        self._handles: dict[str, Any] = {}
        self.remote_shards = 0

    def locate(self, keys: Sequence[BlockKey]) -> list[str | None]:
        """For each key the id of a shard on another node that holds it, or None."""
        nothing: list[str | None] = [None] * len(keys)
        if not keys or not self.remote_shards:
            return nothing
        try:
            return self._coordinator.locate(keys, self._node_id)
        except LiteCacheError as error:
            logger.info("no locations: %s", error)
            self._metrics.inc("litecache_misses", tier="remote", reason="coordinator_unavailable")
            return nothing

    def fetch(self, shard_id: str, keys: Sequence[BlockKey]) -> list[bytes | None]:
        """Bytes of blocks from one shard of another node, None where it has them no more."""
        try:
            ref = self._handle(shard_id).fetch.remote(list(keys))
            blocks: list[bytes | None] = result(ref, FETCH_TIMEOUT_S, f"{shard_id}: fetch")
            return blocks
        except LiteCacheError as error:
            logger.info("nothing fetched: %s", error)
            self._handles.pop(shard_id, None)
            self._metrics.inc("litecache_misses", tier="remote", reason="fetch_failed")
            return [None] * len(keys)

    def _handle(self, shard_id: str) -> Any:
        handle = self._handles.get(shard_id)
        if handle is None:
            name = f"litecache:{self._group}:shard:{shard_id}"
            try:
                handle = self._handles[shard_id] = ray.get_actor(name, NAMESPACE)
            except ValueError as error:
                raise GroupUnavailableError(f"there is no actor {name}") from error
        return handle
