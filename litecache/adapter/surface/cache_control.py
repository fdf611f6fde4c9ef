"""What a driver does with the cached blocks themselves, tier by tier and prefix by prefix.

Exporting and importing a prefix is the one place where a driver handles KV bytes: they come and go
by Ray's object store, in messages of at most `BATCH_BYTES`, between the file of the caller's
machine and the shards of any node.
"""

from __future__ import annotations

import hashlib
import itertools
import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import closing
from typing import Any, NamedTuple, TypeVar

from transformers import GenerationConfig

from litecache.actors.group import Group
from litecache.adapter.driver import Driver
from litecache.adapter.generation import translate
from litecache.adapter.pending import aborting
from litecache.adapter.prompts import check_prompt, check_prompts
from litecache.adapter.row_progress import Progress, check_progress, show_progress
from litecache.checks import check_path, check_seconds, check_text
from litecache.engine.kv_layout import LAYOUT_VERSION
from litecache.engine.progress import progress_bar
from litecache.errors import ConfigError, NothingStoredError, PrefixFileError, StorageError
from litecache.hashing import BlockKey, chain_keys
from litecache.storage.namespaces import namespace_of, salt_digest
from litecache.storage.prefix_file import PrefixFile, PrefixHeader, write_prefix
from litecache.token_ids import TokenIds

BATCH_BYTES = 32 << 20
_RUN_BYTES = 16 << 20
"""Bytes of a chain that go to one shard together, as those of a replica do."""
_SHOWN_BYTES = 1 << 30
"""What takes no longer than this many bytes shows no bar."""

T = TypeVar("T")


class PrefixReport(NamedTuple):
    """What was written to a file, or taken in from one.

    Attributes:
        tokens: of the prefix, from its start, whose KV was written or is stored now.
        asked: tokens of the prompt, or of the file.
        nbytes: of the file.
    """

    tokens: int
    asked: int
    nbytes: int


class _Block(NamedTuple):
    """One block of a KV group: the KV of `block_size` tokens at a position of the prefix."""

    position: int
    key: BlockKey
    parent: BlockKey
    nbytes: int


class _GoneError(Exception):
    """A block left the shards while the file was written; `index` blocks before it were there."""

    def __init__(self, index: int) -> None:
        super().__init__(index)
        self.index = index


def export_prefix(group: Group, tokens: TokenIds, salt: str, path: str) -> PrefixReport:
    """Write the longest stored beginning of a prompt, in whole blocks; what is only in a pool is
    saved first.

    Raises:
        NothingStoredError: nothing of it is stored.
        StorageError: the file cannot be written; there is none then.
        GroupUnavailableError: an actor that may hold some of it does not answer.
    """
    group.save_prefix(tokens, salt)
    blocks = _blocks(group.info, tokens, salt)
    holders = group.holders([block.key for block in blocks])
    found = zip(blocks, holders, strict=True)
    blocks_of_index = len(group.info.block_bytes)
    held = list(itertools.takewhile(lambda pair: pair[1] is not None, found))
    covered = len(held) // blocks_of_index
    while covered:
        header = _header(group.info, salt, tokens[: covered * group.info.block_size])
        try:
            nbytes = write_prefix(path, header, _fetch(group, held[: covered * blocks_of_index]))
        except _GoneError as gone:
            covered = gone.index
            continue
        return PrefixReport(len(header.tokens), len(tokens), nbytes)
    raise NothingStoredError(
        f"nothing of this prompt is stored (its first block has {group.info.block_size} tokens): "
        "generate from it, or warm it, before it is exported"
    )


def import_prefix(group: Group, path: str, salt: str) -> PrefixReport:
    """Store the blocks of a file, once all of it has been found sound.

    They are given to the shards in order; where one finds no room the rest is left out.

    Raises:
        PrefixFileError: the file is damaged, foreign, of another version or not readable.
        StorageError: the group has no tiers below the pool.
        GroupUnavailableError: a shard does not answer.
    """
    if not group.shards:
        raise StorageError("the group has neither RAM nor disk tier: nothing can be imported")
    with closing(PrefixFile(path, _header(group.info, salt, TokenIds()))) as file:
        tokens = file.header.tokens
        if int(tokens.array.min()) < 0 or int(tokens.array.max()) >= group.info.vocab_size:
            raise PrefixFileError(f"{path} cannot be imported: it has token ids of no token")
        blocks = _blocks(group.info, tokens, salt)
        total = sum(block.nbytes for block in blocks)
        file.verify(_bar("Checking", total))
        store = _Storing(group, salt)
        bar = _bar("Importing", total)
        for done, (block, data) in enumerate(zip(blocks, file.blocks(), strict=True), 1):
            if not store.add(block, data):
                break
            bar(done, len(blocks))
        store.send()
    stored = store.held // len(group.info.block_bytes) * group.info.block_size
    return PrefixReport(stored, len(tokens), file.nbytes)


def _header(info: Any, salt: str, tokens: TokenIds) -> PrefixHeader:
    return PrefixHeader(
        label=info.label,
        fingerprint=info.fingerprint,
        dtype=info.dtype,
        kv_dtype=info.kv_dtype,
        codec=info.tier_codec or "raw",
        layout=LAYOUT_VERSION,
        block_size=info.block_size,
        group_shapes=info.group_shapes,
        block_bytes=info.block_bytes,
        namespace=b"".join(info.roots("")),
        salt=salt_digest(salt),
        tokens=tokens,
    )


def _blocks(info: Any, tokens: TokenIds, salt: str) -> list[_Block]:
    """All blocks of a prefix in the file's order: by index, then by KV group."""
    roots = info.roots(salt)
    chains = [chain_keys(root, tokens.array, info.block_size) for root in roots]
    return [
        _Block(index, chain[index], chain[index - 1] if index else root, nbytes)
        for index in range(len(chains[0]))
        for chain, root, nbytes in zip(chains, roots, info.block_bytes, strict=True)
    ]


def _batches(items: Iterable[tuple[_Block, T]]) -> Iterator[list[tuple[_Block, T]]]:
    """Pieces of at most `BATCH_BYTES`, or of one block."""
    batch: list[tuple[_Block, T]] = []
    size = 0
    for item in items:
        if batch and size + item[0].nbytes > BATCH_BYTES:
            yield batch
            batch, size = [], 0
        batch.append(item)
        size += item[0].nbytes
    if batch:
        yield batch


def _fetch(group: Group, blocks: list[tuple[_Block, str | None]]) -> Iterator[bytes]:
    """The bytes of blocks, each from the shard beside it."""
    bar = _bar("Exporting", sum(block.nbytes for block, _ in blocks))
    done = 0
    for batch in _batches(blocks):
        found: dict[BlockKey, bytes | None] = {}
        for shard in dict.fromkeys(shard for _, shard in batch):
            keys = [block.key for block, its in batch if its == shard]
            found.update(zip(keys, group.fetch(str(shard), keys), strict=True))
        for block, _ in batch:
            data = found[block.key]
            if data is None or len(data) != block.nbytes:
                raise _GoneError(block.position)
            yield data
            bar(done := done + 1, len(blocks))


class _Storing:
    """Blocks on their way to the shards, a batch at a time.

    Attributes:
        held: how many, from the first, some shard holds now.
    """

    def __init__(self, group: Group, salt: str) -> None:
        self._group = group
        quotas = group.spec.config.salt_quotas
        self._namespace = namespace_of(group.info.label, salt, quotas)
        self._batch: list[tuple[_Block, bytes]] = []
        self._bytes = 0
        self._runs: dict[int, str] = {}
        self.held = 0
        self._full = False

    def add(self, block: _Block, data: bytes) -> bool:
        """One more block; False once a shard had no room."""
        if self._batch and self._bytes + block.nbytes > BATCH_BYTES:
            self.send()
        self._batch.append((block, data))
        self._bytes += block.nbytes
        return not self._full

    def send(self) -> None:
        """Give the blocks that were added to their shards."""
        if self._full:
            return
        shards = [self._shard(block) for block, _ in self._batch]
        held: dict[BlockKey, bool] = {}
        for shard in dict.fromkeys(shards):
            mine = [item for item, its in zip(self._batch, shards, strict=True) if its == shard]
            items = [(b.key, b.parent, self._namespace, data) for b, data in mine]
            keys = [block.key for block, _ in mine]
            held.update(zip(keys, self._group.store(shard, items), strict=True))
        self.held += len(list(itertools.takewhile(lambda item: held[item[0].key], self._batch)))
        self._full = not all(held.values())
        self._batch, self._bytes = [], 0

    def _shard(self, block: _Block) -> str:
        """By rendezvous, as replicas choose: a run of a chain lies together."""
        run = block.position // max(1, _RUN_BYTES // block.nbytes)
        if run not in self._runs:
            start = block.key

            def weight(name: str) -> bytes:
                return hashlib.blake2b(start + name.encode()).digest()

            self._runs[run] = max(self._group.shards, key=weight)
        return self._runs[run]


def _bar(what: str, nbytes: int) -> Any:
    return progress_bar(what) if nbytes >= _SHOWN_BYTES else lambda done, total: None


WARMED_AT_ONCE = 64
TIERS = ("gpu", "ram", "disk", "all")


class CacheSurface(Driver):
    """Saving, dropping, pinning, warming and moving of what is cached."""

    def flush(self, timeout_s: float = 30.0) -> dict[str, Any]:
        """Save everything that is cached; see `Group.flush`."""
        self._check_open()
        return self.group.flush(check_seconds("timeout_s", timeout_s))

    def clear(self, tier: str = "all") -> None:
        """Drop cached blocks of a tier: "gpu", "ram", "disk" or "all".

        Blocks in "gpu" and "ram" are saved to the tiers below first.
        """
        self._check_open()
        if not isinstance(tier, str) or tier not in TIERS:
            raise ConfigError("tier", tier, f"one of {', '.join(TIERS)}")
        self.group.clear(tier)

    def pin(self, prompt: Any, *, cache_salt: str | None = None) -> int:
        """Keep a prefix that was computed on disk until `unpin`, over restarts too.

        What is still only in the pool or in RAM is saved first.

        Args:
            prompt: token ids, a list or a tensor; a trailing part of a block is left out.
            cache_salt: whose blocks; None = the group's own.

        Returns:
            How many of its leading tokens are pinned now.

        Raises:
            ConfigError: no token ids.
        """
        return self._set_pinned(prompt, cache_salt, True)

    def unpin(self, prompt: Any, *, cache_salt: str | None = None) -> int:
        """Let a prefix be evicted again; arguments and result as in `pin`."""
        return self._set_pinned(prompt, cache_salt, False)

    def _set_pinned(self, prompt: Any, cache_salt: str | None, pinned: bool) -> int:
        """Tokens of the leading blocks that some shard holds in every KV group."""
        self._check_open()
        tokens, salt = check_prompt(prompt, 0, self.info.max_model_len), self._salt(cache_salt)
        if pinned:
            self.flush()
        size = self.info.block_size
        chains = [chain_keys(root, tokens.array, size) for root in self.info.roots(salt)]
        keys = [key for chain in chains for key in chain]
        held = dict(zip(keys, self.group.set_pinned(keys, pinned), strict=True))
        in_all = (all(held[key] for key in block) for block in zip(*chains, strict=True))
        return int(size) * sum(1 for _ in itertools.takewhile(bool, in_all))

    def warm(
        self, prompts: Sequence[Any], *, cache_salt: str | None = None, progress: bool | str = False
    ) -> list[dict[str, int]]:
        """Compute and store prefixes without generating, so that later calls find them.

        They are stored as those of any call, by the group's `admission`.

        Args:
            prompts: texts, or token ids; of one as long as the model takes the last token is left
                out.
            cache_salt: share the blocks only with calls of the same salt.
            progress: as in `generate`; a bar of prompts.

        Returns:
            Per prompt its tokens by the tier where they were found, and under "computed" the rest.

        Raises:
            ConfigError: a prompt is invalid; nothing was sent.
            LiteCacheError: a request failed.
        """
        self._check_open()
        progress = check_progress(progress)
        most = self.info.max_model_len
        if isinstance(prompts, (list, tuple)):
            prompts = [self._encode(p) if isinstance(p, str) else p for p in prompts]
        # a request needs room for the token that it draws
        checked = [tokens[: most - 1] for tokens in check_prompts(prompts, most)]
        settings = translate(GenerationConfig(max_new_tokens=1), {}, GenerationConfig())
        found: list[dict[str, int]] = []

        def so_far() -> Progress:
            done, total = len(found), len(checked)
            return Progress(done, total, f"{done:,}/{total:,} prompts")

        jobs = [(tokens, len(tokens), settings) for tokens in checked]
        rows = self._rows(jobs, self._use(cache_salt), None, None)
        with show_progress(progress, "Warming", so_far):
            for start in range(0, len(rows), WARMED_AT_ONCE):
                batch = rows[start : start + WARMED_AT_ONCE]
                with aborting(batch, self._replicas.abort):
                    self._replicas.submit(batch)
                    for row in batch:
                        row.wait()
                        there = row.found_tokens
                        computed = len(row.request.prompt) - sum(there.values())
                        found.append({**there, "computed": computed})
        return found

    def export_prefix(
        self, prompt: Any, path: str | os.PathLike[str], *, cache_salt: str | None = None
    ) -> PrefixReport:
        """Write the stored KV of a prompt's beginning to one file, for `import_prefix`.

        What is only in the pool is saved first; nothing is computed. The file holds the prompt's
        token ids and its KV, readable by its owner alone; a file of that name is replaced.

        Args:
            prompt: text, or token ids.
            path: of the file.
            cache_salt: whose blocks; None = the group's own.

        Returns:
            How many tokens of how many are in the file: whole blocks from the start, as far as
            any tier holds them in every KV group.

        Raises:
            ConfigError: no token ids, or no path.
            StorageError: nothing of it is stored, or the file cannot be written: there is none.
        """
        self._check_open()
        path = check_path("path", path)
        return export_prefix(self.group, self._tokens(prompt), self._salt(cache_salt), path)

    def import_prefix(
        self, path: str | os.PathLike[str], *, cache_salt: str | None = None
    ) -> PrefixReport:
        """Store the KV of a file of `export_prefix` in the tiers, as if it had been computed here.

        The whole file is checked before the first block is stored. Checksums find damage and not
        forgery: import files of people whom you trust.

        Args:
            path: of the file.
            cache_salt: the one that it was exported under; None = the group's own.

        Returns:
            How many tokens of how many are stored now.

        Raises:
            PrefixFileError: the file is damaged, of another version, model, layout or salt, or
                cannot be read; nothing was stored.
            StorageError: the group has no tiers to store it in.
        """
        self._check_open()
        report = import_prefix(self.group, check_path("path", path), self._salt(cache_salt))
        self.flush()
        return report

    def delete(self, *, cache_salt: str) -> int:
        """Delete everything that is cached under a salt, in all tiers, of every model stored there.

        Requests of that salt that are open go on; what they compute from here on is neither shared
        nor stored. Calls that begin later store again.

        Args:
            cache_salt: the salt; "" = what was stored without one.

        Returns:
            How many blocks pools and shards held of it, each copy counted.

        Raises:
            ConfigError: no text.
            GroupUnavailableError: names the actors that did not answer; the others have done it.
        """
        self._check_open()
        return self.group.delete_salt(check_text("cache_salt", cache_salt))
