"""`KVCacheAdapter`: Hugging Face's `generate` over a group of LiteCache actors.

The driver's side: it starts or joins the actors and never holds weights or KV. What can be called
is in surface/ and chat_surface.py; requests of all threads of a driver share one poll per replica.
"""

from __future__ import annotations

import os
import uuid
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NoReturn

from litecache.actors.cluster import open_ray, refuse_inherited_ray
from litecache.actors.found_groups import exists
from litecache.actors.group import Group
from litecache.actors.group_spec import GroupSpec, check_actor_options, choose_num_gpus
from litecache.actors.naming import DEFAULT_GROUP, DRAIN_TIMEOUT_S, check_group_name
from litecache.actors.operating.cluster_file import read_cluster_file
from litecache.actors.operating.scaling import ScaleReport, scale_group
from litecache.actors.placement import (
    NodeStorage,
    check_node_storage,
    check_placement,
    check_replicas,
)
from litecache.adapter.chat_surface import ChatSurface
from litecache.adapter.driver import has_methods
from litecache.adapter.sources import resolve_model
from litecache.adapter.stats import CacheStats
from litecache.adapter.surface.cache_control import CacheSurface
from litecache.adapter.surface.forwarding import ForwardSurface
from litecache.adapter.surface.model_surface import ModelSurface
from litecache.checks import check_flag, check_threads
from litecache.config import CacheConfig
from litecache.engine.loading.model_checks import check_config, check_limits
from litecache.errors import ConfigError, GroupError, LiteCacheError

if TYPE_CHECKING:
    from typing_extensions import Self


class KVCacheAdapter(ChatSurface, ForwardSurface, CacheSurface, ModelSurface):
    """A model on Ray actors with a paged, tiered, persistent KV cache.

    Args:
        model: a hub name, a folder, a .gguf file, a transformers module, or a `PretrainedConfig`
            with `weights="random"`.
        cache_config: settings; None = defaults, or the group's own when joining one.
        tokenizer: for `stream`; None = the model's.
        group: joined when it runs, else started under this name. None = a private group, or with
            `detached` the group "default".
        detached: a group started here outlives this driver, until `litecache down`.
        actor_options: Ray options by kind of actor: "gpu", "shard", "coordinator".
        weights: "auto", or "random" for benchmarks.
        seed: of random weights.
        replicas: number of `GpuCache` actors of a group started here, or "all": one per GPU of the
            cluster, or per node where there is none.
        num_threads: torch's threads in each replica on a CPU; None = the machine's cores.
        trust_remote_code: let Python code that comes with the model run, here and in the actors.
        placement: how replicas are spread over nodes: "SPREAD", "PACK", "STRICT_SPREAD" or
            "STRICT_PACK", as Ray's placement groups have it.
        nodes: storage settings of single nodes, which go before those of `cache_config`.
        shards: a group whose shards (RAM and disks) the group started here shares with other
            models; for detached groups. None = shards of its own.

    Attributes:
        config: the model's configuration.
        generation_config: the model's defaults; changes apply to later calls, as in HF.
        group: the actors.

    Raises:
        LiteCacheError: something is refused; nothing that was started stays behind.
    """

    def __init__(
        self,
        model: Any,
        *,
        cache_config: CacheConfig | None = None,
        tokenizer: Any = None,
        group: str | None = None,
        detached: bool = False,
        actor_options: dict[str, dict[str, Any]] | None = None,
        weights: str = "auto",
        seed: int = 0,
        replicas: int | str = 1,
        num_threads: int | None = None,
        trust_remote_code: bool = False,
        placement: str = "SPREAD",
        nodes: Sequence[NodeStorage] | None = None,
        shards: str | None = None,
    ) -> None:
        refuse_inherited_ray()
        options = check_actor_options(actor_options)
        if cache_config is not None and not isinstance(cache_config, CacheConfig):
            raise ConfigError("cache_config", cache_config, "a litecache.CacheConfig or None")
        check_replicas("replicas", replicas)
        check_placement("placement", placement)
        nodes = None if nodes is None else check_node_storage(nodes)
        check_threads("num_threads", num_threads)
        check_flag("detached", detached)
        check_flag("trust_remote_code", trust_remote_code)
        ways = (("decode", "__call__"), ("decode", "encode"))
        if tokenizer is not None and not any(has_methods(tokenizer, *way) for way in ways):
            raise ConfigError("tokenizer", tokenizer, "a tokenizer of transformers, or None")
        if group is not None:
            check_group_name(group)
        if shards is not None:
            check_group_name(shards)
            if group is None or not detached:
                valid = "None, or a group's name with group= and detached=True"
                raise ConfigError("shards", shards, valid)
        config = cache_config or CacheConfig()
        resolved = resolve_model(
            model,
            weights=weights,
            seed=seed,
            trust_remote_code=trust_remote_code,
            models_bytes=config.models_bytes,
        )
        # The actors check all of this, too; here it costs no process.
        check_config(resolved.config)
        check_limits(resolved.config, config)
        open_ray()
        joinable = group or (DEFAULT_GROUP if detached else None)
        spec = GroupSpec(
            joinable or f"private-{uuid.uuid4().hex[:8]}",
            resolved.source,
            config,
            replicas,
            num_threads,
            choose_num_gpus(config, options),
            placement,
            nodes or (),
            shards,
            detached,
            options,
        )
        expected = None if joinable is None else spec.describe()
        if expected is not None and cache_config is None:
            expected["config"] = None
        if expected is not None:
            expected |= {"nodes": nodes and expected["nodes"], "shard_group": shards}
        joined, started = _join_or_start(spec, expected)
        # Each driver has its own, where it says so.
        says = cache_config is not None or "LITECACHE_CACHE_SALT" in os.environ
        salt = (config if says else joined.spec.config).cache_salt
        owned = started and not detached
        super().__init__(joined, resolved, tokenizer=tokenizer, salt=salt, owned=owned)

    @classmethod
    def from_config(
        cls, path: str | os.PathLike[str], *, name: str | None = None, **arguments: Any
    ) -> Self:
        """Join, or start, a group that a YAML file describes; see docs/cluster.md.

        Args:
            path: of the file, as for `litecache up --config`.
            name: of the model, where the file has several.
            **arguments: of `KVCacheAdapter`, which go before the file.

        Raises:
            ConfigError: the file has no such model, or a field of it is unknown or wrong; names
                file, line, field and value.
            LiteCacheError: as `KVCacheAdapter`.
        """
        setups = {setup.name: setup for setup in read_cluster_file(path)}
        if name not in setups:
            names = ", ".join(str(each) for each in setups)
            raise ConfigError("name", name, f"a model of {os.fspath(path)}, which has {names}")
        setup = setups[name]
        # where models share shards these outlive the driver
        lasting = {"detached": setup.shards is not None}
        return cls(**{**lasting, **setup.arguments(), **arguments})

    def scale(self, replicas: int | str, *, timeout_s: float = DRAIN_TIMEOUT_S) -> ScaleReport:
        """Give the group so many replicas; those that go are drained first.

        Args:
            replicas: how many, or "all": one per GPU of the cluster, or per node without.
            timeout_s: how long running requests may take to end before they go on elsewhere.

        Raises:
            GroupUnavailableError: there is no room; names what is missing.
            LiteCacheError: the group is another driver's own, or new replicas were refused.
        """
        self._check_open()
        return scale_group(self.group, replicas, timeout_s=timeout_s)

    def stats(self) -> CacheStats:
        """Counters and state, added up over the group's actors."""
        self._check_open()
        return CacheStats.from_status(self.group.status())

    def __reduce__(self) -> NoReturn:
        raise LiteCacheError(
            "an adapter cannot be pickled or copied: start its group by a name and join it where it"
            " is needed, by KVCacheAdapter(model, group=NAME) (this one's group is"
            f" {self.group.spec.group!r})"
        )

    def __repr__(self) -> str:
        return f"KVCacheAdapter({self._source.name!r}, group={self.group.spec.group!r})"


def _join_or_start(spec: GroupSpec, expected: Any) -> tuple[Group, bool]:
    """The group, and whether it was started here; `expected` of one that runs, None = a new one."""
    if expected is None or not exists(spec.group):
        try:
            return Group.start(spec), True
        except GroupError:
            # Another driver may have started it in the meantime: then this one joins.
            if expected is None or not exists(spec.group):
                raise
    return Group.attach(spec.group, expected), False
