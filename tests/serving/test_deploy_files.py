"""deploy/: what Ray Serve and KubeRay are given, by Ray Serve's own schema and our settings."""

from __future__ import annotations

import importlib
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from litecache.serving import ServeSettings
from litecache.serving.settings import is_loopback

ROOT = Path(__file__).resolve().parents[2]
DEPLOY = ROOT / "deploy"


def parsed(name: str) -> Any:
    return yaml.safe_load((DEPLOY / name).read_text())


def serve_configs() -> dict[str, Any]:
    service = parsed("rayservice.yaml")
    return {
        "serve.yaml": parsed("serve.yaml"),
        "rayservice.yaml": yaml.safe_load(service["spec"]["serveConfigV2"]),
    }


@pytest.mark.parametrize("name", ["serve.yaml", "rayservice.yaml"])
def test_ray_serve_takes_the_file_and_makes_the_application(name: str) -> None:
    from ray.serve.schema import ServeDeploySchema

    config = ServeDeploySchema.model_validate(serve_configs()[name])
    (application,) = config.applications
    # the schema leaves out what it does not know
    given = serve_configs()[name]
    assert given.keys() <= type(config).model_fields.keys()
    assert given["applications"][0].keys() <= type(application).model_fields.keys()
    assert given["http_options"].keys() <= type(config.http_options).model_fields.keys()
    module, _, attribute = application.import_path.partition(":")
    build = getattr(importlib.import_module(module), attribute)
    assert build(application.args) is not None
    settings = ServeSettings.of(application.args)
    closed = is_loopback(config.http_options.host) or settings.api_keys is not None
    assert closed, "others can connect, and anybody is answered"
    assert not settings.no_auth


def test_every_pod_of_the_rayservice_has_what_the_settings_name() -> None:
    service = parsed("rayservice.yaml")
    assert (service["apiVersion"], service["kind"]) == ("ray.io/v1", "RayService")
    settings = ServeSettings.of(serve_configs()["rayservice.yaml"]["applications"][0]["args"])
    cluster = service["spec"]["rayClusterConfig"]
    groups = [cluster["headGroupSpec"], *cluster["workerGroupSpecs"]]
    for group in groups:
        pod = group["template"]["spec"]
        (container,) = pod["containers"]
        mounts = {mount["mountPath"]: mount["name"] for mount in container["volumeMounts"]}
        assert {*mounts.values()} == {volume["name"] for volume in pod["volumes"]}
        # a proxy and a server may run on the head, too
        assert str(Path(settings.api_keys or "").parent) in mounts
    assert {settings.cache["storage_dir"], "/dev/shm"} <= {*mounts}


def test_the_files_name_the_pinned_version_of_ray() -> None:
    pinned = re.search(r"^ray==(\S+)$", (ROOT / "constraints.txt").read_text(), re.MULTILINE)
    assert pinned is not None
    version = parsed("rayservice.yaml")["spec"]["rayClusterConfig"]["rayVersion"]
    bases = re.findall(r"rayproject/ray:([\d.]+)-", (DEPLOY / "Containerfile").read_text())
    assert {version, *bases} == {pinned[1]}
