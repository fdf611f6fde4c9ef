"""`litecache serve`: a model behind OpenAI's interface, until Ctrl-C.

It starts what is missing (Ray, Ray Serve, the group of actors) and, when it ends, stops what it has
started and nothing else, open requests first.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import json
import logging
import socket
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import Annotated, Any

import typer

from litecache.checks import check_integer, check_path
from litecache.cli.options import (
    Address,
    AsJson,
    Settings,
    TrustRemoteCode,
    check_model,
    ended_by_sigterm,
    group_option,
    print_json,
    split_settings,
)
from litecache.errors import ConfigError, GroupError, first_line

_POLL_S = 0.2
_STOP_S = 30.0  # for Ray Serve's own actors


def serve(
    model: Annotated[
        str | None, typer.Argument(help="a hub name, a folder or a .gguf file")
    ] = None,
    host: Annotated[str | None, typer.Option(help="address to serve; default 127.0.0.1")] = None,
    port: Annotated[int | None, typer.Option(help="default 8000")] = None,
    api_keys: Annotated[str | None, typer.Option(help="a file with one key a line")] = None,
    no_auth: Annotated[bool, typer.Option("--no-auth", help="serve whoever can connect")] = False,
    group: Annotated[str | None, group_option("of actors, joined or started")] = None,
    replicas: Annotated[int | None, typer.Option(help="number of GpuCache actors")] = None,
    servers: Annotated[int | None, typer.Option(help="processes that take requests")] = None,
    served_name: Annotated[str | None, typer.Option(help="what clients call the model")] = None,
    settings: Settings = None,
    config: Annotated[str | None, typer.Option(help="a YAML file with these settings")] = None,
    trust_remote_code: TrustRemoteCode = False,
    address: Address = None,
    as_json: AsJson = False,
) -> None:
    """Serve a model by OpenAI's interface, until Ctrl-C.

    Example: litecache serve HuggingFaceTB/SmolLM2-135M-Instruct --api-keys keys.txt
    """
    given = {
        "model": model,
        "host": host,
        "port": port,
        "api_keys": api_keys and str(Path(check_path("--api-keys", api_keys)).absolute()),
        "no_auth": no_auth or None,
        "group": group,
        "replicas": replicas,
        "servers": servers,
        "served_name": served_name,
        "trust_remote_code": trust_remote_code or None,
    }
    values = {} if config is None else _read_config(config)
    values |= {name: value for name, value in given.items() if value is not None}
    if settings:
        values["cache"] = {**values.get("cache", {}), **split_settings(settings)}
    where = values.pop("host", "127.0.0.1")
    at = check_integer("--port", values.pop("port", 8000), 1, 65535)
    try:
        import ray.serve as ray_serve  # noqa: F401 - it says what is missing
    except ImportError as error:
        raise ConfigError(
            f"serving needs Ray Serve ({first_line(error)}): pip install 'litecache[serve]'"
        ) from error
    from litecache.serving.keys import ApiKeys
    from litecache.serving.settings import ServeSettings, check_exposure

    checked = ServeSettings.of(values)
    check_model(checked.model)
    check_exposure(where, keys=checked.api_keys is not None, no_auth=checked.no_auth)
    if checked.api_keys is not None:
        ApiKeys.read(checked.api_keys)
    _run(checked, where, at, address, as_json)


def _run(settings: Any, host: str, port: int, address: str | None, as_json: bool) -> None:
    import ray

    from litecache.actors.cluster import open_ray
    from litecache.actors.found_groups import exists, stop_group

    logging.getLogger("ray.serve").setLevel(logging.WARNING)

    def tell(text: str) -> None:
        if not as_json:
            typer.echo(text, err=True)

    with contextlib.ExitStack() as stack:
        tell("starting what is missing of Ray and Ray Serve")
        open_ray(address, logging_level="warning")
        stack.callback(ray.shutdown)
        stack.enter_context(ended_by_sigterm())  # Ray has put a handler of its own there
        if not exists(settings.group):
            # of a group that did not come up there is nothing to stop
            stack.callback(lambda: exists(settings.group) and stop_group(settings.group))
        stack.callback(_start_proxy(host, port))
        stack.callback(_start_app(settings))
        tell(f"loading {settings.model}")
        url = f"http://{f'[{host}]' if ':' in host else host}:{port}"
        # whoever listens everywhere listens here, too
        name = _wait_until_ready(url.replace("0.0.0.0", "127.0.0.1").replace("[::]", "[::1]"))
        if as_json:
            print_json({"url": url, "model": name, "group": settings.group})
        else:
            _say_how(url, name, settings)
        with contextlib.suppress(KeyboardInterrupt):
            while True:
                time.sleep(3600)
        tell("stopping: open requests are answered first")


def _start_proxy(host: str, port: int) -> Any:
    """Ray Serve with this address, where it does not run yet; what undoes it."""
    from ray import serve
    from ray.serve.context import _get_global_client

    from litecache.serving.settings import is_loopback

    client = _get_global_client(raise_if_no_controller_running=False)
    if client is None:
        _check_free(host, port)
        serve.start(
            # others can reach a proxy of their own node, too
            proxy_location="HeadOnly" if is_loopback(host) else "EveryNode",
            http_options={"host": host, "port": port},
            logging_config={"log_level": "WARNING"},
        )
        return _stop_serve
    running = client.http_config
    if (running.host, running.port) != (host, port):
        raise ConfigError(
            "--host and --port",
            f"{host}:{port}",
            f"{running.host}:{running.port}, where Ray Serve runs in this cluster already",
        )
    return lambda: None


def _stop_serve() -> None:
    """End Ray Serve, as `serve.shutdown` does.

    That waits for a call of the controller's that only its end ends, of which Ray then tells users,
    on standard output, as of a failed task that it will retry.
    """
    import ray
    from ray.exceptions import RayError
    from ray.serve._private.constants import SERVE_CONTROLLER_NAME, SERVE_NAMESPACE

    until = time.monotonic() + _STOP_S
    with contextlib.suppress(ValueError, RayError):  # gone
        controller = ray.get_actor(SERVE_CONTROLLER_NAME, SERVE_NAMESPACE)
        ray.get(controller.graceful_shutdown.remote(wait=False), timeout=_STOP_S)
        while time.monotonic() < until:
            time.sleep(_POLL_S)
            ray.get_actor(SERVE_CONTROLLER_NAME, SERVE_NAMESPACE)


def _check_free(host: str, port: int) -> None:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        with socket.socket(family) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind((host.strip("[]"), port))
    except OSError as error:
        free = "a port that is free" if error.errno == errno.EADDRINUSE else first_line(error)
        raise ConfigError("--host and --port", f"{host}:{port}", free) from error


def _start_app(settings: Any) -> Any:
    from ray import serve

    from litecache.serving.deployment import build_app

    name = f"litecache-{settings.group}"
    if name in serve.status().applications:
        raise ConfigError("--group", settings.group, "a group that is not served already")
    try:
        serve.run(build_app(settings), name=name, route_prefix="/")
    except Exception as error:
        serve.delete(name)
        raise GroupError(f"Ray Serve did not start the server: {first_line(error)}") from error
    return lambda: serve.delete(name)


def _wait_until_ready(url: str) -> str:
    """The model's name, as soon as it is loaded.

    Raises:
        GroupError: it could not be loaded.
    """
    while True:
        try:
            with urllib.request.urlopen(f"{url}/ready", timeout=30) as answer:
                return str(json.load(answer)["model"])
        except urllib.error.HTTPError as error:
            with contextlib.suppress(ValueError, KeyError, TypeError):
                told = json.load(error)["error"]
                if told["code"] == "load_failed":
                    raise GroupError(told["message"]) from error
        except OSError:  # the proxy has just started
            pass
        time.sleep(_POLL_S)


def _say_how(url: str, name: str, settings: Any) -> None:
    key = ' -H "Authorization: Bearer $KEY"' if settings.api_keys else ""
    typer.echo(f"{name} at {url}/v1; Ctrl-C stops it. Try:\n")
    typer.echo(
        f"curl {url}/v1/chat/completions -H 'Content-Type: application/json'{key} -d '{{\n"
        f'  "model": "{name}", "max_tokens": 64,\n'
        f'  "messages": [{{"role": "user", "content": "Why is the sky blue?"}}]}}\'\n'
    )
    if settings.no_auth:
        typer.echo("whoever can connect may use it: it was started with --no-auth", err=True)


def _read_config(path: str) -> dict[str, Any]:
    """A YAML file with fields of `ServeSettings`, and host and port.

    Raises:
        ConfigError: it cannot be read, or holds something else.
    """
    from litecache.actors.operating.yaml_file import YamlFile
    from litecache.serving.settings import ServeSettings

    known = ["host", "port", *(each.name for each in dataclasses.fields(ServeSettings))]
    return YamlFile(path, "--config", known).tree
