"""Where LiteCache keeps what it can make again: converted models, fingerprints, compiled code.

One folder, `$LITECACHE_HOME` or `~/.cache/litecache`; deleting it costs time, never data. The KV
itself lives in `CacheConfig.storage_dir`, not here.
"""

from __future__ import annotations

import os
from pathlib import Path

from litecache.errors import ConfigError


def litecache_home() -> Path:
    """The cache folder, read from the environment at each call; it need not exist yet.

    Raises:
        ConfigError: `LITECACHE_HOME` is not an absolute path.
    """
    text = os.environ.get("LITECACHE_HOME")
    if not text:
        return Path.home() / ".cache" / "litecache"
    home = Path(text).expanduser()
    if not home.is_absolute():
        raise ConfigError("LITECACHE_HOME", text, "an absolute path")
    return home


def models_folder() -> Path:
    """Where converted and handed-over models lie, one folder per fingerprint."""
    return litecache_home() / "models"
