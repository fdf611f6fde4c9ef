"""Token ids as one compact, immutable sequence.

A prompt of 32,768 tokens as a tuple costs milliseconds wherever it is pickled, checked or turned
into an array; as an array it costs microseconds. What it is compared with or added to may be any
sequence of integers.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any, overload

import numpy as np
import numpy.typing as npt

from litecache.errors import ConfigError

TokenArray = npt.NDArray[np.int64]


class TokenIds(Sequence[int]):
    """An immutable sequence of token ids.

    Args:
        ids: integers; an int64 array is copied.

    Raises:
        ConfigError: not integers of at most 64 bits.

    Attributes:
        array: int64 `[num_tokens]`, read-only.
    """

    __slots__ = ("array",)

    array: TokenArray

    def __init__(self, ids: Iterable[int] = ()) -> None:
        if isinstance(ids, TokenIds):
            array = ids.array
        else:
            array = _as_array(ids).reshape(-1)
            array.setflags(write=False)
        object.__setattr__(self, "array", array)

    def __setattr__(self, name: str, value: object) -> None:
        raise AttributeError(f"TokenIds are immutable: {name} cannot be set")

    def __len__(self) -> int:
        return len(self.array)

    @overload
    def __getitem__(self, index: int) -> int: ...

    @overload
    def __getitem__(self, index: slice) -> TokenIds: ...

    def __getitem__(self, index: int | slice) -> int | TokenIds:
        if isinstance(index, slice):
            return TokenIds(self.array[index])
        return int(self.array[index])

    def __iter__(self) -> Iterator[int]:
        return iter(self.array.tolist())

    def __add__(self, other: Sequence[int]) -> TokenIds:
        return TokenIds(np.concatenate([self.array, np.asarray(other, dtype=np.int64)]))

    def __eq__(self, other: object) -> bool:
        if isinstance(other, (TokenIds, tuple, list)):
            return len(self) == len(other) and bool((self.array == np.asarray(other)).all())
        return NotImplemented

    def __hash__(self) -> int:
        return hash(self.array.tobytes())

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> npt.NDArray[Any]:
        return np.array(self.array, dtype=dtype) if copy else np.asarray(self.array, dtype=dtype)

    def pack(self) -> tuple[bytes, int]:
        """The ids as little-endian bytes, and the bytes of each."""
        # As few bytes a token as the largest one needs: Ray takes up to 100 KiB in the message
        # itself, so with three bytes 32,000 tokens of any vocabulary spare a visit to its store.
        low, high = (int(self.array.min()), int(self.array.max())) if len(self) else (0, 0)
        width = 8 if low < 0 else next(w for w in (1, 2, 3, 4, 8) if high < 1 << (8 * w))
        little = self.array.astype("<i8", copy=False).view(np.uint8).reshape(-1, 8)
        return little[:, :width].tobytes(), width

    @classmethod
    def unpack(cls, data: bytes, width: int) -> TokenIds:
        """Inverse of `pack`; raises ValueError where it cannot be."""
        packed = np.frombuffer(data, dtype=np.uint8).reshape(-1, width)
        little = np.zeros((len(packed), 8), dtype=np.uint8)
        little[:, :width] = packed
        return cls(little.view("<i8").reshape(-1))

    def __reduce__(self) -> tuple[Any, ...]:
        return TokenIds.unpack, self.pack()

    def __repr__(self) -> str:
        shown = ", ".join(map(str, self.array[:8].tolist()))
        return f"TokenIds([{shown}{', ...' if len(self) > 8 else ''}], {len(self)} tokens)"


def _as_array(ids: Any) -> TokenArray:
    try:
        sized = ids if isinstance(ids, (np.ndarray, Sequence)) else tuple(ids)
        found = np.array(sized)
        if found.size and found.dtype.kind not in "iu":
            raise TypeError(f"of {found.dtype}")
        if found.dtype == np.uint64 and found.size and found.max() > np.iinfo(np.int64).max:
            raise OverflowError("over 64 bits")
        return found.astype(np.int64, copy=False)
    except (TypeError, ValueError, OverflowError) as error:
        raise ConfigError("input_ids", type(ids).__name__, f"integers ({error})") from error
