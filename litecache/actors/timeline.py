"""The spans of a group's actors as events of Chrome's trace format, beside those of `ray timeline`.

Ray keeps events of threads that run a task; an engine's threads, and those that load and save, run
none. So actors keep their own (`spans.py`), where Ray was started with `RAY_PROFILING=1`, as for
Ray's.
"""

from __future__ import annotations

import contextlib
from typing import Any

import ray

from litecache.actors.calls import actor_names, find_actor, gather
from litecache.actors.naming import CALL_TIMEOUT_S, check_group_name, role_of
from litecache.errors import GroupError, GroupUnavailableError, LiteCacheError


def trace_events(group: str) -> list[dict[str, Any]]:
    """Ray's events of the cluster and the group's own; open them in chrome://tracing or Perfetto.

    An actor that does not answer is left out.

    Raises:
        GroupUnavailableError: there is no such group.
        GroupError: nothing is recorded.
    """
    check_group_name(group)
    actors = {}
    for name in actor_names(group):
        with contextlib.suppress(GroupUnavailableError):
            actors[name] = find_actor(name)
    if not actors:
        raise GroupUnavailableError(f"there is no group {group!r}")
    able = {name: actor for name, actor in actors.items() if not name.endswith(":coordinator")}
    answers = gather(able, lambda actor: actor.timeline.remote(), CALL_TIMEOUT_S, "timeline")
    told = {n: spans for n, spans in answers.items() if not isinstance(spans, LiteCacheError)}
    if all(spans is None for spans in told.values()):
        raise GroupError(
            f"group {group!r} records no timeline: export RAY_PROFILING=1 before `ray start`"
        )
    events: list[dict[str, Any]] = list(ray.timeline() or [])
    for name, spans in told.items():
        events += [
            {
                "cat": "litecache",
                "name": span.name,
                "ph": "X",
                "pid": f"litecache {group}",
                "tid": f"{role_of(name)} {span.thread}",
                "ts": span.begun_s * 1e6,
                "dur": span.seconds * 1e6,
                "args": span.figures,
            }
            for span in spans or ()
        ]
    return events
