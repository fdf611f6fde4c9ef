"""deploy/: what Ray Serve and KubeRay are given, by Ray Serve's own schema and our settings."""

from __future__ import annotations

import importlib
import json
import re
from pathlib import Path
from typing import Any

import jsonschema
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


def object_of(properties: dict[str, Any], *required: str) -> dict[str, Any]:
    """An object of these fields alone."""
    return {
        "type": "object",
        "properties": properties,
        "required": list(required),
        "additionalProperties": False,
    }


def listed(items: dict[str, Any]) -> dict[str, Any]:
    return {"type": "array", "items": items, "minItems": 1}


TEXT, COUNT, FLAG = {"type": "string"}, {"type": "integer", "minimum": 0}, {"type": "boolean"}
TEXTS = {"type": "object", "additionalProperties": TEXT}
QUANTITY = {"type": "string", "pattern": r"^[0-9]+(\.[0-9]+)?([KMGTPE]i|[numkMGTPE])?$"}
QUANTITIES = {"type": "object", "additionalProperties": QUANTITY}
CONTAINER = object_of(
    {
        "name": TEXT,
        "image": TEXT,
        "ports": listed(object_of({"name": TEXT, "containerPort": COUNT}, "containerPort")),
        "resources": object_of({"requests": QUANTITIES, "limits": QUANTITIES}),
        "volumeMounts": listed(
            object_of({"name": TEXT, "mountPath": TEXT, "readOnly": FLAG}, "name", "mountPath")
        ),
    },
    *("name", "image"),
)
VOLUME = {
    **object_of(
        {
            "name": TEXT,
            "secret": object_of({"secretName": TEXT, "defaultMode": COUNT}, "secretName"),
            "emptyDir": object_of({"medium": {"enum": ["", "Memory"]}, "sizeLimit": QUANTITY}),
        },
        "name",
    ),
    "minProperties": 2,
    "maxProperties": 2,
}
TEMPLATE = object_of(
    {
        "spec": object_of(
            {
                "containers": listed(CONTAINER),
                "volumes": listed(VOLUME),
                "securityContext": object_of({"fsGroup": COUNT}),
                "terminationGracePeriodSeconds": COUNT,
            },
            "containers",
        )
    },
    "spec",
)
HEAD = {"rayStartParams": TEXTS, "template": TEMPLATE}
WORKERS = {
    **HEAD,
    **dict.fromkeys(("replicas", "minReplicas", "maxReplicas"), COUNT),
    "groupName": {"type": "string", "pattern": "^[a-z]([-a-z0-9]*[a-z0-9])?$"},
}
# Of KubeRay's CRD (rayservices.ray.io, v1) and the pod template in it: the fields that the file
# uses, their types, and those that they need. All versions of the CRD since 1.0 have them; older
# ones need rayStartParams, even empty.
RAY_SERVICE = object_of(
    {
        "apiVersion": {"const": "ray.io/v1"},
        "kind": {"const": "RayService"},
        "metadata": object_of({"name": TEXT}, "name"),
        "spec": object_of(
            {
                "serveConfigV2": TEXT,
                "rayClusterConfig": object_of(
                    {
                        "rayVersion": TEXT,
                        "headGroupSpec": object_of(HEAD, *HEAD),
                        "workerGroupSpecs": listed(object_of(WORKERS, *WORKERS)),
                    },
                    *("headGroupSpec", "rayVersion"),
                ),
            },
            *("serveConfigV2", "rayClusterConfig"),
        ),
    },
    *("apiVersion", "kind", "metadata", "spec"),
)


def test_the_rayservice_has_the_fields_and_types_of_kuberays_schema() -> None:
    jsonschema.Draft202012Validator.check_schema(RAY_SERVICE)
    jsonschema.validate(parsed("rayservice.yaml"), RAY_SERVICE)


def test_every_pod_of_the_rayservice_has_what_the_settings_name() -> None:
    service = parsed("rayservice.yaml")
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


def test_the_image_holds_what_it_copies_and_installs_what_setup_installs() -> None:
    lines = (DEPLOY / "Containerfile").read_text().replace("\\\n", " ").splitlines()
    steps = [line.split() for line in lines if line and not line.startswith("#")]
    assert [step[0] for step in steps[:2]] == ["ARG", "FROM"]
    copied = [
        word
        for name, *words in steps
        if name == "COPY"
        for word in [each for each in words if not each.startswith("--")][:-1]
    ]
    assert {"pyproject.toml", "litecache"} <= {*copied}
    for name in copied:
        assert (ROOT / name).exists(), name
    # what the build reads of the project must have been copied
    tomllib = pytest.importorskip("tomllib")  # Python 3.11
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert {project["readme"], *project["license-files"]} <= {*copied}
    (run,) = [" ".join(words) for name, *words in steps if name == "RUN"]
    assert run == 'python -m pip install --no-cache-dir -c constraints.txt ".[serve]"'
    command = json.loads(" ".join(next(words for name, *words in steps if name == "CMD")))
    assert command[0] in project["scripts"]


def test_the_files_name_the_pinned_version_of_ray() -> None:
    pinned = re.search(r"^ray==(\S+)$", (ROOT / "constraints.txt").read_text(), re.MULTILINE)
    assert pinned is not None
    version = parsed("rayservice.yaml")["spec"]["rayClusterConfig"]["rayVersion"]
    bases = re.findall(r"rayproject/ray:([\d.]+)-", (DEPLOY / "Containerfile").read_text())
    assert {version, *bases} == {pinned[1]}
