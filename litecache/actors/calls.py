"""Calls to actors with a deadline, and their outcomes as LiteCache errors.

Ray wraps what an actor raised; here it comes out again as the class that was raised. An actor that
is gone or late becomes `GroupUnavailableError` or `RequestTimeout`. No call starts a Ray.
"""

from __future__ import annotations

import importlib
import threading
import time
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeout
from typing import Any

import ray
from ray.exceptions import (
    ActorDiedError,
    ActorUnschedulableError,
    GetTimeoutError,
    LocalRayletDiedError,
    NodeDiedError,
    ObjectLostError,
    OutOfMemoryError,
    RayActorError,
    RayError,
    RayTaskError,
    RpcError,
    WorkerCrashedError,
)

from litecache.actors.naming import CALL_TIMEOUT_S, NAMESPACE
from litecache.errors import (
    GroupError,
    GroupUnavailableError,
    LiteCacheError,
    RequestTimeout,
    first_line,
    told,
)
from litecache.threads import start_job

# What a call can end with when the other side is dead, restarting, unreachable or slow.
UNREACHABLE = (GroupUnavailableError, RequestTimeout)


# What Ray says when the process or the node behind a call, or an answer on it, is gone.
_GONE = (
    RayActorError,
    NodeDiedError,
    ObjectLostError,
    OutOfMemoryError,
    RpcError,
    WorkerCrashedError,
    LocalRayletDiedError,
)

# `ray.get` itself starts a Ray where there is none; what it wraps raises.
_get = getattr(ray.get, "__wrapped__", ray.get)
_wait = getattr(ray.wait, "__wrapped__", ray.wait)


class ActorEndedError(GroupUnavailableError):
    """The actor is dead and Ray will not restart it."""


class ReplicaLeftError(ActorEndedError):
    """The replica has left its group because restarts did not help: it holds nothing any more."""


_lookups: dict[str, Future[Any]] = {}
_lookups_lock = threading.Lock()


def find_actor(name: str, deadline: float = 0.0) -> Any:
    """The actor of this name; until `deadline` (monotonic) somebody may still be creating it.

    Raises:
        GroupUnavailableError: there is none.
        RequestTimeout: Ray does not say whether there is.
    """
    failed = False
    while True:
        try:
            return _look_up(name)
        except ValueError as error:
            if time.monotonic() >= deadline:
                raise GroupUnavailableError(f"there is no actor {name}") from error
        except LiteCacheError:
            raise
        except Exception as error:
            if failed:
                text = f"{name} cannot be looked up: {first_line(error)}"
                raise GroupUnavailableError(text) from error
            failed = True  # once may be chance, and "there is none" would be wrong
        time.sleep(0.1)


def _look_up(name: str) -> Any:
    """What `ray.get_actor` finds; that waits for a minute when the cluster's head is cut off.

    So another thread does it, one for all who ask for the same name meanwhile. Ray imports the
    actor's class for it, which on a busy machine alone takes longer: that is done before.
    """
    kinds = {":gpu:": "gpu_cache", ":shard:": "storage_shard"}
    module = next((kinds[kind] for kind in kinds if kind in name), "coordinator")
    importlib.import_module(f"litecache.actors.{module}")
    with _lookups_lock:
        found = _lookups.get(name)
        if found is None:
            found = _lookups[name] = Future()

            found.add_done_callback(lambda _: _lookups.pop(name, None))

            def look(found: Future[Any] = found) -> None:
                try:
                    found.set_result(ray.get_actor(name, NAMESPACE))
                except Exception as error:  # for whoever asked: no fault of this thread
                    found.set_exception(error)

            start_job(look, "actor-lookup", found.set_exception)
    try:
        return found.result(CALL_TIMEOUT_S)
    except FutureTimeout as error:
        what = f"looking up the actor {name}"
        raise RequestTimeout(f"{what} took longer than {CALL_TIMEOUT_S:g} s") from error


def all_actor_names() -> list[str]:
    """Names of the actors of all groups that are alive, starting or restarting."""
    named = ray.util.list_named_actors(all_namespaces=True)
    return sorted(actor["name"] for actor in named if actor["namespace"] == NAMESPACE)


def actor_names(group: str) -> list[str]:
    """Those of one group."""
    return [name for name in all_actor_names() if name.startswith(f"litecache:{group}:")]


def result(ref: Any, timeout_s: float | None = CALL_TIMEOUT_S, what: str = "a call") -> Any:
    """Wait for what `.remote()` returned, or a list of such; `what` names the call in errors.

    Raises:
        LiteCacheError: the class that the actor raised; RequestTimeout after `timeout_s` (None:
            never); GroupUnavailableError when the actor is gone.
    """
    try:
        return _get(ref, timeout=timeout_s)
    except GetTimeoutError as error:
        raise RequestTimeout(f"{what} took longer than {timeout_s:g} s") from error
    except RayTaskError as error:
        raise local_error(error, what) from error
    except (ActorDiedError, ActorUnschedulableError) as error:
        raise ActorEndedError(f"{what}: the actor has ended ({first_line(error)})") from error
    except _GONE as error:
        raise GroupUnavailableError(f"{what}: the actor is gone ({first_line(error)})") from error
    except RayError as error:
        raise GroupError(f"{what} failed in Ray: {first_line(error)}") from error


def gather(
    handles: Mapping[str, Any], call: Callable[[Any], Any], timeout_s: float, what: str
) -> dict[str, Any]:
    """What several actors answer to `call`, under one deadline: by name the answer, or the
    LiteCacheError that took its place.
    """
    answers: dict[str, Any] = {}
    refs = {name: call(handle) for name, handle in handles.items()}
    done = _done(refs.values(), timeout_s)
    for name, ref in refs.items():
        try:
            answers[name] = result(ref, None if ref in done else 0.0, f"{name}: {what}")
        except RequestTimeout:
            answers[name] = RequestTimeout(f"{name}: {what}: no answer in {timeout_s:g} s")
        except LiteCacheError as error:
            answers[name] = error
    return answers


def silent_among(handles: Mapping[str, Any]) -> set[str]:
    """Names of the actors that do not say within CALL_TIMEOUT_S that they are alive.

    They say so at once whatever else they do, so that nobody has to wait for their work to know.
    Where none says so the machine is slow, and they get longer.
    """
    refs = {name: handle.__ray_ready__.remote() for name, handle in handles.items()}
    alive = _done(refs.values(), CALL_TIMEOUT_S) or _done(refs.values(), 4 * CALL_TIMEOUT_S)
    return {name for name, ref in refs.items() if ref not in alive}


def _done(refs: Iterable[Any], timeout_s: float) -> set[Any]:
    refs = list(refs)
    return set(_wait_for(refs, len(refs), timeout_s)[0]) if refs else set()


def _wait_for(refs: list[Any], count: int, timeout_s: float) -> tuple[list[Any], list[Any]]:
    """Those that have an outcome, once so many have or the time is over, and the others."""
    try:
        done, left = _wait(refs, num_returns=count, timeout=timeout_s)
    except RayError as error:
        raise GroupError(f"waiting failed in Ray: {first_line(error)}") from error
    return done, left


def first_ended(refs: Sequence[Any], deadline: float) -> dict[Any, float]:
    """When each of these calls ended (`time.monotonic`), of those that end before `deadline`."""
    ended: dict[Any, float] = {}
    open_ = list(refs)
    while open_:
        done, open_ = _wait_for(open_, 1, max(0.0, deadline - time.monotonic()))
        now = time.monotonic()
        ended.update(dict.fromkeys(done, now))
        if not done:
            break
    return ended


def ready_among(refs: Iterable[Any], timeout_s: float) -> set[Any]:
    """Of what `.remote()` returned, what has an outcome as soon as one has, or none in time."""
    return set(_wait_for(list(refs), 1, timeout_s)[0])


def was_restarted() -> bool:
    """Whether Ray has restarted the actor that calls this."""
    with warnings.catch_warnings():
        # Ray's property warns of a deprecated name that it uses itself.
        warnings.simplefilter("ignore")
        return bool(ray.get_runtime_context().was_current_actor_reconstructed)


def local_error(error: RayTaskError, what: str) -> Exception:
    """What the actor raised; anything that is no LiteCacheError is told as a GroupError."""
    cause: Any = getattr(error, "cause", None)
    if isinstance(cause, LiteCacheError):
        return cause
    if isinstance(cause, RayActorError):
        return GroupUnavailableError(f"{what}: an actor behind it is gone")
    return GroupError(f"{what} failed: {told(cause)}")
