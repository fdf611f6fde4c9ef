"""This process's connection to Ray: found or started once, and noticed when it is gone.

Handles of actors belong to the connection, and to the process, under which they were made: whoever
keeps some checks before each call, so that none hangs in a forked process and none starts a hidden
second Ray after `ray.shutdown()`.
"""

from __future__ import annotations

import logging
import os
import socket
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import RayError

from litecache.errors import ConfigError, GroupError, GroupUnavailableError, first_line

ANSWER_TIMEOUT_S = 5.0
# What an HTTP/2 client says first: the preface and empty settings. A server answers with its own.
_HELLO = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes([0, 0, 0, 4, 0, 0, 0, 0, 0])

_TOKEN_HELP = (
    "run `export RAY_AUTH_MODE=token`, and put the token that the cluster was started with (the "
    "head's ~/.ray/auth_token, or what its RAY_AUTH_TOKEN_PATH names) into ~/.ray/auth_token here, "
    "or `export RAY_AUTH_TOKEN_PATH=FILE`"
)

_ray_is_inherited = False


def _note_fork() -> None:
    global _ray_is_inherited
    _ray_is_inherited = ray.is_initialized()


os.register_at_fork(after_in_child=_note_fork)


@dataclass(frozen=True)
class RayConnection:
    """A process's connection to a Ray cluster, to which the handles of actors belong."""

    pid: int
    session: str
    job: str

    @classmethod
    def current(cls) -> RayConnection:
        """The one that is open; GroupError where there is none or it was inherited by a fork."""
        refuse_inherited_ray()
        if not ray.is_initialized():
            raise GroupError("Ray is not running in this process: call ray.init()")
        context = ray.get_runtime_context()
        # A Ray client knows no session.
        session = getattr(context, "get_session_name", str)()
        return cls(os.getpid(), session, context.get_job_id())

    def check(self) -> None:
        """GroupError where Ray was shut down since, or in another process."""
        check_process(self.pid)
        if not ray.is_initialized() or RayConnection.current() != self:
            raise GroupError(
                "Ray was shut down since these actors were started or joined: make a new adapter"
            )


def check_process(pid: int) -> None:
    """GroupError in a process forked from the one that something was made in."""
    if os.getpid() != pid:
        raise GroupError(
            f"this was made in process {pid}, and process {os.getpid()} was forked from it: only "
            'the first can use it; start the other by multiprocessing\'s "spawn" and make a '
            "KVCacheAdapter(..., group=NAME) there"
        )


def refuse_inherited_ray() -> None:
    """GroupError in a process forked from one that uses Ray."""
    if _ray_is_inherited:
        raise GroupError(
            "this process was forked from one that uses Ray and cannot use it itself: "
            'start it by multiprocessing\'s "spawn" or "forkserver"'
        )


def open_ray(address: str | None = None, **options: Any) -> None:
    """Connect to Ray as `ray.init` does, unless this process is connected.

    Args:
        address: as in `ray.init`: None = RAY_ADDRESS, or the cluster that `ray start` recorded on
            this machine, or a new local Ray; "auto" = the same, but never a new one.
        **options: of `ray.init`.

    Raises:
        GroupUnavailableError: the cluster does not answer; Ray itself would try for ten minutes.
        GroupError: this process was forked from one that uses Ray.
        ConfigError: LITECACHE_LOG_FORMAT is neither "json" nor "text".
    """
    refuse_inherited_ray()
    if ray.is_initialized():
        return
    _check_cluster(address)
    # At each start a warning that Ray is in its safe state, with how to leave it.
    advice = logging.getLogger("ray._private.authentication.authentication_token_setup")
    advice.addFilter(_is_no_advice)
    try:
        ray.init(address, log_to_driver=False, **_log_options(), **options)
    except (OSError, ValueError, RuntimeError, RayError) as error:
        raise GroupUnavailableError(
            f"no Ray cluster to join ({first_line(error)}): start one with `ray start --head`, "
            "and export the same RAY_AUTH_MODE and token for both"
        ) from error


def _is_no_advice(record: logging.LogRecord) -> bool:
    return not record.getMessage().startswith("Token authentication is enabled")


def _check_cluster(address: str | None) -> None:
    """Refuse a cluster that does not answer, or not with this process's token.

    Raises:
        GroupUnavailableError: says what to run; Ray itself would try for 20 s to ten minutes.
    """
    origin = "given"
    if address in (None, "auto"):
        address, origin = os.environ.get("RAY_ADDRESS") or None, "of RAY_ADDRESS"
    if address in (None, "auto"):
        address, origin = _recorded_address(), "that `ray start` recorded on this machine"
    if address is None or address == "local":
        return
    host, colon, port = address.removeprefix("ray://").rpartition(":")
    if not colon or not port.isdigit() or not 0 < int(port) < 1 << 16:
        return  # Ray says what is wrong with it
    is_client = address.startswith("ray://")
    if _answers(host.strip("[]"), int(port)):
        _refuse_wrong_token(address, f"{host}:{port}", is_client)
    else:
        raise GroupUnavailableError(
            f"the Ray cluster {address} ({origin}) does not answer within {ANSWER_TIMEOUT_S:g} s: "
            "start it again; or forget it, by `ray stop` or another RAY_ADDRESS; or call "
            'ray.init(address="local") first for a Ray of this process\'s own'
        )


def _refuse_wrong_token(address: str, server: str, is_client: bool) -> None:
    """Make one call with the token that Ray would send, which it repeats for 20 s if refused."""
    if os.environ.get("RAY_USE_TLS", "0") in ("1", "true"):
        return
    import grpc  # type: ignore[import-untyped]

    # Ray offers no public way to ask.
    from ray._raylet import AuthenticationTokenLoader  # type: ignore[attr-defined]

    method = "RayletDriver/ClusterInfo" if is_client else "NodeInfoGcsService/GetClusterId"
    try:
        loader = AuthenticationTokenLoader.instance()
        token = loader.get_token_for_http_header() if loader.has_token() else {}
    except (RuntimeError, OSError, RayError) as error:
        why = f"RAY_AUTH_MODE asks for a token, and there is none ({first_line(error)})"
        raise GroupUnavailableError(f"{why}: {_TOKEN_HELP}") from error
    channel = grpc.insecure_channel(server, options=[("grpc.enable_http_proxy", 0)])
    with channel:
        call = channel.unary_unary(f"/ray.rpc.{method}")
        try:
            call(b"", metadata=tuple(token.items()), timeout=ANSWER_TIMEOUT_S)
        except grpc.RpcError as error:
            if error.code() is grpc.StatusCode.UNAUTHENTICATED:
                what = "takes another token than this process's" if token else "asks for a token"
                raise GroupUnavailableError(
                    f"the Ray cluster {address} {what}: {_TOKEN_HELP}"
                ) from error


def _recorded_address() -> str | None:
    # Where Ray looks, too, and it offers no public way to ask.
    from ray._private.utils import read_ray_address

    return read_ray_address() or None


def _answers(host: str, port: int) -> bool:
    """Whether a gRPC server, as Ray's are, greets back."""
    try:
        with socket.create_connection((host, port), timeout=ANSWER_TIMEOUT_S) as server:
            if os.environ.get("RAY_USE_TLS", "0") in ("1", "true"):
                return True  # speaks only after a handshake
            server.sendall(_HELLO)
            return bool(server.recv(1))
    except OSError:
        return False


def _log_options() -> dict[str, Any]:
    """What `LITECACHE_LOG_FORMAT` means to `ray.init`: "json" makes a JSON line of each record.

    Ray takes it to the job's actors, with the job, node and actor in each line.

    Raises:
        ConfigError: it is neither "json" nor "text".
    """
    chosen = os.environ.get("LITECACHE_LOG_FORMAT") or "text"
    if chosen not in ("json", "text"):
        raise ConfigError("LITECACHE_LOG_FORMAT", chosen, '"json" or "text"')
    if chosen == "text":
        return {}
    named = ray.LoggingConfig(encoding="JSON", additional_log_standard_attrs=["name"])
    return {"logging_config": named}


def dashboards_folder() -> Path:
    """Where the Ray that this process is connected to has its Grafana dashboards, on its head node.

    By the same environment variables as Ray's own, where those are set.

    Raises:
        GroupUnavailableError: the connection is a Ray client's.
    """
    from ray._private.worker import _global_node  # no public API tells of the session's folder

    if chosen := os.environ.get("RAY_METRICS_GRAFANA_DASHBOARD_OUTPUT_DIR"):
        return Path(chosen)
    root = os.environ.get("RAY_METRICS_OUTPUT_ROOT")
    if root is None:
        if _global_node is None:
            raise GroupUnavailableError(
                "a Ray client does not know the session's folder: connect on the head node itself"
            )
        root = f"{_global_node.get_session_dir_path()}/metrics"
    return Path(root) / "grafana" / "dashboards"
