"""Which committed blocks are worth a disk write: `all`, `reused` (on second sight), `none`."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import OrderedDict

from ..errors import ConfigError
from ..hashing import BlockKey

_REMEMBERED = 200_000


class Admission(ABC):
    """Decides per block; called under the store's lock."""

    @abstractmethod
    def first(self, key: BlockKey) -> bool:
        """A block is committed that the shard does not hold: write it to disk?"""

    @abstractmethod
    def again(self, key: BlockKey) -> bool:
        """A block that is only in RAM was used or committed again: write it now?"""


class AdmitAll(Admission):
    """Write every block."""

    def first(self, key: BlockKey) -> bool:
        """Yes."""
        return True

    def again(self, key: BlockKey) -> bool:
        """Yes: its disk copy was evicted, and here it is in use."""
        return True


class AdmitNone(Admission):
    """Write nothing: the disk is read only for what it already holds."""

    def first(self, key: BlockKey) -> bool:
        """No."""
        return False

    def again(self, key: BlockKey) -> bool:
        """No."""
        return False


class AdmitReused(Admission):
    """Write on second sight, while the first is among the last 200,000."""

    def __init__(self) -> None:
        # a plain dict would take longer and longer to find its first key
        self._seen: OrderedDict[BlockKey, None] = OrderedDict()

    def first(self, key: BlockKey) -> bool:
        """Yes when it was seen before it left RAM."""
        if key in self._seen:
            del self._seen[key]
            return True
        self._seen[key] = None
        if len(self._seen) > _REMEMBERED:
            self._seen.popitem(last=False)
        return False

    def again(self, key: BlockKey) -> bool:
        """Yes."""
        self._seen.pop(key, None)
        return True


_POLICIES: dict[str, type[Admission]] = {"all": AdmitAll, "reused": AdmitReused, "none": AdmitNone}


def get_admission(name: str) -> Admission:
    """A fresh policy by name.

    Raises:
        ConfigError: there is none; the message lists the names.
    """
    if name not in _POLICIES:
        raise ConfigError("admission", name, "one of " + ", ".join(sorted(_POLICIES)))
    return _POLICIES[name]()
