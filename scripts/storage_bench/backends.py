"""The shard under test: a Ray actor as in a real group, or a store of this process."""

from __future__ import annotations

import os
from typing import Any, Protocol

from litecache.storage import FlushReport, LocalShardClient, ShardStore, SlotRef
from litecache.storage.client import ShardClient

# Ray starts actors with niceness 15; on a busy machine that would compare priorities.
os.environ.setdefault("RAY_worker_niceness", "0")

CALL_S = 120.0
GROUP = "bench-storage"


class WaitingClient(ShardClient, Protocol):
    """What both clients have beyond `ShardClient`."""

    def wait(self, slots: list[SlotRef], timeout_s: float = ...) -> list[bool]:
        """Sleep until leased slots have stopped loading."""
        ...

    def close(self) -> None:
        """Detach."""
        ...


class Backend(Protocol):
    """One shard and one client of it."""

    client: WaitingClient

    def clear_ram(self) -> None:
        """Empty the RAM tier."""
        ...

    def stats(self) -> dict[str, Any]:
        """`ShardStore.stats`."""
        ...

    def close(self) -> None:
        """End the client and the shard."""
        ...


class InProcess:
    """A `ShardStore` of this process, without Ray."""

    name = "in-process client"

    def __init__(self, options: dict[str, Any]) -> None:
        self._store = ShardStore(**options)
        self.client = LocalShardClient(self._store)

    def clear_ram(self) -> None:
        self._store.clear("ram")

    def stats(self) -> dict[str, Any]:
        return self._store.stats()

    def close(self) -> None:
        self.client.close()
        self._store.close()


class Actor:
    """A `StorageShard` actor and the client that engines use, beside a coordinator."""

    name = "shard actor"

    def __init__(self, options: dict[str, Any]) -> None:
        import ray

        from litecache.actors.calls import result
        from litecache.actors.shard_client import RayShardClient
        from litecache.actors.storage_shard import StorageShard

        start_ray()
        self._ray, self._result = ray, result
        made = ray.remote(concurrency_groups={"bulk": 4})(StorageShard)
        self._handle = made.options(num_cpus=0, max_concurrency=8).remote(GROUP, 0, options)
        result(self._handle.info.remote(), CALL_S, "starting the shard")
        self.client = RayShardClient(self._handle, "bench", timeout_s=CALL_S)

    def clear_ram(self) -> None:
        self._result(self._handle.clear.remote("ram"), CALL_S, "clear")

    def stats(self) -> dict[str, Any]:
        found: dict[str, Any] = self._result(self._handle.stats.remote(), CALL_S, "stats")["store"]
        return found

    def close(self) -> None:
        self.client.close()
        self._result(self._handle.stop.remote(CALL_S), CALL_S, "stop")
        self._ray.kill(self._handle)


def start_ray() -> None:
    """A Ray of this process's own, with a coordinator as a group has one; once."""
    import ray

    if ray.is_initialized():
        return
    from litecache.actors.coordinator import Coordinator
    from litecache.actors.naming import NAMESPACE, coordinator_name

    ray.init(
        address="local",
        num_cpus=2,
        include_dashboard=False,
        log_to_driver=False,
        logging_level="error",
        object_store_memory=128 << 20,
    )
    name = coordinator_name(GROUP)
    # kept alive by its name
    ray.remote(Coordinator).options(
        num_cpus=0, name=name, namespace=NAMESPACE, lifetime="detached"
    ).remote(GROUP, {})


def flushed(client: ShardClient, timeout_s: float = CALL_S) -> FlushReport:
    """Flush, and check that all of it reached the disk."""
    report = client.flush(timeout_s)
    if report.pending or not report.complete:
        raise RuntimeError(f"a flush did not complete: {report}")
    return report
