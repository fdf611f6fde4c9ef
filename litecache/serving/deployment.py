"""The Ray Serve application: replicas that serve one model over a group of actors.

A replica answers at once, `/ready` when its adapter has joined or started the group. The group is
detached: it outlives the application, so that a new version of it finds a warm cache.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

from ray import serve

from litecache.adapter.kv_cache_adapter import KVCacheAdapter
from litecache.errors import GroupError
from litecache.serving.http_app import HttpApp
from litecache.serving.keys import ApiKeys
from litecache.serving.service import ModelService
from litecache.serving.settings import ServeSettings, parse_texts

# Bounded by the application itself, which tells clients so as OpenAI does.
_MAX_ONGOING = 1 << 16


def open_adapter(settings: ServeSettings) -> KVCacheAdapter:
    """Join or start the group of a server.

    Raises:
        LiteCacheError: as `KVCacheAdapter`.
    """
    return KVCacheAdapter(
        settings.model,
        cache_config=settings.cache_config(),
        group=settings.group,
        detached=True,
        replicas=settings.replicas,
        num_threads=settings.num_threads,
        trust_remote_code=settings.trust_remote_code,
    )


def _log_where_serve_does() -> None:
    """To the files of the replica, whose lines Ray's dashboard shows."""
    ours = logging.getLogger("litecache")
    ours.setLevel(logging.INFO)
    for handler in logging.getLogger("ray.serve").handlers:
        ours.addHandler(handler)


@serve.ingress()
class LiteCacheServer:
    """One replica of the application.

    Args:
        values: plain values of `ServeSettings`.
    """

    def __init__(self, values: Mapping[str, Any]) -> None:
        settings = ServeSettings.of(values)
        _log_where_serve_does()
        keys = None if settings.api_keys is None else ApiKeys.read(settings.api_keys)
        self.service = ModelService(settings, lambda: open_adapter(settings), keys)
        self.service.start()

    def __serve_build_asgi_app__(self) -> HttpApp:
        """What answers; Ray Serve itself tells request ids."""
        return HttpApp(self.service, tells_request_id=False)

    def state(self) -> tuple[str, str]:
        """`ModelService.state` and `failure`."""
        return self.service.state, self.service.failure

    def check_health(self) -> None:
        """Called by Ray Serve, which starts another replica when this raises."""
        if self.service.state == "failed":
            raise GroupError(f"the model could not be loaded: {self.service.failure}")

    def __del__(self) -> None:
        service = getattr(self, "service", None)
        if service is not None:
            service.close()


def build_app(args: Mapping[str, Any] | ServeSettings) -> serve.Application:
    """The application, for `serve.run`, `serve run` and `serve deploy`.

    Args:
        args: `ServeSettings`, or its fields by name, of which `model` is needed.

    Raises:
        ConfigError: an unknown field, or a wrong value.
    """
    settings = args if isinstance(args, ServeSettings) else ServeSettings.of(parse_texts(args))
    deployment = serve.deployment(
        name="LiteCacheServer",
        num_replicas=settings.servers,
        max_ongoing_requests=_MAX_ONGOING,
        graceful_shutdown_timeout_s=settings.shutdown_s,
        graceful_shutdown_wait_loop_s=0.2,
        health_check_period_s=2,
        ray_actor_options={"num_cpus": 0},
    )(LiteCacheServer)
    return deployment.bind(settings.to_dict())
