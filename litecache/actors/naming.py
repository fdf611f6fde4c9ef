"""Names, namespace and deadlines that all actors of a group share.

A name says what an actor is and finds it again after a restart, from any process of the cluster.
"""

from __future__ import annotations

import re

from litecache.errors import ConfigError

NAMESPACE = "litecache"
DEFAULT_GROUP = "default"

# The control path: any call that takes longer counts as failed.
CALL_TIMEOUT_S = 2.0
# How long a request waits for another replica to save what it would find there; computing it in the
# meantime takes about as long.
OFFER_PATIENCE_S = 0.5
# How long a poll is held open when there is nothing to tell; far below the heartbeat's limit.
POLL_HOLD_S = 2.0
# The least time between two replies to one client, except for first and last tokens, which never
# wait: a reply costs the engine's process more than a small model's step.
STREAM_GAP_S = 0.01
BATCH_GAP_S = 0.05
# How long requests of a replica that is to go may take to end.
DRAIN_TIMEOUT_S = 60.0
# How often shards and replicas report to the coordinator when nothing changes.
REPORT_INTERVAL_S = 2.0
# Silence after which the coordinator takes a member for dead.
MEMBER_TIMEOUT_S = 7.0


def check_group_name(group: str) -> str:
    """A group's name, as it appears in actor names.

    Raises:
        ConfigError: it has other characters than letters, digits, dots, dashes and underscores.
    """
    if not isinstance(group, str) or not re.fullmatch(r"[A-Za-z0-9._-]{1,64}", group):
        raise ConfigError("group", group, "1 to 64 letters, digits, dots, dashes or underscores")
    return group


def role_of(name: str) -> str:
    """What an actor is in its group: `gpu:0` of `litecache:default:gpu:0`."""
    return name.split(":", 2)[-1]


def coordinator_name(group: str) -> str:
    """Actor name of a group's coordinator."""
    return f"litecache:{group}:coordinator"


def replica_name(group: str, index: int) -> str:
    """Actor name of a group's `GpuCache` number `index`."""
    return f"litecache:{group}:gpu:{index}"


def replica_index(name: str) -> int:
    """The inverse of `replica_name`."""
    return int(name.rpartition(":")[2])


def shard_name(group: str, node_id: str, index: int) -> str:
    """Actor name of shard `index` of a node, told apart by the first 8 digits of the node's id."""
    return f"litecache:{group}:shard:{node_id[:8]}:{index}"
