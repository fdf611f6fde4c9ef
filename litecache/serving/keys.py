"""API keys: who may ask, under which name, and which cache salt is theirs.

A file holds one key a line, and behind it a name for logs and metrics. Of a key only digests are
kept, compared in constant time. The salt is derived from the key, so that no two keys ever find
each other's blocks, in any tier, and a client's own `cache_salt` only divides what is its key's.
"""

from __future__ import annotations

import hashlib
import hmac
import logging
import os
import stat
from dataclasses import dataclass

from litecache.checks import check_path
from litecache.errors import ConfigError, first_line, outline

logger = logging.getLogger(__name__)

MIN_KEY, MAX_KEY = 16, 512
MAX_KEYS = 10_000
_VALID = f"a file with one key of {MIN_KEY} to {MAX_KEY} characters a line, and perhaps its name"


@dataclass(frozen=True)
class Tenant:
    """Whose a request is.

    Attributes:
        name: for logs and metrics; no secret.
        salt: of all its blocks; "" = of nobody.
    """

    name: str
    salt: str

    def salt_of(self, cache_salt: str | None) -> str | None:
        """The salt of a request that gives one of its own; None = the group's.

        Whatever a client sends, it stays within its key's.
        """
        if not self.salt:
            return cache_salt
        if not cache_salt:
            return self.salt
        # one length: no salt of a client's continues another one
        inner = hashlib.blake2b(cache_salt.encode(), key=self.salt.encode()[:64], digest_size=32)
        return f"{self.salt}:{inner.hexdigest()}"


ANYBODY = Tenant("anybody", "")


class ApiKeys:
    """The keys of a file.

    Args:
        tenants: by digest of their key.
    """

    def __init__(self, tenants: dict[bytes, Tenant]) -> None:
        self._tenants = tenants

    def __len__(self) -> int:
        return len(self._tenants)

    @classmethod
    def read(cls, path: str) -> ApiKeys:
        """Read a file of keys.

        Raises:
            ConfigError: it cannot be read, or a line is no key; tells its number, never the key.
        """
        path = check_path("api_keys", path, _VALID)
        try:
            with open(path, encoding="utf-8") as file:
                mode = os.fstat(file.fileno()).st_mode
                text = file.read(MAX_KEYS * (MAX_KEY + 100))
        except (OSError, UnicodeError) as error:
            raise ConfigError("api_keys", path, f"{_VALID} ({first_line(error)})") from error
        if stat.S_ISREG(mode) and mode & 0o077:
            logger.warning("%s can be read by other users: chmod 600 it", path)
        tenants: dict[bytes, Tenant] = {}
        names: set[str] = set()
        for number, line in enumerate(text.splitlines(), 1):
            key, _, name = line.strip().partition(" ")
            if not key or key.startswith("#"):
                continue
            place = f"line {number} of {path}"
            usable = key.isascii() and key.isprintable() and MIN_KEY <= len(key) <= MAX_KEY
            if not usable or len(tenants) >= MAX_KEYS:
                valid = (
                    f"{MIN_KEY} to {MAX_KEY} printable ASCII characters, at most {MAX_KEYS} keys"
                )
                raise ConfigError(f"api_keys: {place}", outline(key), valid)
            digest = _digest(key)
            name = name.strip() or f"key-{hashlib.blake2b(digest, digest_size=4).hexdigest()}"
            if digest in tenants or name in names or not name.isprintable() or len(name) > 64:
                valid = "a key and a name that no other line has, of at most 64 characters"
                raise ConfigError(f"api_keys: {place}", outline(line), valid)
            names.add(name)
            tenants[digest] = Tenant(name, _salt(key))
        if not tenants:
            raise ConfigError("api_keys", path, f"{_VALID}: there is none")
        return cls(tenants)

    def find(self, authorization: str | None) -> Tenant | None:
        """Whose key a header `Authorization: Bearer KEY` holds, None = nobody's.

        Every key is compared, in constant time.
        """
        scheme, _, key = (authorization or "").partition(" ")
        given = _digest(key.strip() if scheme.lower() == "bearer" else "")
        found = None
        for digest, tenant in self._tenants.items():
            if hmac.compare_digest(digest, given):
                found = tenant
        return found


def _digest(key: str) -> bytes:
    return hashlib.blake2b(
        key.encode("utf-8", "replace"), digest_size=32, person=b"lc-api-key"
    ).digest()


def _salt(key: str) -> str:
    digest = hashlib.blake2b(key.encode(), digest_size=32, person=b"lc-api-salt")
    return f"key:{digest.hexdigest()}"
