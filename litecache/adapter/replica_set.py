"""The replicas of a group as one driver sees them: which one takes a request, and its poller."""

from __future__ import annotations

import logging
import os
import threading

from litecache.actors.group import Group
from litecache.actors.naming import replica_name
from litecache.adapter.pending import PendingRequest
from litecache.adapter.poller import ReplicaPoller
from litecache.errors import LiteCacheError
from litecache.hashing import chain_keys
from litecache.types import Request

logger = logging.getLogger(__name__)


class ReplicaSet:
    """Pollers of all replicas.

    Args:
        group: the actors.
        client_id: names this driver.

    Attributes:
        pollers: one per replica, in the group's order.
    """

    def __init__(self, group: Group, client_id: str) -> None:
        self._group = group
        # While a request moves no poller has it, so an abort waits.
        self._moving = threading.RLock()
        move = self._move if len(group.replicas) > 1 else None
        self.pollers = [
            ReplicaPoller(handle, client_id, replica_name(group.spec.group, index), move=move)
            for index, handle in enumerate(group.replicas)
        ]

    def submit(self, rows: list[PendingRequest]) -> None:
        """Start requests, all or none, each on the replica that holds most of its prefix."""
        by_replica: dict[int, list[PendingRequest]] = {}
        for row in rows:
            by_replica.setdefault(self.route(row.request), []).append(row)
        try:
            for index, group in by_replica.items():
                self.pollers[index].submit(group)
        except BaseException:
            for row in rows:
                self.abort(row.request_id)
            raise

    def abort(self, request_id: str) -> None:
        """End a request; an unknown one is passed over, and so are all in a forked process."""
        if os.getpid() != self._group.connection.pid:
            return
        with self._moving:
            for poller in self.pollers:
                poller.abort(request_id)

    def _move(self, silent: ReplicaPoller) -> None:
        """Go on elsewhere with the requests of a replica that does not answer."""
        with self._moving:
            for row in silent.give_up(len(self.pollers)):
                others = [poller for poller in self.pollers if poller.name not in row.tried]
                target = min(others, key=lambda p: (p.silent_since is not None, p.load))
                logger.warning(
                    "%s does not answer: %s goes on with its request", silent.name, target.name
                )
                try:
                    target.submit([row])
                except LiteCacheError as error:
                    row.fail(error)

    def route(self, request: Request) -> int:
        """The coordinator's choice; without it the replica with the fewest open requests."""
        if len(self.pollers) == 1:
            return 0
        info = self._group.info
        keys = chain_keys(info.roots(request.cache_salt)[0], request.prompt.array, info.block_size)
        try:
            index = self._group.coordinator.route(keys)
        except LiteCacheError as error:
            logger.info("routed without the coordinator: %s", error)
            index = None
        if index is None or self._is_silent(index):
            # of those that answer, if any does
            order = range(len(self.pollers))
            index = min(order, key=lambda i: (self._is_silent(i), self.pollers[i].load))
        return index

    def _is_silent(self, index: int) -> bool:
        return index >= len(self.pollers) or self.pollers[index].silent_since is not None
