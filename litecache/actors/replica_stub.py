"""A replica's `submit`, `poll` and `abort`, as drivers make them.

A first token waits for a call there and back, and through Ray that costs milliseconds, so drivers
of the same machine use the replica's socket. When that breaks the next calls are the actor's own,
until `find_socket` has found another one.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from typing import Any

from ray.exceptions import RayError

from litecache.actors.calls import result
from litecache.actors.cluster import RayConnection
from litecache.actors.messages import ReplicaMethod, pack_call, unpack_reply, unpack_value
from litecache.actors.naming import CALL_TIMEOUT_S
from litecache.actors.stub import Answer, Stub
from litecache.errors import GroupUnavailableError, LiteCacheError
from litecache.types import PollReply, Request

logger = logging.getLogger(__name__)

_RETRY_S = 1.0


class ReplicaStub(Stub):
    """Calls of one replica, thread-safe but for `find_socket`.

    Args:
        handle: the `GpuCache` actor.
        name: of the replica, for messages.

    Every method but `abort` raises GroupError when the handle is of no use here any more; see
    `RayConnection.check`.
    """

    def __init__(self, handle: Any, name: str) -> None:
        super().__init__(handle, name)
        self._connection = RayConnection.current()
        self._tried_at = 0.0

    def find_socket(self) -> None:
        """Look for the replica's socket, at most once a second, unless there is one in use."""
        self._connection.check()
        if self.channel is not None or time.monotonic() < self._tried_at + _RETRY_S:
            return
        self._tried_at = time.monotonic()
        try:
            where = result(self._handle.where.remote(), CALL_TIMEOUT_S, f"{self._name}: where")
            self.connect(where["address"])
        except (LiteCacheError, RayError) as error:
            logger.info("%s is called through Ray: %s", self._name, error)

    def submit(self, client_id: str, requests: Sequence[Request]) -> Answer[str]:
        """Begin `GpuCache.submit`."""
        message = pack_call(client_id, requests=requests)
        return self._ask_either_way(ReplicaMethod.SUBMIT, message, unpack_value)

    def poll(self, *arguments: Any, requests: Sequence[Request]) -> Answer[PollReply]:
        """Begin `GpuCache.poll`."""
        message = pack_call(*arguments, requests=requests)
        return self._ask_either_way(ReplicaMethod.POLL, message, unpack_reply)

    def abort(self, wire_ids: Sequence[str]) -> None:
        """Begin `GpuCache.abort`; nobody waits for it."""
        try:
            self._connection.check()
            self._handle.abort.remote(wire_ids)
        except (LiteCacheError, RayError) as error:
            logger.info("%s was not told to abort requests: %s", self._name, error)

    def _ask_either_way(
        self, method: ReplicaMethod, message: bytes, decode: Callable[[bytes], Any]
    ) -> Answer[Any]:
        self._connection.check()
        try:
            return self.ask(method, message, decode)
        except GroupUnavailableError:
            # Ray knows what became of the actor
            self.disconnect()
            return self.ask(method, message, decode)
