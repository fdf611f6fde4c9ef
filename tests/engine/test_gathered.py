"""Families with attention code of their own run over KV that is gathered from the pool."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest
import torch
from engine_harness import Harness
from plan_driver import VOCAB, random_prompt

from litecache.config import CacheConfig
from litecache.engine.kv_layout import KVLayout, KVPool
from litecache.engine.loading.model_checks import read_config
from litecache.engine.loading.model_loader import load_model, random_model
from litecache.engine.loading.model_source import ModelSource
from litecache.engine.running import gather_cache
from litecache.engine.running.gather_cache import GatherCache, Rows, longest_context
from litecache.errors import ConfigError

torch.set_num_threads(1)

_OF_GPT = {"n_embd": 64, "n_head": 4, "n_layer": 3, "n_positions": 256, "rotary_dim": 8}
FAMILIES = {
    "bloom": {"hidden_size": 64, "n_head": 4, "n_layer": 3},
    "codegen": {**_OF_GPT, "n_ctx": 256},
    "falcon": {"hidden_size": 64, "num_attention_heads": 4, "num_hidden_layers": 3, "alibi": True},
    "gpt_neo": {
        "hidden_size": 64,
        "num_heads": 4,
        "num_layers": 2,
        "attention_types": [[["global", "local"], 1]],
        "window_size": 20,
        "max_position_embeddings": 256,
    },
    "gptj": _OF_GPT,
    "mpt": {"d_model": 64, "n_heads": 4, "n_layers": 3, "max_seq_len": 256},
    "xglm": {
        "d_model": 64,
        "attention_heads": 4,
        "num_layers": 3,
        "ffn_dim": 96,
        "max_position_embeddings": 256,
    },
}
QUICK = ("bloom", "falcon", "gpt_neo")


def source(family: str) -> ModelSource:
    ends = dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"))
    fields = {"vocab_size": VOCAB, "initializer_range": 0.2, **ends, **FAMILIES[family]}
    return ModelSource(config={**fields, "model_type": family}, weights="random", seed=0)


def stock(family: str, prompts: list[list[int]], count: int) -> list[list[int]]:
    """Greedy tokens of stock transformers, row by row."""
    model = random_model(read_config(source(family)), 0, torch.device("cpu"), torch.float32).eval()
    answers = []
    for prompt in prompts:
        ids = torch.tensor([prompt])
        mask = torch.ones_like(ids)
        out = model.generate(
            ids, attention_mask=mask, max_new_tokens=count, do_sample=False, pad_token_id=0
        )
        answers.append(out[0, len(prompt) :].tolist())
    return answers


@pytest.mark.parametrize(
    "family",
    [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in FAMILIES],
)
def test_tokens_equal_stock_whatever_was_found_and_however_rows_are_mixed(family, tmp_path):
    prompts = [random_prompt(length, length) for length in (110, 37, 1, 70)]
    expected = stock(family, prompts, 12)
    # Steps of 48 tokens: long prompts are computed in chunks, beside the decodes of short ones.
    steps = {"max_batch_tokens": 48, "max_prefill_tokens": 48}
    with Harness(source(family), folders=[tmp_path], max_model_len=256, **steps) as harness:
        assert [harness.run([prompt], 12)[0] for prompt in prompts] == expected
        for emptied, tier in (((), "gpu"), (("gpu",), "ram"), (("gpu", "ram"), "disk")):
            harness.empty(*emptied)
            assert harness.run(prompts, 12) == expected
            assert harness.reused[0].get(tier, 0) >= 96
        harness.engine.clear_pool()
        harness.check()


def test_a_preempted_request_goes_on_with_the_same_tokens():
    prompts = [random_prompt(60, seed) for seed in range(4)]
    expected = stock("bloom", prompts, 60)
    # Room for two of them at their full length.
    with Harness(source("bloom"), num_blocks=18, max_model_len=256) as harness:
        assert harness.run(prompts, 60) == expected
        assert harness.engine.stats()["preemptions"] > 0


@pytest.mark.parametrize(
    "options",
    [
        {"deterministic": True, "max_batch_tokens": 32, "max_prefill_tokens": 128},
        # the tail is there when the last piece of the front is computed
        {"folders": [None], "loads": lambda first, end: 5, "max_batch_tokens": 24},
    ],
    ids=["chunks on a grid", "a loaded tail"],
)
def test_of_several_segments_of_a_row_in_one_step_each_sees_those_before_it(options):
    """A segment of one token, which runs like a decode, too."""
    prompts = [random_prompt(length, length) for length in (17, 112, 113)]
    expected = stock("bloom", prompts, 4)
    options = {"max_prefill_tokens": options["max_batch_tokens"], **options}
    with Harness(source("bloom"), max_model_len=256, **options) as harness:
        for _ in range(2):
            harness.engine._pools[0].buffer.fill_(0x3C)  # what nobody wrote must not be seen
            assert [harness.run([prompt], 4)[0] for prompt in prompts] == expected
            harness.empty("gpu")


def test_a_request_never_decodes_on_the_keys_kept_for_the_one_before():
    before, after = random_prompt(10, 1), random_prompt(20, 2)
    (expected,) = stock("bloom", [after], 14)  # then its second block is full
    with Harness(source("bloom"), max_model_len=256) as harness:
        assert harness.run([after], 14) == [expected]
        harness.run([before], 10)  # its last step has 19 visible tokens in the same row
        assert harness.run([after], 14) == [expected]
        assert harness.reused == [{"gpu": 19}]  # so its first step is a decode of 20


def test_eight_bit_kv_is_refused_by_name():
    config = CacheConfig(device="cpu", dtype="float32", kv_dtype="int8", max_model_len=64)
    with pytest.raises(ConfigError, match=r"kv_dtype='int8'.*gathered"):
        load_model(source("bloom"), config)


@pytest.mark.parametrize("family", QUICK)
def test_what_the_longest_context_costs_can_be_run_without_a_pool(family):
    loaded = load_model(source(family), CacheConfig(device="cpu", dtype="float32"))
    assert loaded.attention == "gathered"
    cache = longest_context(len(loaded.specs), 8, 200)
    with torch.inference_mode():
        logits = loaded.model(torch.arange(8)[None], past_key_values=cache, use_cache=True).logits
    assert logits.shape == (1, 8, VOCAB)
    assert bool(logits.isfinite().all())


class Sequences:
    """Two sequences of a one-layer cache that grow, beside their KV in plain lists."""

    HEADS, DIM, SIZE = 2, 3, 4

    def __init__(self) -> None:
        spec = load_model(source("bloom"), CacheConfig(device="cpu", dtype="float32")).specs[0]
        spec = replace(spec, kv_heads=self.HEADS, k_dim=self.DIM, v_dim=self.DIM + 2)
        layout = KVLayout.from_specs((spec,), self.SIZE)
        self.pool = KVPool(layout.groups[0], 64, "cpu")
        self.pool.layer(0)[0].fill_(float("nan"))  # what nobody wrote must not be seen
        self.pool.layer(0)[1].fill_(float("nan"))
        self.cache = GatherCache(layout, [self.pool])
        blocks = list(range(1, 61))
        random.Random(0).shuffle(blocks)
        self.tables = torch.tensor(blocks).view(2, 30)
        self.known: list[list[tuple[torch.Tensor, torch.Tensor]]] = [[], []]

    def forward(self, rows: list[int], queries: int, lives: tuple[int, ...]) -> None:
        """Give new KV to the cache and compare what comes back with all that was given."""
        generator = torch.Generator().manual_seed(sum(map(len, self.known)))
        shape = (len(rows), self.HEADS, queries)
        key = torch.randn(*shape, self.DIM, generator=generator)
        value = torch.randn(*shape, self.DIM + 2, generator=generator)
        slots = []
        for place, row in enumerate(rows):
            for query in range(queries):
                block, offset = divmod(len(self.known[row]), self.SIZE)
                slots.append(int(self.tables[row, block]) * self.SIZE + offset)
                self.known[row].append((key[place, :, query], value[place, :, query]))
        contexts = tuple(len(self.known[row]) for row in rows)
        self.cache.begin_step()
        self.cache.begin(Rows(queries, contexts, [torch.tensor(slots)], [self.tables[rows]], lives))
        assert self.cache.get_seq_length() == max(contexts) - queries
        found = self.cache.update(key, value, 0)
        for kind, got in enumerate(found):
            for place, row in enumerate(rows):
                expected = torch.stack([pair[kind] for pair in self.known[row]], dim=1)
                padding = got.shape[2] - contexts[place]
                assert torch.equal(got[place, :, padding:], expected)
                assert not got[place, :, :padding].any()


@pytest.mark.parametrize("bound", [0, 1 << 20])
def test_a_batch_of_decodes_gets_its_contexts_however_it_changes(monkeypatch, bound):
    monkeypatch.setattr(gather_cache, "MAX_BYTES", bound)
    monkeypatch.setattr(gather_cache, "HEADROOM_TOKENS", 3)
    both = Sequences()
    gathered = []
    real = Rows.gather
    monkeypatch.setattr(Rows, "gather", lambda *args: gathered.append(1) or real(*args))
    both.forward([0], 9, (1,))
    both.forward([1], 5, (2,))
    for _ in range(8):
        both.forward([0, 1], 1, (1, 2))
    # Keys and values: once at first, and each time that the room behind them is used up.
    assert len(gathered) == (4 if bound else 16)
    both.forward([0], 1, (1,))
    both.forward([0, 1], 1, (1, 2))
    both.forward([1], 3, (2,))
    both.forward([0, 1], 1, (1, 2))
