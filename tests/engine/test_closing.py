"""A closed engine keeps nothing, and one that does not fit says what is missing."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from engine_harness import Harness, family_source
from plan_driver import random_prompt, tiny_model
from torch import nn

from litecache.config import CacheConfig
from litecache.engine.engine import Engine
from litecache.engine.kv_layout import KVLayout
from litecache.engine.loading import memory
from litecache.engine.scheduling.scheduler import Scheduler
from litecache.errors import CapacityError

GIB = 1 << 30


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


def parts_of(engine: Engine) -> dict[str, Callable[[], object]]:
    """What holds memory in a running engine."""
    model = engine._runner._model
    held = {name: weakref.ref(tensor) for name, tensor in model.named_parameters()}
    held |= {f"pool {n}": weakref.ref(pool.buffer) for n, pool in enumerate(engine._pools)}
    held["model"] = weakref.ref(model)
    held["tables"] = weakref.ref(engine._runner._tables.device_tables)
    held["step buffers"] = weakref.ref(engine._runner._buffers.words)
    return held


def left(held: dict[str, Callable[[], object]]) -> list[str]:
    return [name for name, part in held.items() if part() is not None]


def tensor_bytes() -> int:
    """Of all tensors of this process."""
    gc.collect()
    tensors = [part for part in gc.get_objects() if type(part) in (torch.Tensor, nn.Parameter)]
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
    return sum(storages.values())


@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_a_closed_engine_that_is_kept_holds_no_weights_no_pool_and_no_buffers(
    family: str, tmp_path: Path
) -> None:
    before = tensor_bytes()
    harness = Harness(family_source(family), folders=[tmp_path / "s"])
    harness.run([random_prompt(40, 1)], 4)
    assert tensor_bytes() - before > 1 << 20
    held = parts_of(harness.engine)
    assert len(left(held)) > 5
    harness.close()
    assert left(held) == []
    assert tensor_bytes() - before < 1 << 12


def test_an_engine_that_died_holds_nothing_either_once_it_is_closed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    harness = Harness(family_source("llama"))
    held = parts_of(harness.engine)

    def schedule(self: Scheduler, now: float) -> None:
        raise ZeroDivisionError("planted")

    monkeypatch.setattr(Scheduler, "schedule", schedule)
    harness.engine.abort(["x"])
    harness.engine._thread.join(60)
    harness.close()
    assert left(held) == []


def test_too_little_memory_is_told_without_negative_sizes_and_by_what_takes_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """An engine beside another one, on a card of 80 GB, as its driver counts."""
    loaded = tiny_model("llama")
    layout = KVLayout.from_specs(loaded.specs, 16)
    object.__setattr__(loaded, "device", torch.device("cuda:0"))
    for name, value in {
        "empty_cache": None,
        "mem_get_info": (10 * GIB, 80 * GIB),
        "memory_allocated": 16 * GIB,
    }.items():
        monkeypatch.setattr(torch.cuda, name, lambda *args, value=value: value)
    monkeypatch.setattr(memory, "profile_peak", lambda loaded, config: 2 * GIB)
    with pytest.raises(CapacityError) as told:
        memory.choose_num_blocks(loaded, layout, CacheConfig(device="cpu"))
    text = str(told.value)
    assert "gets 0 bytes" in text
    assert "-" not in text.replace("free-", "")
    for part in (
        f"gpu_memory_fraction=0.85 of {80 * GIB:,} are {68 * GIB:,}",
        f"{16 * GIB:,} of the model",
        f"{54 * GIB:,} of others",
        f"{2 * GIB:,} for the largest step",
        "end what else uses the GPU",
    ):
        assert part in text


def test_memory_that_a_gpu_refuses_is_told_by_what_it_was_for(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (1000, 5000))
    monkeypatch.setattr(
        "litecache.engine.engine.load_model",
        lambda source, config: (_ for _ in ()).throw(torch.OutOfMemoryError("planted")),
    )
    with pytest.raises(
        CapacityError, match=r"for the weights of .*1,000 of 5,000 bytes are left.*smaller model"
    ):
        Engine(family_source("llama"), CacheConfig(device="cpu"), sink=lambda items: None)


@pytest.mark.gpu
def test_the_memory_of_a_closed_engine_is_the_next_ones(tmp_path: Path) -> None:
    """Engines with pools of 12 GB, one after the other, all of them kept."""
    kept = []
    before = torch.cuda.mem_get_info()[0]
    for number in range(3):
        harness = Harness(
            family_source("llama"),
            folders=[tmp_path / str(number)],
            device="cuda",
            num_blocks=1_000_000,
            max_requests=8,
        )
        harness.run([random_prompt(40, 1)], 4)
        harness.empty("gpu")
        assert harness.run([random_prompt(40, 1)], 4)
        harness.close()
        kept.append(harness.engine)
        gc.collect()
        lost = before - torch.cuda.mem_get_info()[0]
        if number == 0:
            # what CUDA, its libraries and Triton's kernels take once in a process
            before, lost = before - lost, 0
        assert lost < 64 << 20, f"{lost:,} bytes are still taken after engine {number}"
