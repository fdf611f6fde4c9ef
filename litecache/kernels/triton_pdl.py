"""Programmatic dependent launch: a kernel begins while the one before it still runs.

On Hopper and later a launch may carry the attribute; the kernel's programs then move in as those of
the kernel before leave, and wait inside for its results. What hides behind the wait is the launch
itself and every read that does not depend on the kernel before. Three rules keep that right:

1. Before `await_previous` a kernel reads only what was written at least two kernels earlier
   (weights, block tables, plans, keys of earlier steps), and writes nothing.
2. Every program waits, and only then calls `let_next_begin`. So whoever runs before its own wait
   knows that all kernels but the last one are complete.
3. Kernels of other libraries are launched without the attribute: they wait for everything.
"""

from __future__ import annotations

import os
from functools import cache

import torch
import triton
import triton.language as tl

MOST_TOKENS = 256
"""Launches for more tokens run so long that hiding their beginning gives nothing."""


def use_pdl(device: torch.device, tokens: int) -> bool:
    """Whether a kernel for so many tokens is launched that way."""
    return tokens <= MOST_TOKENS and _supports_pdl(device)


@cache
def _supports_pdl(device: torch.device) -> bool:
    """`LITECACHE_PDL=0` turns it off."""
    if device.type != "cuda" or os.environ.get("LITECACHE_PDL", "1") == "0":
        return False
    return torch.cuda.get_device_capability(device) >= (9, 0)


@triton.jit
def await_previous(PDL: tl.constexpr):
    """Returns when the kernel before this one has ended and its writes are visible."""
    if PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()


@triton.jit
def fetch_to_l2(addresses, num_bytes):
    """Asks for `num_bytes` (a multiple of 16) at each address; nobody waits for them.

    Args:
        addresses: int64 tensor of 16-byte aligned global addresses, best one a thread.
        num_bytes: int32.
    """
    tl.inline_asm_elementwise(
        "cp.async.bulk.prefetch.L2.global [$1], $2; // $0",
        "=r,l,r",
        [addresses, num_bytes],
        dtype=tl.int32,
        is_pure=False,
        pack=1,
    )
