"""Every error that reaches a user.

All derive from `LiteCacheError`. A message names the field, the value that was given and what
would be valid; `ConfigError` builds such a message when it is given the three parts.
"""

from __future__ import annotations


class LiteCacheError(Exception):
    """Root of all errors raised by LiteCache."""


class ConfigError(LiteCacheError, ValueError):
    """A field of a config or of a request is invalid.

    `ConfigError("block_size", 12, "a power of two from 8 to 256")` and
    `ConfigError("a sentence of its own")` are both accepted.
    """

    def __init__(self, field: str, value: object = None, valid: str | None = None) -> None:
        self.field, self.value, self.valid = field, value, valid
        super().__init__(field if valid is None else f"{field}={value!r} is invalid: {valid}")

    def __reduce__(self) -> tuple[type[ConfigError], tuple[str, object, str | None]]:
        return type(self), (self.field, self.value, self.valid)


class ModelNotSupportedError(ConfigError):
    """A model that LiteCache refuses to run, with the reason."""


class CapacityError(LiteCacheError, RuntimeError):
    """Something will never fit; the message carries the numbers."""


class StorageError(LiteCacheError, RuntimeError):
    """The storage tier failed or was used wrongly."""


class StorageLockedError(StorageError):
    """Another live process owns the storage folder."""


class StorageFormatError(StorageError):
    """A file of the storage folder is not of the format this version reads."""


class StorageFullError(StorageError):
    """The disk, the shared memory or the configured bound has no room."""


class GroupError(LiteCacheError, RuntimeError):
    """A group of actors could not be started, joined or reached."""


class GroupMismatchError(GroupError):
    """Joined a group of other settings, model or version."""


class GroupUnavailableError(GroupError):
    """No actor of the group answers."""


class RequestAborted(LiteCacheError, RuntimeError):  # noqa: N818 - the name is public API
    """The request was aborted before it finished."""


class RequestTimeout(LiteCacheError, TimeoutError):  # noqa: N818 - the name is public API
    """The request or a call on its behalf exceeded its deadline."""


class KernelError(LiteCacheError, ValueError):
    """An argument of a kernel has a wrong shape, stride, dtype or device."""
