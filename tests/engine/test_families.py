"""Families are right beyond their windows and original lengths, or refused with the length."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from plan_driver import tiny_model

from litecache.config import CacheConfig
from litecache.engine.loading import model_loader, twin
from litecache.engine.loading.model_loader import Admission, admit
from litecache.engine.loading.probe import PAGED
from litecache.engine.loading.twin import (
    TWIN_TOKENS,
    TwinOutcome,
    lengths,
    probe_model,
    shrink,
    twin_outcome,
)
from litecache.errors import ModelNotSupportedError

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "scripts"))
import sweep_families
from sweep_families import Made, Result, cases_of, families, sweep

torch.set_num_threads(1)
SOME = (
    ("qwen2_moe", "window 32"),
    ("phimoe", "window 32"),
    ("mistral", "window 8"),
    ("mistral", "window 8 unused"),
    ("llama", "window 8"),
    ("ministral3", "query scale from 40"),
    ("gpt_oss", "known lengths"),
    ("phi3", "longrope from 40"),
    ("llama4_text", "plain"),
    ("deepseek_v32", "plain"),
)
REFUSED = {"phi3", "deepseek_v32", "llama"}
"""Llama's cache has a window where its configuration names one; its masks have not."""
# Each built in another way; scripts/sweep_families.py tries all.
MANY = ("afmoe", "doge", "gemma4_text", "gpt2", "granite_swa", "llama", "olmo3", "smollm3")
# A rotation without a length, one that changes only beyond the model's positions, a window that no
# layer has: they take the way of "plain".
WITHOUT_LENGTHS = ("linear", "dynamic", "window 8 unused")


def run(family: str, case: str) -> Result:
    (result,) = sweep(family, [case])
    return result


@pytest.mark.parametrize(("family", "case"), SOME)
def test_beyond_a_length_a_family_is_right_or_refused(family, case):
    result = run(family, case)
    assert result.outcome == ("refused" if family in REFUSED else "right"), result.detail


def test_a_refusal_tells_the_length_that_is_accepted():
    result = run("phi3", "longrope from 40")
    assert result.right_to == 40
    made = Made("phi3", cases_of("phi3")["longrope from 40"])
    assert admit(made.build(), CacheConfig(device="cpu"), 40)
    with pytest.raises(ModelNotSupportedError, match="max_model_len of up to 40 tokens"):
        admit(made.build(), CacheConfig(device="cpu"), 41)


def test_a_model_whose_own_cache_drops_what_its_masks_show_is_refused_beyond_that():
    made = Made("moshi", cases_of("moshi")["known lengths"])
    with pytest.raises(ModelNotSupportedError, match="decodes with its own cache") as error:
        admit(made.build(), CacheConfig(device="cpu"), 160)
    assert error.value.right_to == 8
    assert admit(made.build(), CacheConfig(device="cpu"), 8).attention == "paged"


def test_layers_have_the_window_of_their_mask_and_no_other():
    windows = [spec.window for spec in tiny_model("mistral").specs]
    assert windows == [20, 20, 20]
    made = Made("qwen2_moe", cases_of("qwen2_moe")["window 32"])
    specs, _, _ = admit(made.build(), CacheConfig(device="cpu"), 160)
    assert [spec.window for spec in specs] == [None, 32, None]


def test_a_pass_that_is_wrong_far_out_is_left_out(monkeypatch, tmp_path):
    """The layers' own check sees few positions: without it, the twin alone must tell."""
    from litecache.engine.running.passes import fused_layers

    monkeypatch.setattr(fused_layers, "_TOLERANCE", {torch.float32: float("inf")})
    monkeypatch.setenv("LITECACHE_HOME", str(tmp_path))
    made = Made("ministral3", cases_of("ministral3")["query scale from 40"])
    outcome = twin_outcome(made.model_class, made.config, PAGED)
    assert outcome.wrong == ""
    assert outcome.wrong_passes == ["fused"]


def test_a_twin_is_tried_once_and_kept_on_disk(monkeypatch, tmp_path):
    monkeypatch.setenv("LITECACHE_HOME", str(tmp_path))
    tried = []
    real = twin._try
    monkeypatch.setattr(twin, "_try", lambda *args: tried.append(1) or real(*args))
    made = Made("llama", cases_of("llama")["plain"])
    first = twin_outcome(made.model_class, made.config, PAGED)
    assert twin_outcome(made.model_class, made.config, PAGED) == first
    assert twin_outcome(made.model_class, made.config, PAGED) == first
    assert len(tried) == 1
    (file,) = (tmp_path / "probes").iterdir()
    assert file.stat().st_size < 1000
    file.write_text("{")
    assert twin_outcome(made.model_class, made.config, PAGED) == first
    assert len(tried) == 2


def test_a_model_without_a_twin_is_tried_itself_and_refused_when_too_long(monkeypatch):
    monkeypatch.setattr(twin, "twin_outcome", lambda *args: TwinOutcome(no_twin="reasons"))
    made = Made("llama", cases_of("llama")["plain"])
    assert admit(made.build(), CacheConfig(device="cpu"), 300)
    with pytest.raises(ModelNotSupportedError, match=r"reasons.*up to 512 tokens"):
        admit(made.build(), CacheConfig(device="cpu"), 513)
    # With nothing but its own weights a window is still found out.
    blind = PAGED._replace(record=_without_windows(PAGED.record))
    monkeypatch.setattr(model_loader, "PAGED", blind)
    windowed = Made("mistral", cases_of("mistral")["window 32"])
    with pytest.raises(ModelNotSupportedError, match="over paged KV differ"):
        probe_model(windowed.build(), blind, "float32", 16, 160)
    # What paged attention would be wrong for runs over gathered KV.
    assert admit(windowed.build(), CacheConfig(device="cpu"), 160).attention == "gathered"


def _without_windows(record):
    from dataclasses import replace

    return lambda *args: tuple(replace(spec, window=None) for spec in record(*args))


def test_a_twin_is_small_and_goes_beyond_every_length():
    fields = {
        "num_hidden_layers": 48,
        "hidden_size": 4096,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "vocab_size": 150_000,
        "sliding_window": 4096,
        "max_position_embeddings": 131_072,
        "rope_parameters": {"rope_type": "yarn", "original_max_position_embeddings": 8192},
        "layer_types": ["sliding_attention"] * 5 + ["full_attention"] * 43,
        "attn_logit_softcapping": 50.0,
    }
    small = shrink(fields)
    assert set(small["layer_types"]) == {"sliding_attention", "full_attention"}
    assert len(small["layer_types"]) == small["num_hidden_layers"] <= 4
    assert small["attn_logit_softcapping"] == 50.0
    assert (small["hidden_size"], small["vocab_size"]) == (64, 128)
    assert small["max_position_embeddings"] == 16 * 40
    assert lengths(small) == {
        "sliding_window": (8, 8),
        "original_max_position_embeddings": (40, 40),
    }
    assert all(real < TWIN_TOKENS for real, _ in lengths(small).values())


@pytest.mark.slow
@pytest.mark.parametrize("family", MANY)
def test_families_are_never_silently_wrong(family):
    names = [name for name in cases_of(family) if name not in WITHOUT_LENGTHS]
    results = sweep(family, names)
    assert results
    assert not [result for result in results if result.fault]


def test_the_sweep_finds_what_is_wrong(monkeypatch):
    """A window that gets lost between the mask and the layer."""
    monkeypatch.setattr(
        sweep_families, "admit", lambda model, config, length: _admit_unchecked(model, length)
    )
    assert run("mistral", "window 8").outcome == "WRONG"
    assert set(MANY) <= set(families())


def _admit_unchecked(model, length):
    PAGED.choose(model)
    return Admission(_without_windows(PAGED.record)(model, "float32", length), (), "paged")
