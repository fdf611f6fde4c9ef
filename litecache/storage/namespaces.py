"""Names under which blocks are stored, for reports and quotas; they are no part of a block's key.

Blocks of a salt with a quota get a namespace of their own. It names the salt by a digest, because a
salt may be a secret and names are written to disk. All other blocks go by the model's label alone,
so that a new salt for each user does not fill the table of names.
"""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Mapping

_MARK = " salt-"


def salt_digest(salt: str) -> str:
    """16 hex digits that stand for a salt."""
    return hashlib.blake2b(salt.encode(), digest_size=8).hexdigest()


def namespace_of(label: str, salt: str, with_quota: Collection[str]) -> str:
    """Namespace of a request's blocks.

    Args:
        label: readable name of the model.
        salt: the request's.
        with_quota: salts that have a quota.
    """
    return f"{label}{_MARK}{salt_digest(salt)}" if salt in with_quota else label


def quota_of(namespace: str, quotas: Mapping[str, int]) -> int | None:
    """Bytes that a namespace may take on disk: by its own name, or by its salt's digest."""
    return quotas.get(namespace, quotas.get(namespace.rpartition(_MARK)[2]))
