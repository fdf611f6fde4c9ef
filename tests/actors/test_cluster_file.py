"""The YAML file of `litecache up`: every field read, whatever is wrong named by its line."""

from __future__ import annotations

import dataclasses
import inspect
import os
import time
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from litecache.actors.operating.cluster_file import dump_cluster_file, one_group, read_cluster_file
from litecache.actors.placement import NodeStorage
from litecache.adapter import KVCacheAdapter
from litecache.config import CacheConfig
from litecache.errors import ConfigError

EXAMPLE = Path(__file__).parents[2] / "examples" / "cluster.yaml"


def write(folder: Path, text: str | bytes) -> Path:
    file = folder / "cluster.yaml"
    file.write_bytes(text.encode() if isinstance(text, str) else text)
    return file


def refused(file: Path) -> str:
    """What is said about a file, behind its name."""
    begun = time.monotonic()
    with pytest.raises(ConfigError) as error:
        read_cluster_file(file)
    assert time.monotonic() - begun < 20
    text = str(error.value)
    assert text.startswith(f"{file}:")
    assert len(text) <= 2000
    return text.removeprefix(f"{file}:")


def test_the_example_shows_every_field_with_its_default() -> None:
    (setup,) = read_cluster_file(EXAMPLE)
    model = "HuggingFaceTB/SmolLM2-135M-Instruct"
    plain = one_group({"group": "chat", "model": model})
    options: dict[str, Any] = {"gpu": {}, "shard": {}, "coordinator": {}}
    assert setup == dataclasses.replace(plain, actor_options=options)
    shown = yaml.safe_load(EXAMPLE.read_text())
    assert shown["cache"].keys() == CacheConfig().to_dict().keys()
    written = yaml.safe_load(dump_cluster_file([setup]))
    assert shown.keys() == written.keys()


def test_the_example_of_several_models_in_its_comments_is_valid(tmp_path: Path) -> None:
    lines = EXAMPLE.read_text().splitlines()
    start = lines.index("# models:")
    text = "\n".join(line.removeprefix("# ") for line in lines[start:])
    setups = read_cluster_file(write(tmp_path, f"group: chat\n{text}"))
    assert [setup.group for setup in setups] == ["chat.small", "chat.coder"]
    assert [setup.replicas for setup in setups] == [2, 1]
    assert setups[1].config.kv_dtype == "int8"


def test_all_fields_are_read_and_what_is_printed_reads_the_same(tmp_path: Path) -> None:
    file = write(
        tmp_path,
        """
        group: team
        model: org/name
        replicas: all
        num_threads: 4
        trust_remote_code: true
        placement: STRICT_SPREAD
        actor_options: {gpu: {resources: {big: 1}, num_cpus: 2}}
        cache:
          block_size: 32
          storage_dir: [/a, /b]
          ttl_s: 60
          salt_quotas: {alice: 5GB}
        nodes:
        - {node: 10.0.0.7, ram_bytes: 2GB, storage_dir: /c}
        - labels: {disk: none}
          storage_dir: null
        - {resource: nvme, storage_shards: 2}
        shards: others
        """,
    )
    (setup,) = setups = read_cluster_file(file)
    assert (setup.group, setup.model, setup.replicas) == ("team", "org/name", "all")
    assert (setup.num_threads, setup.trust_remote_code) == (4, True)
    assert (setup.placement, setup.shards) == ("STRICT_SPREAD", "others")
    assert setup.actor_options == {"gpu": {"resources": {"big": 1}, "num_cpus": 2}}
    assert setup.config == CacheConfig(
        block_size=32, storage_dir=("/a", "/b"), ttl_s=60, salt_quotas={"alice": "5GB"}
    )
    assert setup.nodes == (
        NodeStorage(node="10.0.0.7", settings={"ram_bytes": 2 * 10**9, "storage_dir": "/c"}),
        NodeStorage(labels={"disk": "none"}, settings={"storage_dir": None}),
        NodeStorage(resource="nvme", settings={"storage_shards": 2}),
    )
    assert read_cluster_file(write(tmp_path, dump_cluster_file(setups))) == setups
    arguments = setup.arguments()
    assert arguments["cache_config"] is setup.config
    taken = inspect.signature(KVCacheAdapter).parameters
    assert arguments.keys() <= taken.keys()


def test_several_models_take_what_stands_above_them_and_share_their_shards(tmp_path: Path) -> None:
    file = write(
        tmp_path,
        """
        group: team
        replicas: 2
        cache: {ram_bytes: 2GB, block_size: 32}
        models:
          chat: {model: a/b}
          coder: {model: c/d, replicas: all, cache: {block_size: 64, kv_dtype: int8}}
        """,
    )
    chat, coder = setups = read_cluster_file(file)
    assert (chat.group, chat.shards, chat.replicas) == ("team.chat", "team", 2)
    assert (coder.group, coder.shards, coder.replicas) == ("team.coder", "team", "all")
    assert (chat.config.block_size, coder.config.block_size) == (32, 64)
    assert (chat.config.ram_bytes, coder.config.ram_bytes) == (2 * 10**9, 2 * 10**9)
    assert read_cluster_file(write(tmp_path, dump_cluster_file(setups))) == setups


def test_what_the_command_says_goes_before_the_file_and_the_file_before_the_environment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LITECACHE_BLOCK_SIZE", "64")
    monkeypatch.setenv("LITECACHE_MAX_REQUESTS", "7")
    file = write(tmp_path, "model: m\nreplicas: 3\ncache: {block_size: 32, fsync: never}\n")
    (setup,) = read_cluster_file(file, {"replicas": 2, "model": "n", "cache": {"fsync": "always"}})
    assert (setup.model, setup.replicas) == ("n", 2)
    config = setup.config
    assert (config.block_size, config.fsync, config.max_requests) == (32, "always", 7)
    several = write(tmp_path, "models: {a: {model: x}}\n")
    with pytest.raises(ConfigError, match="model='n'"):
        read_cluster_file(several, {"model": "n"})


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "1: an empty file"),
        ("# nothing\n", "1: an empty file"),
        ("- a\n", "1: not a mapping"),
        ("model: m\ncache:\n  blok_size: 3\n", "3: cache.blok_size=3 is invalid: no such field. Did"),  # noqa: E501
        ("model: m\n\nreplica: 3\n", "3: replica=3 is invalid: no such field. Did you mean replicas?"),  # noqa: E501
        ("model: m\ncache:\n  block_size: 12\n", "3: cache.block_size=12 is invalid: a power"),
        ("model: m\ncache:\n  fsync: 5\n", "3: cache.fsync=5 is invalid: one of"),
        ("model: m\ncache:\n  ram_bytes: lots\n", "3: cache.ram_bytes='lots' is invalid: a positive"),  # noqa: E501
        ("model: m\ncache:\n  storage_dir: [/a, b]\n", "3: cache.storage_dir='b' is invalid: absolute"),  # noqa: E501
        ("model: m\ncache: [1]\n", "2: cache=[1] is invalid: a mapping"),
        ("model: m\ncache:\n  max_prefill_tokens: 50\n", "3: cache.max_prefill_tokens=50 is invalid"),  # noqa: E501
        ("cache: {}\n", "1: model=None is invalid: a hub's name"),
        ("model: 5\n", "1: model=5 is invalid: a text"),
        ("model: m\ngroup: a b\n", "2: group='a b' is invalid: 1 to 64"),
        ("model: m\ngroup: on\n", "2: group=True is invalid"),
        ("model: m\nmodel: n\n", "2: model a second time, as in line 1"),
        ("model: m\ncache:\n  fsync: never\n  fsync: always\n", "4: cache.fsync a second time"),
        ("model: m\n\tcache: {}\n", "2: not YAML: while scanning for the next token"),
        ("model: [m\n", "2: not YAML: while parsing a flow sequence"),
        ("model: m\n---\nmodel: n\n", "2: not YAML: expected a single document"),
        ("a: *b\n", "1: not YAML: found undefined alias"),
        ("model: m\nreplicas: 0\n", "2: replicas=0 is invalid: an integer from 1"),
        ("model: m\nreplicas: many\n", "2: replicas='many' is invalid: an integer from 1"),
        ("model: m\nreplicas: 010\n", "2: replicas='010' is invalid: a decimal number"),
        ("model: m\nreplicas: 1:30\n", "2: replicas='1:30' is invalid: a decimal number"),
        ("model: m\nreplicas: true\n", "2: replicas=True is invalid"),
        (f"model: m\nreplicas: {'9' * 5000}\n", "2: replicas='999"),
        ("model: m\ncache:\n  ttl_s: 1:30.5\n", "3: cache.ttl_s='1:30.5' is invalid: a decimal"),
        ("model: m\nplacement: EVEN\n", "2: placement='EVEN' is invalid: one of SPREAD"),
        ("model: m\ntrust_remote_code: 1\n", "2: trust_remote_code=1 is invalid: True or False"),
        ("model: m\nactor_options: {cpu: {}}\n", "2: actor_options='cpu' is invalid"),
        ("model: m\nactor_options:\n  gpu: {num_cpu: 3}\n", "2: actor_options['gpu']={'num_cpu': 3}"),  # noqa: E501
        ("model: !!python/object:os.system x\n", "1: a value tagged"),
        ("model: !!binary aGVsbG8=\n", "1: a value tagged"),
        ("model: !mine x\n", "1: a value tagged '!mine'"),
        ("on: yes\n", "1: on is no text: put it in quotes"),
        ("? [a]\n: b\n", "1: SequenceNode is no text"),
        ("<<: {model: m}\n", "1: <<={'model': 'm'} is invalid: no such field"),
        ("model: m\nnodes: {}\n", "2: nodes={} is invalid: a list"),
        ("model: m\nnodes:\n- ram_bytes: 3GB\n", "3: nodes[0].node, labels, resource=None"),
        ("model: m\nnodes:\n- {node: a}\n- {node: a, block_size: 3}\n", "4: nodes[1].block_size=3"),
        ("model: m\nnodes:\n- node: a\n  ram_bytes: -3\n", "4: nodes[0].ram_bytes=-3"),
        ("model: m\nnodes:\n- {node: ''}\n", "3: nodes[0].node='' is invalid: not empty"),
        ("model: m\nnodes:\n- labels: [a]\n", "3: nodes[0].labels=['a'] is invalid: a mapping"),
        ("model: m\nnodes:\n- 3\n", "3: nodes[0]=3 is invalid: a mapping"),
        ("models: {}\n", "1: models={} is invalid: a mapping of 1 to 64"),
        ("models:\n  a b: {model: m}\n", "2: models.a b=... is invalid: a name of"),
        ("models:\n  a: m\n", "2: models.a='m' is invalid: a mapping"),
        ("models:\n  a: {model: m, cache: {x: 3}}\n", "2: models.a.cache.x=3 is invalid"),
        ("models:\n  a: {}\n", "2: models.a.model=None is invalid"),
        ("model: m\nmodels:\n  a: {model: m}\n", "1: model='m' is invalid: absent beside models"),
        ("model: m\nshards: [a]\n", "2: shards=['a'] is invalid: a group"),
        (b"model: m\ngroup: \xe9\n", "2: not UTF-8: byte 0xe9"),
        (b"model: m\ngroup: \0\n", "2: a character that YAML does not allow"),
        ("[" * 2000, "1: nested more than"),
        ("{" * 1000, "1: nested more than"),
        ("&a [*a]", "1: nested more than"),
        ("a: " + "[" * 30 + "]" * 30, "1: nested more than"),
        (
            "a: &a [" + "x," * 50 + "]\nb: &b [" + "*a," * 50 + "]\nc: [" + "*b," * 50 + "]\n",
            "1: more than 20,000 values",
        ),
    ],
)  # fmt: skip
def test_whatever_is_wrong_is_named_by_line_field_and_value(
    tmp_path: Path, text: str | bytes, said: str
) -> None:
    assert refused(write(tmp_path, text)).startswith(said)


def test_names_of_salts_are_not_told(tmp_path: Path) -> None:
    for quotas in ("{pssst: 3QB}", "{pssst: 1GB, pssst: 2GB}", "{pssst: 010}"):
        file = write(tmp_path, f"model: m\ncache:\n  salt_quotas: {quotas}\n")
        said = refused(file)
        assert said.startswith("3: cache.salt_quotas")
        assert "pssst" not in said
    assert "pssst" not in refused(write(tmp_path, "model: m\ncache:\n  cache_salt: [pssst]\n"))
    assert "pssst" not in refused(write(tmp_path, "model: m\ncache: {salt_quota: {pssst: 1}}\n"))


def test_a_file_that_cannot_be_read_is_refused(tmp_path: Path) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    large = tmp_path / "large.yaml"
    large.write_text("model: m\n" + "#" * 300_000)
    for path in (tmp_path, tmp_path / "absent", Path("/dev/zero"), pipe, large):
        with pytest.raises(
            ConfigError, match=r"^config=.*a readable file of at most 262,144 bytes"
        ):
            read_cluster_file(path)
    for bad in (3, "", "a\0b", None):
        with pytest.raises(ConfigError, match=r"^config="):
            read_cluster_file(bad)  # type: ignore[arg-type]


_LEAVES: Any = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8)
_NAMES: Any = st.sampled_from(
    ["model", "models", "cache", "nodes", "node", "replicas", "ram_bytes", "group", "actor_options"]
)
_TREES: Any = st.recursive(
    _LEAVES,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(_NAMES, inner, max_size=4),
    max_leaves=12,
)


@given(tree=_TREES)
def test_any_tree_is_read_or_refused_by_its_line(tree: Any, tmp_path_factory: Any) -> None:
    file = write(tmp_path_factory.getbasetemp(), yaml.safe_dump(tree, allow_unicode=True))
    try:
        setups = read_cluster_file(file)
    except ConfigError as error:
        assert str(error).startswith(f"{file}:")  # noqa: PT017
    else:
        assert read_cluster_file(write(file.parent, dump_cluster_file(setups))) == setups
