"""Is everything right on this GPU? A random Llama through Ray, its KV in every tier.

    python scripts/check_gpu.py [--device cuda] [--dtype float32 bfloat16] [--json FILE]

For float32 and bfloat16: tokens cold, on GPU, RAM and disk hits and after a restart of all actors
are compared with stock transformers ("same tokens" of docs/architecture.md: equal in float32; in
bfloat16 equal, or the first difference is a tie of the two top logits). Then the copy rate between
the GPU and the arena's slots is measured against `cudaMemcpy` from torch's own pinned memory.
Exits 1 when anything is wrong.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from bench_common import machine_info, own_ray
from rich.console import Console
from rich.table import Table
from transformers import LlamaConfig

from litecache import CacheConfig, KVCacheAdapter
from litecache.engine.loading.model_loader import random_model
from litecache.engine.running.hf_attention import register
from litecache.engine.transfer.block_copier import BlockCopier, PinnedArenas, Rows
from litecache.storage.client import LocalShardClient
from litecache.storage.shard_store import ShardStore

TIE_GAP = 0.05
NEW_TOKENS = 48
LENGTHS = (1, 15, 16, 17, 100, 333, 1024, 1500)
MIN_COPY_GB_S = 45.0


def llama() -> LlamaConfig:
    """Small; its logits stay so small that the noise of bfloat16 is below a tie's gap."""
    return LlamaConfig(
        vocab_size=8192,
        hidden_size=512,
        intermediate_size=1024,
        num_hidden_layers=8,
        num_attention_heads=8,
        num_key_value_heads=2,
        head_dim=64,
        max_position_embeddings=4096,
        initializer_range=0.04,
        eos_token_id=None,
        bos_token_id=None,
    )


class Reference:
    """Stock transformers on the same weights."""

    def __init__(self, dtype: str, device: str) -> None:
        register()
        where = torch.device(device)
        self.model: Any = random_model(llama(), 0, where, getattr(torch, dtype)).eval()
        self.model.set_attn_implementation("sdpa")
        self.device = device
        self.exact = dtype == "float32"

    def generate(self, prompt: list[int]) -> list[int]:
        ids = torch.tensor([prompt], device=self.device)
        out = self.model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=NEW_TOKENS, do_sample=False
        )
        return out[0, len(prompt) :].tolist()

    def gap(self, prompt: list[int], wanted: list[int], given: list[int]) -> float:
        """How far the first other token lies below the best one, in logits; 0 when equal."""
        if wanted == given:
            return 0.0
        if self.exact or len(wanted) != len(given):
            return float("inf")
        first = next(i for i, (a, b) in enumerate(zip(wanted, given, strict=True)) if a != b)
        ids = torch.tensor([prompt + wanted[:first]], device=self.device)
        with torch.inference_mode():
            logits = self.model(ids).logits[0, -1].float()
        return float(logits.max() - logits[given[first]])


def check_tokens(dtype: str, device: str, folder: Path) -> list[dict[str, Any]]:
    """Every tier against the reference; one row per tier."""
    rng = random.Random(0)
    prompts = [rng.choices(range(8192), k=length) for length in LENGTHS]
    reference = Reference(dtype, device)
    wanted = [reference.generate(prompt) for prompt in prompts]
    full = sum(length // 16 * 16 for length in LENGTHS)
    config = CacheConfig(
        dtype=dtype,
        device=device,
        num_blocks=1024,
        ram_bytes="1GB",
        storage_dir=str(folder),
        storage_bytes="4GB",
        max_batch_tokens=512,
    )
    rows: list[dict[str, Any]] = []

    own_ray()

    def adapter() -> KVCacheAdapter:
        return KVCacheAdapter(llama(), cache_config=config, weights="random", seed=0)

    def ask(llm: KVCacheAdapter, case: str, tier: str | None) -> None:
        before = dict(llm.stats().reused_tokens)
        started = time.perf_counter()
        given = llm.generate_batch(prompts, max_new_tokens=NEW_TOKENS, do_sample=False)
        seconds = time.perf_counter() - started
        after = llm.stats().reused_tokens
        reused = {t: int(n - before.get(t, 0)) for t, n in after.items() if n - before.get(t, 0)}
        checks = zip(prompts, wanted, given, strict=True)
        gaps = [reference.gap(prompt, want, give) for prompt, want, give in checks]
        right = sum(gap < TIE_GAP for gap in gaps)
        enough = tier is None or reused.get(tier, 0) >= full
        equal = sum(want == give for want, give in zip(wanted, given, strict=True))
        rows.append(
            {
                "dtype": dtype,
                "case": case,
                "right": right,
                "equal": equal,
                "of": len(prompts),
                "largest_gap": round(max(gaps), 4),
                "reused": reused,
                "seconds": round(seconds, 3),
                "ok": right == len(prompts) and enough,
            }
        )

    with adapter() as llm:
        ask(llm, "cold", None)
        ask(llm, "GPU hit", "gpu")
        llm.clear("gpu")
        ask(llm, "RAM hit", "ram")
        llm.clear("gpu")
        llm.clear("ram")
        ask(llm, "disk hit", "disk")
        llm.flush()
    with adapter() as llm:
        ask(llm, "after a restart", "disk")
    return rows


def copy_rates(device: str) -> dict[str, float]:
    """GB/s of 2 MiB blocks in random order between a pool and arena slots, and torch's own."""
    block = 2 << 20
    store = ShardStore(None, ram_bytes=1 << 30)
    client = LocalShardClient(store)
    count = 256
    slots = [slot.slot for slot in client.reserve(block, count)]
    pool = torch.randint(0, 255, (count, block), dtype=torch.uint8, device=device)
    host = torch.empty((count, block), dtype=torch.uint8, pin_memory=True)
    pinned = PinnedArenas()
    copier = BlockCopier(torch.device(device), lambda step: None, pinned)
    views = copier.slots(client.arena, slots, block)
    rows = Rows(pool, np.array(random.Random(0).sample(range(count), count)))

    def rate(copy: Callable[[], object]) -> float:
        best = 0.0
        for _ in range(5):
            torch.cuda.synchronize()
            started = time.perf_counter()
            copy()
            torch.cuda.synchronize()
            best = max(best, count * block / (time.perf_counter() - started) / 1e9)
        return round(best, 1)

    rates = {
        "is_pinned": float(all(piece.is_pinned() for slot in views.pieces() for piece in slot)),
        "save_gb_s": rate(lambda: copier.copy(rows, views, save=True)),
        "load_gb_s": rate(lambda: copier.copy(rows, views, save=False)),
        "torch_pinned_save_gb_s": rate(lambda: host.copy_(pool, non_blocking=True)),
        "torch_pinned_load_gb_s": rate(lambda: pool.copy_(host, non_blocking=True)),
    }
    pinned.close()
    client.close()
    store.close()
    return rates


def main() -> int:
    """Run all checks and print one table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--dtype", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    report: dict[str, Any] = {"machine": machine_info(), "rows": []}
    if options.device != "cpu":
        report["copies"] = copy_rates(options.device)
    for dtype in options.dtype:
        with tempfile.TemporaryDirectory(prefix="litecache-check-") as folder:
            report["rows"] += check_tokens(dtype, options.device, Path(folder))
        if options.json:
            options.json.write_text(json.dumps(report, indent=1))
    table = Table("dtype", "case", "right", "equal", "gap", "reused tokens", "seconds", "ok")
    for row in report["rows"]:
        cells = (
            row["dtype"],
            row["case"],
            f"{row['right']}/{row['of']}",
            row["equal"],
            row["largest_gap"],
        )
        table.add_row(*map(str, (*cells, row["reused"], row["seconds"], row["ok"])))
    console = Console()
    console.print(table)
    copies = report.get("copies")
    good = all(row["ok"] for row in report["rows"])
    if copies:
        console.print(copies)
        good = good and copies["is_pinned"] == 1.0
        good = good and min(copies["save_gb_s"], copies["load_gb_s"]) >= MIN_COPY_GB_S
    report["ok"] = good
    if options.json:
        options.json.write_text(json.dumps(report, indent=1))
    console.print("all right" if good else "WRONG")
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
