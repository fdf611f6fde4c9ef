"""What a driver does with the cached blocks themselves, tier by tier and prefix by prefix."""

from __future__ import annotations

import itertools
import os
from collections.abc import Sequence
from typing import Any

from transformers import GenerationConfig

from litecache.adapter.driver import Driver
from litecache.adapter.generation import translate
from litecache.adapter.pending import aborting
from litecache.adapter.prefix_files import PrefixReport, export_prefix, import_prefix
from litecache.adapter.prompts import check_prompt, check_prompts
from litecache.adapter.row_progress import Progress, check_progress, show_progress
from litecache.checks import check_path, check_seconds, check_text
from litecache.errors import ConfigError
from litecache.hashing import chain_keys

WARMED_AT_ONCE = 64
TIERS = ("gpu", "ram", "disk", "all")


class CacheSurface(Driver):
    """Saving, dropping, pinning, warming and moving of what is cached."""

    def flush(self, timeout_s: float = 30.0) -> dict[str, Any]:
        """Save everything that is cached; see `Group.flush`."""
        return self.group.flush(check_seconds("timeout_s", timeout_s))

    def clear(self, tier: str = "all") -> None:
        """Drop cached blocks of a tier: "gpu", "ram", "disk" or "all".

        Blocks in "gpu" and "ram" are saved to the tiers below first.
        """
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
        self._check_open()
        return self._set_pinned(prompt, cache_salt, True)

    def unpin(self, prompt: Any, *, cache_salt: str | None = None) -> int:
        """Let a prefix be evicted again; arguments and result as in `pin`."""
        return self._set_pinned(prompt, cache_salt, False)

    def _set_pinned(self, prompt: Any, cache_salt: str | None, pinned: bool) -> int:
        """Tokens of the leading blocks that some shard holds in every KV group."""
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

        with show_progress(progress, "Warming", so_far):
            for start in range(0, len(checked), WARMED_AT_ONCE):
                batch = checked[start : start + WARMED_AT_ONCE]
                jobs = [(tokens, len(tokens), settings) for tokens in batch]
                rows = self._start(jobs, self._use(cache_salt), None, None)
                with aborting(rows, self._replicas.abort):
                    for row in rows:
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
