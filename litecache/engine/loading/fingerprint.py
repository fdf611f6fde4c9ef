"""What makes two models the same model: a digest of the config and of all weight bytes.

The fingerprint is part of every block key's namespace, so KV is shared between processes, and found
again after a restart, exactly when config and weights are bitwise equal; names and paths do not
matter. Reading gigabytes at each start would be wasteful, so file digests are cached in
`$LITECACHE_HOME/fingerprints`, keyed by the file's path, size, times and inode. The digest is
xxh3_128: it tells files apart, it does not defend against someone who forges weights.
"""

from __future__ import annotations

import contextlib
import json
import mmap
import os
import tempfile
import time
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

import xxhash

from litecache.errors import ConfigError
from litecache.paths import litecache_home, make_private

if TYPE_CHECKING:
    from torch import nn

WEIGHT_SUFFIXES = (".safetensors", ".bin", ".pt", ".pth", ".gguf", ".msgpack", ".h5")
# Beside config.json and the weights; `config.X.json` is read by version X of transformers.
_FORWARD_FILES = ("*.index.json", "config.*.json", "adapter_config.json", "quant*.json", "**/*.py")
# Where the files came from and which library wrote them changes no KV byte.
_IGNORED_CONFIG_FIELDS = frozenset(
    ("_name_or_path", "_model_name_or_path", "transformers_version", "_commit_hash")
)
_CHUNK_BYTES = 64 << 20
# A file that changed this recently could change again within one tick of its timestamp.
_SETTLED_S = 1.0


def file_digest(path: Path) -> str:
    """The xxh3_128 of a file's bytes, from the cache while path, size, times and inode stay.

    Returns:
        32 hex digits.

    Raises:
        ConfigError: the file cannot be read.
    """
    try:
        path = path.resolve(strict=True)
        status = path.stat()
        name = xxhash.xxh3_128_hexdigest(os.fsencode(path))
        kept = litecache_home() / "fingerprints" / f"{name}.json"
        identity = [str(path), status.st_size, status.st_mtime_ns, status.st_ctime_ns]
        identity.append(status.st_ino)
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
            found = json.loads(kept.read_text(encoding="utf-8"))
            if found["file"] == identity and isinstance(found["digest"], str):
                return found["digest"]
        digest = _hash_file(path, status.st_size)
    except OSError as error:
        raise ConfigError("model file", str(path), f"readable ({error.strerror})") from error
    if time.time() - status.st_mtime > _SETTLED_S:
        write_kept(kept, {"file": identity, "digest": digest})
    return digest


def model_fingerprint(folder: Path, *, trust_remote_code: bool = False) -> str:
    """The fingerprint of a model folder: all in it that changes what a forward pass computes.

    That is its config, all its weights with the index that says which file holds which, an adapter
    beside them, quantisation settings and its own Python code; not what concerns text or sampling.

    Args:
        folder: holds `config.json` and weight files, as `save_pretrained` writes them.
        trust_remote_code: whether its code runs in place of that of transformers.

    Returns:
        32 hex digits.

    Raises:
        ConfigError: no folder, no config or no weights, or a file that cannot be read.
    """
    config_file = folder / "config.json"
    if not config_file.is_file():
        raise ConfigError("model", str(folder), "a folder with a config.json")
    weights = sorted(p for p in folder.iterdir() if p.suffix in WEIGHT_SUFFIXES and p.is_file())
    if not weights:
        raise ConfigError("model", str(folder), f"a folder with {', '.join(WEIGHT_SUFFIXES)} files")
    try:
        config = dict(json.loads(config_file.read_text(encoding="utf-8")).items())
    except (OSError, ValueError, AttributeError) as error:
        valid = f"a readable JSON object ({error})"
        raise ConfigError("config.json", str(config_file), valid) from error
    files = [*weights, *(p for kind in _FORWARD_FILES for p in sorted(folder.glob(kind)))]
    with ThreadPoolExecutor(max_workers=min(8, os.cpu_count() or 1)) as pool:
        digests = list(pool.map(file_digest, files))
    named = {str(p.relative_to(folder)): d for p, d in zip(files, digests, strict=True)}
    if trust_remote_code and "auto_map" in config:
        named["trust_remote_code"] = "True"
    return combined_fingerprint(config, named)


def module_fingerprint(module: nn.Module, config: Mapping[str, Any]) -> str:
    """The fingerprint of a model in memory, over its config, its state and all its buffers.

    It is not the same as `model_fingerprint` of the module's files.
    """
    import torch

    digests = {}
    for name, tensor in sorted({**dict(module.named_buffers()), **module.state_dict()}.items()):
        raw = tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy()
        digests[name] = f"{tensor.dtype}{list(tensor.shape)}{xxhash.xxh3_128_hexdigest(raw)}"
    return combined_fingerprint(config, digests)


def random_fingerprint(config: Mapping[str, Any], seed: int) -> str:
    """The fingerprint of random weights: the same config, seed and torch draw the same numbers."""
    import torch

    return combined_fingerprint(config, {"random": f"seed={seed} torch={torch.__version__}"})


def combined_fingerprint(config: Mapping[str, Any], digests: Mapping[str, str]) -> str:
    """The fingerprint of a config and of what else belongs to a model, by name."""
    settings = {k: v for k, v in config.items() if k not in _IGNORED_CONFIG_FIELDS}
    text = json.dumps([settings, dict(digests)], sort_keys=True, default=str)
    return xxhash.xxh3_128_hexdigest(text.encode())


def _hash_file(path: Path, size: int) -> str:
    state = xxhash.xxh3_128()
    if size:
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            data.madvise(mmap.MADV_SEQUENTIAL)
            with memoryview(data) as view:
                for start in range(0, size, _CHUNK_BYTES):
                    state.update(view[start : start + _CHUNK_BYTES])
    return state.hexdigest()


def write_kept(file: Path, value: Mapping[str, Any]) -> None:
    """Best effort, through a rename: a cache folder that cannot be written only costs time."""
    with contextlib.suppress(OSError):
        make_private(file.parent)
        descriptor, temporary = tempfile.mkstemp(dir=file.parent, suffix=".tmp")
        with os.fdopen(descriptor, "w", encoding="utf-8") as out:
            json.dump(value, out)
        os.replace(temporary, file)
