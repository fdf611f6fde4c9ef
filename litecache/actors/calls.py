"""Calls to actors with a deadline, and their outcomes as LiteCache errors.

Ray wraps what an actor raised; here it comes out again as the class that was raised. An actor
that is gone or late becomes `GroupUnavailableError` or `RequestTimeout`.
"""

from __future__ import annotations

import warnings
from typing import Any

import ray
from ray.exceptions import (
    ActorDiedError,
    GetTimeoutError,
    RayActorError,
    RayError,
    RayTaskError,
)

from litecache.actors.naming import CALL_TIMEOUT_S
from litecache.errors import GroupError, GroupUnavailableError, LiteCacheError, RequestTimeout

# What a call can end with when the other side is dead, restarting, unreachable or slow.
UNREACHABLE = (GroupUnavailableError, RequestTimeout)


class ActorEndedError(GroupUnavailableError):
    """The actor is dead and Ray will not restart it, or it has left its group."""


def result(ref: Any, timeout_s: float | None = CALL_TIMEOUT_S, what: str = "a call") -> Any:
    """Wait for a call's result.

    Args:
        ref: what `.remote()` returned, or a list of such.
        timeout_s: deadline; None: wait for as long as it takes.
        what: names the call in errors.

    Raises:
        LiteCacheError: the class that the actor raised; RequestTimeout after the deadline;
            GroupUnavailableError when the actor is gone.
    """
    try:
        return ray.get(ref, timeout=timeout_s)
    except GetTimeoutError as error:
        raise RequestTimeout(f"{what} took longer than {timeout_s:g} s") from error
    except RayTaskError as error:
        raise local_error(error, what) from error
    except ActorDiedError as error:
        raise ActorEndedError(f"{what}: the actor has ended ({_first_line(error)})") from error
    except RayActorError as error:
        raise GroupUnavailableError(f"{what}: the actor is gone ({_first_line(error)})") from error
    except RayError as error:
        raise GroupError(f"{what} failed in Ray: {_first_line(error)}") from error


def was_restarted() -> bool:
    """Whether Ray has restarted the actor that calls this."""
    with warnings.catch_warnings():
        # Ray's property warns of a deprecated name that it uses itself.
        warnings.simplefilter("ignore")
        return bool(ray.get_runtime_context().was_current_actor_reconstructed)


def local_error(error: RayTaskError, what: str) -> Exception:
    """What the actor raised; anything that is no LiteCacheError is told as a GroupError."""
    cause = getattr(error, "cause", None)
    if isinstance(cause, LiteCacheError):
        return cause
    if isinstance(cause, RayActorError):
        return GroupUnavailableError(f"{what}: an actor behind it is gone")
    return GroupError(f"{what} failed: {type(cause).__name__}: {cause}")


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
