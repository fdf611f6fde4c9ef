"""A group looked at from outside, whatever state its actors are in: for `status`, `top`, `doctor`.

Actors are found by name at every look, so those that come and go are seen to; none has to answer
for the others to be shown. Nothing here keeps a group alive, starts it or waits for it.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from litecache.actors.calls import (
    UNREACHABLE,
    ActorEndedError,
    ReplicaLeftError,
    actor_names,
    find_actor,
    first_ended,
    result,
)
from litecache.actors.coordinator import CoordinatorClient
from litecache.actors.found_groups import no_group
from litecache.actors.group import Group
from litecache.actors.group_spec import ACTOR_KINDS, GroupSpec
from litecache.actors.naming import CALL_TIMEOUT_S, check_group_name, coordinator_name
from litecache.errors import GroupUnavailableError, LiteCacheError, RequestTimeout

# So long an actor that is no longer there is still shown.
GONE_S = 30.0


class ActorView(NamedTuple):
    """What was seen of an actor.

    Attributes:
        state: "up"; "busy" (it is there, but has not told its figures in time: a replica tells
            them between two steps); "loading" (its model); "silent" (no answer in time);
            "restarting" (its process is gone, Ray makes another); "failed" (it says why); "gone".
        stats: what it told of itself, at this look; None where it did not.
        answer_s: until it said that it is there; None where it did not.
        error: why there are no figures, or "".
    """

    state: str
    stats: Mapping[str, Any] | None = None
    answer_s: float | None = None
    error: str = ""


@dataclass
class _Asked:
    """An actor, and the calls to it that have not been answered yet."""

    handle: Any
    alive: Any = None
    stats: Any = None
    since_s: float = 0.0


class GroupWatch:
    """Looks at one group again and again.

    An actor that has not answered is not asked anew: its answer is waited for with the next look,
    so that one that hangs for an hour finds a single question when it runs on.

    Args:
        group: its name.
    """

    def __init__(self, group: str) -> None:
        self.group = check_group_name(group)
        self._asked: dict[str, _Asked] = {}
        self._listed_s: dict[str, float] = {}

    def look(self, timeout_s: float = CALL_TIMEOUT_S) -> dict[str, ActorView]:
        """Every actor of the group by name, those of earlier looks included, after at most so long.

        Raises:
            GroupUnavailableError: there is no such group, and there was none before.
        """
        begun = time.monotonic()
        names = actor_names(self.group)
        self._listed_s.update(dict.fromkeys(names, begun))
        for name in [name for name, at in self._listed_s.items() if at < begun - GONE_S]:
            del self._listed_s[name]
            self._asked.pop(name, None)
        if not self._listed_s:
            raise no_group(self.group, "join")
        views = {name: ActorView("gone", error="it is gone") for name in self._listed_s}
        for name in names:
            try:
                self._ask(name)
            except UNREACHABLE as error:  # it went in this moment, or Ray does not say
                views[name] = ActorView("gone", error=str(error))
        asked = {name: self._asked[name] for name in names if name in self._asked}
        refs = [ref for each in asked.values() for ref in (each.alive, each.stats)]
        ended = first_ended(refs, begun + timeout_s)
        for name, each in asked.items():
            views[name] = self._view(name, each, ended)
        return dict(sorted(views.items(), key=lambda item: _place(item[0])))

    def model(self, views: Mapping[str, ActorView]) -> str | None:
        """Short name of the group's model; None where its coordinator does not tell it.

        Raises:
            GroupMismatchError: the group is of another version.
        """
        view = views.get(coordinator_name(self.group))
        if view is None or view.state != "up":
            return None
        spec = self.spec()
        return spec.source.short_name if spec is not None else None

    def spec(self) -> GroupSpec | None:
        """The group's settings; None where its coordinator does not tell them.

        Raises:
            GroupMismatchError: the group is of another version.
        """
        try:
            described = CoordinatorClient(self.group).call("describe")
        except UNREACHABLE:
            return None
        return GroupSpec.from_description(self.group, described)

    def join(self, timeout_s: float = CALL_TIMEOUT_S) -> tuple[Group, dict[str, str]]:
        """Those of the group's actors that are there now, and why the others are not.

        Raises:
            GroupUnavailableError: there is no such group, or neither its coordinator nor a replica
                answers.
            GroupMismatchError: it is of another version.
        """
        views = self.look(timeout_s)
        spec = self.spec()
        if spec is None:
            raise GroupUnavailableError(
                f"the coordinator of group {self.group!r} does not answer: Ray restarts it where "
                "its process has ended; `litecache status` tells"
            )
        joined = Group(spec)
        usable = [name for name, view in views.items() if view.state in ("up", "busy")]
        joined.actors = {name: self._asked[name].handle for name in usable}
        missing = {name: v.error or v.state for name, v in views.items() if name not in usable}
        if not joined.replicas:
            reasons = "; ".join(missing.values()) or "there is none"
            raise GroupUnavailableError(f"no replica of group {self.group!r} answers: {reasons}")
        joined.info = result(joined.replicas[0].info.remote(), timeout_s, "info")
        return joined, missing

    def _ask(self, name: str) -> None:
        each = self._asked.get(name)
        if each is None:
            each = self._asked[name] = _Asked(find_actor(name))
        now = time.monotonic()
        if each.alive is None:
            # A replica tells on its event loop whether its model is there.
            ask = each.handle.where if ":gpu:" in name else each.handle.__ray_ready__
            each.alive, each.since_s = ask.remote(), now
        if each.stats is None:
            each.stats = each.handle.stats.remote()

    def _view(self, name: str, each: _Asked, ended: Mapping[Any, float]) -> ActorView:
        answer_s = ended[each.alive] - each.since_s if each.alive in ended else None
        waited_s = time.monotonic() - each.since_s
        try:
            alive = result(each.alive, None if each.alive in ended else 0.0, name)
            stats = result(each.stats, None if each.stats in ended else 0.0, name)
        except RequestTimeout:
            if answer_s is None:
                return ActorView("silent", error=f"no answer for {waited_s:.1f} s")
            each.alive = None
            if isinstance(alive, dict) and not alive["ready"]:
                return ActorView("loading", None, answer_s, "its model is being loaded")
            return ActorView("busy", None, answer_s, "it is there, and has told no figures in time")
        except (ReplicaLeftError, ActorEndedError) as error:
            self._asked.pop(name)  # another one of this name has another handle
            state = "failed" if isinstance(error, ReplicaLeftError) else "gone"
            return ActorView(state, None, answer_s, str(error))
        except GroupUnavailableError:
            each.alive = each.stats = None
            return ActorView("restarting", None, None, "its process is gone, Ray makes another")
        except LiteCacheError as error:
            each.alive = each.stats = None
            return ActorView("failed", None, answer_s, str(error))
        each.alive = each.stats = None
        return ActorView("up", stats, answer_s)


def statuses(views: Mapping[str, ActorView]) -> dict[str, dict[str, Any]]:
    """As `Group.status` tells it: by actor its figures, or an "error"."""
    return {
        name: dict(view.stats) if view.stats is not None else {"error": view.error or view.state}
        for name, view in views.items()
    }


def _place(name: str) -> tuple[int, list[str | int]]:
    kinds = [at for at, kind in enumerate(ACTOR_KINDS) if f":{kind}" in name]
    return min(kinds, default=len(ACTOR_KINDS)), [
        int(part) if part.isdigit() else part for part in name.split(":")[3:]
    ]
