"""How the KV of a block lies in memory, the same in the GPU pool, in an arena slot and on disk.

A block holds `block_size` tokens for every layer of its KV group in one extent: per layer K,
then V, then scales if any, each `[kv_heads, block_size, dim]` (heads before tokens), starting on
and padded to 256 bytes; the whole is padded to 4096 bytes, the unit of direct disk I/O.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch

from litecache.errors import ConfigError
from litecache.kernels import TRASH_BLOCK as TRASH_BLOCK
from litecache.kernels.quantise import LARGEST_CODE, BlockForm
from litecache.machine_memory import available_memory_bytes

LAYOUT_VERSION = 1
EXTENT_ALIGNMENT = 256
BLOCK_ALIGNMENT = 4096
FP8_CAPABILITY = (8, 9)
"""Of the oldest GPUs that convert fp8 e4m3."""


def _align(size: int, alignment: int) -> int:
    return -(-size // alignment) * alignment


@dataclass(frozen=True)
class KVSpec:
    """Shape of one layer's KV.

    Attributes:
        kv_heads: number of KV heads.
        k_dim: head dimension of K.
        v_dim: head dimension of V (differs from `k_dim` in MLA models).
        dtype: of the pool, by the name that `CacheConfig.kv_dtype` gives it.
        window: sliding window in tokens (key visible iff kpos > qpos - window), None = full.
        scale_bytes: of a token and head: a float32 each for K and V of eight bits, else 0.
    """

    kv_heads: int
    k_dim: int
    v_dim: int
    dtype: str
    window: int | None = None
    scale_bytes: int = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "scale_bytes", 8 if self.torch_dtype in LARGEST_CODE else 0)

    @property
    def torch_dtype(self) -> torch.dtype:
        """The dtype as an object."""
        name = "float8_e4m3fn" if self.dtype == "fp8" else self.dtype
        return getattr(torch, name)  # type: ignore[no-any-return]

    @property
    def itemsize(self) -> int:
        """Bytes of one element."""
        return self.torch_dtype.itemsize


@dataclass(frozen=True)
class LayerExtent:
    """Byte offsets of one layer inside a block."""

    k_offset: int
    v_offset: int
    scale_offset: int


@dataclass(frozen=True)
class WindowPolicy:
    """Which blocks of a sequence a group still needs: all of them, or those a window touches.

    Attributes:
        window: tokens that a query sees, itself included; None = all.
        block_size: tokens per block.
    """

    window: int | None
    block_size: int

    @property
    def slides(self) -> bool:
        """Whether it leaves blocks behind."""
        return self.window is not None

    def first_needed(self, num_blocks: int) -> int:
        """Index of the first block that a reused prefix of so many full blocks needs."""
        if self.window is None:
            return 0
        return max(0, num_blocks - -(-self.window // self.block_size) - 1)

    def left_behind(self, num_computed: int) -> int:
        """How many leading blocks no position from `num_computed` on sees."""
        return 0 if self.window is None else max(0, (num_computed - self.window) // self.block_size)


@dataclass(frozen=True)
class KVGroup:
    """Layers of equal shape and attention window, which share block tables and blocks.

    Attributes:
        index: of the group in its layout; part of every block key.
        layers: the model's layer indices, ascending.
        spec: what all of them have in common.
        block_size: tokens per block.
        extents: one per entry of `layers`.
        block_bytes: size of a block, a multiple of 4096.
        stored: how the lower tiers hold its blocks; None = as they are.
    """

    index: int
    layers: tuple[int, ...]
    spec: KVSpec
    block_size: int
    extents: tuple[LayerExtent, ...]
    block_bytes: int
    stored: KVGroup | None = None

    @property
    def tier_bytes(self) -> int:
        """Size of a block in the lower tiers."""
        return (self.stored or self).block_bytes

    @functools.cached_property
    def policy(self) -> WindowPolicy:
        """Which blocks of a sequence the group needs."""
        return WindowPolicy(self.spec.window, self.block_size)


@dataclass(frozen=True)
class KVLayout:
    """The KV groups of a model."""

    block_size: int
    groups: tuple[KVGroup, ...]

    @classmethod
    def from_specs(
        cls, specs: Sequence[KVSpec], block_size: int, tier_codec: str | None = None
    ) -> KVLayout:
        """Group layers of equal spec, in order of first appearance.

        Args:
            specs: one per layer of the model.
            block_size: tokens per block.
            tier_codec: dtype of the blocks in the lower tiers, None = as in the pool.

        Raises:
            ConfigError: there is no layer.
        """
        if not specs:
            raise ConfigError("specs", [], "one KVSpec per layer")
        members: dict[KVSpec, list[int]] = {}
        for layer, spec in enumerate(specs):
            members.setdefault(spec, []).append(layer)
        groups = tuple(
            _make_group(index, spec, tuple(layers), block_size, tier_codec)
            for index, (spec, layers) in enumerate(members.items())
        )
        return cls(block_size, groups)

    @property
    def block_bytes(self) -> int:
        """Bytes of one block of every group together."""
        return sum(group.block_bytes for group in self.groups)


def _make_group(
    index: int, spec: KVSpec, layers: tuple[int, ...], block_size: int, tier_codec: str | None
) -> KVGroup:
    stored = None
    if tier_codec is not None:
        stored = _make_group(index, replace(spec, dtype=tier_codec), layers, block_size, None)
    extents = []
    offset = 0
    rows = spec.kv_heads * block_size
    for _ in layers:
        k_offset = offset
        v_offset = _align(k_offset + rows * spec.k_dim * spec.itemsize, EXTENT_ALIGNMENT)
        scale_offset = _align(v_offset + rows * spec.v_dim * spec.itemsize, EXTENT_ALIGNMENT)
        offset = _align(scale_offset + rows * spec.scale_bytes, EXTENT_ALIGNMENT)
        extents.append(LayerExtent(k_offset, v_offset, scale_offset))
    block_bytes = _align(offset, BLOCK_ALIGNMENT)
    return KVGroup(index, layers, spec, block_size, tuple(extents), block_bytes, stored)


def block_form(group: KVGroup) -> BlockForm:
    """A group's blocks as `convert_blocks` is told them; K and V must have one dimension."""
    spec, first = group.spec, group.extents[0]
    layer_bytes = group.extents[1].k_offset if len(group.extents) > 1 else group.block_bytes
    return BlockForm(
        spec.torch_dtype,
        num_layers=len(group.layers),
        rows=spec.kv_heads * group.block_size,
        dim=spec.k_dim,
        layer_bytes=layer_bytes,
        v_offset=first.v_offset,
        scale_offset=first.scale_offset if spec.scale_bytes else 0,
    )


class KVPool:
    """The bytes of one group's blocks on one device, and strided views of them per layer.

    Attributes:
        group: the layout.
        buffer: uint8 `[num_blocks, block_bytes]`; row 0 is the trash block.
    """

    def __init__(self, group: KVGroup, num_blocks: int, device: torch.device | str) -> None:
        self.group = group
        # Zeros, not empty: a trash block of NaN would poison padded rows of a batch.
        self.buffer = torch.zeros((num_blocks, group.block_bytes), dtype=torch.uint8, device=device)
        spec, size = group.spec, group.block_size
        side = spec.kv_heads * size * 4
        self._views = {}
        self._scales: dict[int, tuple[torch.Tensor | None, torch.Tensor | None]] = {}
        for layer, extent in zip(group.layers, group.extents, strict=True):
            self._views[layer] = (
                self._view(extent.k_offset, spec.torch_dtype, spec.k_dim),
                self._view(extent.v_offset, spec.torch_dtype, spec.v_dim),
            )
            self._scales[layer] = (None, None)
            if spec.scale_bytes:
                self._scales[layer] = (
                    self._view(extent.scale_offset, torch.float32, 1).squeeze(3),
                    self._view(extent.scale_offset + side, torch.float32, 1).squeeze(3),
                )

    @property
    def num_blocks(self) -> int:
        """Blocks, the trash block included."""
        return self.buffer.shape[0]

    def layer(self, layer: int) -> tuple[torch.Tensor, torch.Tensor]:
        """K `[num_blocks, kv_heads, block_size, k_dim]` and V of one layer, as views."""
        return self._views[layer]

    def scales(self, layer: int) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        """Scales of K and V of one layer, float32 `[num_blocks, kv_heads, block_size]`, as views.

        None unless the pool has eight bits.
        """
        return self._scales[layer]

    def _view(self, offset: int, dtype: torch.dtype, dim: int) -> torch.Tensor:
        heads, size = self.group.spec.kv_heads, self.group.block_size
        return torch.as_strided(
            self.buffer.view(-1).view(dtype),
            (self.num_blocks, heads, size, dim),
            (self.group.block_bytes // dtype.itemsize, size * dim, dim, 1),
            storage_offset=offset // dtype.itemsize,
        )


def check_kv_dtype(specs: Sequence[KVSpec], device: torch.device) -> None:
    """Refuse eight-bit KV where the kernels cannot read it.

    Raises:
        ConfigError: heads that do not fill words of four codes, or a GPU without fp8.
    """
    valid = "a dtype of 16 or 32 bits"
    for spec in specs:
        odd = [dim for dim in (spec.k_dim, spec.v_dim) if dim % 4]
        if spec.scale_bytes and odd:
            why = f"eight-bit KV is read in words of four, heads here have {odd[0]} dimensions"
            raise ConfigError("kv_dtype", spec.dtype, f"{valid}: {why}")
    if any(spec.dtype == "fp8" for spec in specs):
        _check_fp8("kv_dtype", f'"int8", or {valid}', device)


def check_tier_codec(name: str | None, specs: Sequence[KVSpec], device: torch.device) -> None:
    """Refuse a codec of the lower tiers where it cannot work.

    Raises:
        ConfigError: K and V of different dimensions, or a GPU without fp8.
    """
    for spec in specs if name is not None else ():
        if spec.k_dim != spec.v_dim:
            why = f"K of {spec.k_dim} and V of {spec.v_dim} dimensions are not converted together"
            raise ConfigError("tier_codec", name, f"None: {why}")
    if name == "fp8":
        _check_fp8("tier_codec", '"int8" or None', device)


def _check_fp8(field_name: str, valid: str, device: torch.device) -> None:
    if device.type == "cuda" and torch.cuda.get_device_capability(device) < FP8_CAPABILITY:
        gpu = torch.cuda.get_device_name(device)
        raise ConfigError(field_name, "fp8", f"{valid}: {gpu} has no fp8 e4m3")


def choose_device(name: str | None) -> torch.device:
    """The device a config means, with its index; None = a GPU where there is one.

    Raises:
        ConfigError: there is no such device.
    """
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    device = torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))
    if device.type != "cuda":
        return device
    if (device.index or 0) >= count:
        raise ConfigError("device", name, f'"cpu" or one of {count} CUDA devices')
    return torch.device("cuda", device.index or 0)


def free_bytes(device: torch.device) -> int:
    """What a pool may take on a device, with what torch's allocator keeps there without use."""
    if device.type != "cuda":
        return available_memory_bytes()
    unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return torch.cuda.mem_get_info(device)[0] + unused
