"""`PagedAttentionCache` against plain tensors: lengths, forks, copy-on-write, attention, errors."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from any_values import ANYTHING, EVERY, good_or_refused
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule
from torch.nn import functional

from litecache.config import CacheConfig
from litecache.engine.paged_cache import PagedAttentionCache
from litecache.errors import CapacityError, ConfigError, KernelError

torch.set_num_threads(1)
HEADS, KV_HEADS, DIM, LAYERS = 4, 2, 8, 2


def make_cache(num_blocks: int = 32, **changes: object) -> PagedAttentionCache:
    settings_: dict[str, object] = {
        "block_size": 8, "num_blocks": num_blocks, "num_heads": HEADS, "num_kv_heads": KV_HEADS,
        "head_dim": DIM, "num_layers": LAYERS, "dtype": torch.float32, "device": "cpu",
    }  # fmt: skip
    return PagedAttentionCache(CacheConfig(**(settings_ | changes)))  # type: ignore[arg-type]


def tokens(count: int) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.randn(count, KV_HEADS, DIM), torch.randn(count, KV_HEADS, DIM)


def fill(cache: PagedAttentionCache, seq_id: int, count: int) -> list[tuple[torch.Tensor, ...]]:
    """Appends random tokens to every layer; returns them."""
    given = [tokens(count) for _ in range(LAYERS)]
    for layer, (key, value) in enumerate(given):
        cache.append(seq_id, key, value, layer)
    return given


def expected(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, queries: int
) -> torch.Tensor:
    """Attention of `[heads, queries, dim]` over `[tokens, kv_heads, dim]`, ends aligned."""
    count = key.shape[0]
    hidden = torch.ones(queries, count, dtype=torch.bool).triu(count - queries + 1)
    mask = torch.zeros(queries, count).masked_fill(hidden, float("-inf"))
    k, v = (x.transpose(0, 1).repeat_interleave(HEADS // KV_HEADS, 0) for x in (key, value))
    return functional.scaled_dot_product_attention(query, k, v, mask)


@pytest.mark.parametrize("queries", [None, 1, 5])
def test_attention_equals_plain_attention_over_the_appended_tokens(queries: int | None) -> None:
    cache = make_cache()
    seqs = [cache.allocate_sequence(n) for n in (0, 20)]
    given = [fill(cache, seq, n) for seq, n in zip(seqs, (9, 20), strict=True)]
    shape = (2, HEADS, DIM) if queries is None else (2, HEADS, queries, DIM)
    query = torch.randn(shape)
    for layer in range(LAYERS):
        out = cache.paged_attention(
            query, cache.block_tables(seqs), cache.context_lens(seqs), layer_idx=layer
        )
        assert out.shape == query.shape
        for row in range(2):
            rows = query[row].unsqueeze(1) if queries is None else query[row]
            want = expected(rows, *given[row][layer], queries or 1)
            torch.testing.assert_close(out[row].view_as(want), want)
    cache.check_integrity()


def test_length_grows_when_the_last_layer_is_appended() -> None:
    cache = make_cache()
    seq = cache.allocate_sequence()
    cache.append(seq, *tokens(3), layer_idx=0)
    assert cache.context_lens([seq]).tolist() == [0]
    cache.append(seq, *tokens(3), layer_idx=1)
    assert cache.context_lens([seq]).tolist() == [3]


def test_a_layer_attends_to_its_newest_token_before_the_others_have_it() -> None:
    cache = make_cache()
    seq = cache.allocate_sequence()
    given = fill(cache, seq, 8)
    key, value = tokens(1)
    cache.append(seq, key, value, layer_idx=0)
    query = torch.randn(1, HEADS, DIM)
    lens = cache.context_lens([seq]) + 1
    out = cache.paged_attention(query, cache.block_tables([seq]), lens, 0)
    k, v = torch.cat((given[0][0], key)), torch.cat((given[0][1], value))
    torch.testing.assert_close(out[0].unsqueeze(1), expected(query[0].unsqueeze(1), k, v, 1))


def test_fork_shares_blocks_until_one_side_writes() -> None:
    cache = make_cache(num_blocks=4)
    seq = cache.allocate_sequence()
    given = fill(cache, seq, 12)
    child = cache.fork(seq)
    assert cache.stats()["blocks_private"] == 2
    fill(cache, child, 2)
    tables = cache.block_tables([seq, child]).tolist()
    assert tables[0][0] == tables[1][0]
    assert tables[0][1] != tables[1][1]
    assert cache.context_lens([seq, child]).tolist() == [12, 14]
    query = torch.randn(1, HEADS, DIM)
    for layer in range(LAYERS):
        out = cache.paged_attention(
            query, cache.block_tables([seq]), cache.context_lens([seq]), layer
        )
        want = expected(query[0].unsqueeze(1), *given[layer], 1)
        torch.testing.assert_close(out[0].unsqueeze(1), want)
    cache.free_sequence(seq)
    cache.check_integrity()
    cache.free_sequence(child)
    assert cache.stats()["blocks_free"] == 4


def test_running_out_of_blocks_changes_nothing() -> None:
    cache = make_cache(num_blocks=2)
    seq = cache.allocate_sequence()
    fill(cache, seq, 16)
    before = cache.stats()
    with pytest.raises(CapacityError):
        cache.append(seq, *tokens(1))
    with pytest.raises(CapacityError):
        cache.allocate_sequence(1)
    assert cache.stats() == before
    cache.check_integrity()


def test_a_sequence_without_tokens_attends_to_nothing() -> None:
    cache = make_cache()
    seq = cache.allocate_sequence()
    out = cache.paged_attention(
        torch.randn(1, HEADS, DIM), cache.block_tables([seq]), cache.context_lens([seq])
    )
    assert out.abs().max() == 0


@pytest.mark.parametrize("name", ["num_layers", "num_heads", "head_dim", "dtype", "num_blocks"])
def test_a_missing_field_is_named(name: str) -> None:
    with pytest.raises(ConfigError, match=name):
        make_cache(**{name: None})


def test_bad_arguments_are_named() -> None:
    cache = make_cache()
    seq = cache.allocate_sequence()
    key, value = tokens(2)
    query = torch.randn(1, HEADS, DIM)
    tables, lens = cache.block_tables([seq]), cache.context_lens([seq])
    with pytest.raises(ConfigError, match="seq_id"):
        cache.append(7, key, value)
    with pytest.raises(ConfigError, match="layer_idx"):
        cache.append(seq, key, value, LAYERS)
    with pytest.raises(ConfigError, match=r"key\.shape"):
        cache.append(seq, key[0], value)
    with pytest.raises(ConfigError, match=r"value\.shape"):
        cache.append(seq, key, value[:1])
    with pytest.raises(ConfigError, match="seq_len"):
        cache.allocate_sequence(-1)
    with pytest.raises(ConfigError, match=r"query\.shape"):
        cache.paged_attention(query[:, 1:], tables, lens)
    with pytest.raises(KernelError, match="context_lens"):
        cache.paged_attention(query, tables, lens.repeat(2))
    cache.append(seq, key, value)
    with pytest.raises(ConfigError, match="equally many"):
        cache.fork(seq)
    cache.free_sequence(seq)
    with pytest.raises(ConfigError, match="seq_id"):
        cache.free_sequence(seq)


def filled_cache() -> tuple[PagedAttentionCache, int, torch.Tensor]:
    """Two sequences of 12 and 5 tokens in blocks of 8, one freed before; the first is asked."""
    cache = make_cache()
    gone = cache.allocate_sequence(40)
    seq, other = cache.allocate_sequence(30), cache.allocate_sequence()
    for each, count in ((gone, 40), (seq, 12), (other, 5)):
        fill(cache, each, count)
    cache.free_sequence(gone)
    return cache, seq, cache.block_tables([seq])


def table(*blocks: int, dtype: torch.dtype = torch.int32) -> torch.Tensor:
    return torch.tensor([blocks], dtype=dtype)


def lens(value: float, dtype: torch.dtype = torch.int32) -> torch.Tensor:
    return torch.tensor([value], dtype=dtype)


Change = Callable[[torch.Tensor], tuple[Any, Any]]
WRONG_TABLES: dict[str, Change] = {
    "context past the table": lambda t: (t, lens(t.shape[1] * 8 + 1)),
    "context past what was appended": lambda t: (t, lens(13)),
    "context in a block that was never written": lambda t: (t, lens(30)),
    "negative context": lambda t: (t, lens(-1)),
    "context that wraps to a good one": lambda t: (t, lens(2**32 + 12, torch.int64)),
    "context that wraps to a negative one": lambda t: (t, lens(2**31, torch.int64)),
    "negative block": lambda t: (table(-1, -1), lens(12)),
    "block past the pool": lambda t: (table(33, 33), lens(12)),
    "trash block": lambda t: (table(0, 0), lens(12)),
    "block that was freed": lambda t: (table(1, 2), lens(12)),
    "block that was never allocated": lambda t: (table(20, 21), lens(12)),
    "entry that wraps to a good one": lambda t: (t.long() + 2**32, lens(12)),
    "table of floats": lambda t: (t.float(), lens(12)),
    "table of bools": lambda t: (t.bool(), lens(12)),
    "table of short numbers": lambda t: (t.to(torch.int16), lens(12)),
    "lengths of floats": lambda t: (t, lens(12.0, torch.float32)),
    "table of one dimension": lambda t: (t[0], lens(12)),
    "lengths of two dimensions": lambda t: (t, lens(12)[None]),
    "lengths of another batch": lambda t: (t, lens(12).repeat(2)),
    "table on another device": lambda t: (t.to("meta"), lens(12)),
    "lengths on another device": lambda t: (t, lens(12).to("meta")),
    "sparse table": lambda t: (t.to_sparse(), lens(12)),
    "list as table": lambda t: (t.tolist(), lens(12)),
    "array as table": lambda t: (t.numpy(), lens(12)),
    "no lengths": lambda t: (t, None),
    "table without columns": lambda t: (t[:, :0], lens(12)),
}


@pytest.mark.parametrize("name", WRONG_TABLES)
def test_tables_and_lengths_that_would_give_a_wrong_answer_are_refused(name: str) -> None:
    cache, seq, tables = filled_cache()
    query = torch.randn(1, HEADS, DIM)
    before = cache.paged_attention(query, tables, cache.context_lens([seq]))
    with pytest.raises(KernelError, match=r"block_tables|context_lens"):
        cache.paged_attention(query, *WRONG_TABLES[name](tables))
    after = cache.paged_attention(query, tables, cache.context_lens([seq]))
    assert torch.equal(before, after)
    cache.check_integrity()


def test_more_queries_than_tokens_are_refused() -> None:
    cache, _, tables = filled_cache()
    with pytest.raises(KernelError, match="context_lens"):
        cache.paged_attention(torch.randn(1, HEADS, 5, DIM), tables, lens(4))


def test_tables_and_lengths_of_any_stride_and_of_both_integer_types_give_the_same_answer() -> None:
    cache, seq, tables = filled_cache()
    query, count = torch.randn(1, HEADS, DIM), cache.context_lens([seq])
    want = cache.paged_attention(query, tables, count)
    strided = tables.repeat_interleave(2, 1)[:, ::2]
    for given_tables, given_lens in (
        (tables.long(), count.long()),
        (strided, torch.stack([count, count], 1)[:, 0]),
        (tables.t().contiguous().t(), count),
        (torch.cat([tables, table(-7, 99)], 1), count),
    ):
        assert torch.equal(cache.paged_attention(query, given_tables, given_lens), want)
    turned = query.transpose(1, 2).contiguous().transpose(1, 2)
    assert torch.equal(cache.paged_attention(turned, tables, count), want)


@pytest.mark.parametrize("name", ["key", "value"])
@pytest.mark.parametrize(
    "wrong",
    [
        torch.zeros(2, KV_HEADS, DIM, dtype=torch.int64),
        torch.zeros(2, KV_HEADS, DIM, dtype=torch.complex64),
        torch.zeros(2, KV_HEADS, DIM, device="meta"),
        torch.zeros(2, KV_HEADS, DIM).to_sparse(),
        torch.zeros(2, KV_HEADS, DIM).numpy(),
        None,
    ],
)
def test_tokens_of_a_wrong_kind_change_nothing(name: str, wrong: Any) -> None:
    cache, seq, _ = filled_cache()
    before = cache.stats()
    key, value = tokens(2)
    with pytest.raises(ConfigError, match=name):
        cache.append(seq, **{"key": key, "value": value} | {name: wrong})
    assert cache.stats() == before
    cache.check_integrity()


def test_a_cache_made_for_inference_or_fed_with_gradients_works_outside_of_either() -> None:
    with torch.inference_mode():
        cache = make_cache()
        seq = cache.allocate_sequence()
        fill(cache, seq, 3)
    for layer in range(LAYERS):
        key, value = tokens(2)
        cache.append(seq, key.requires_grad_(), value, layer)
    assert cache.context_lens([seq]).tolist() == [5]
    out = cache.paged_attention(
        torch.randn(1, HEADS, DIM), cache.block_tables([seq]), cache.context_lens([seq])
    )
    assert not out.requires_grad


@pytest.mark.parametrize(
    "sizes",
    [
        {"num_blocks": 2**31 - 1},
        {"num_blocks": 10**6, "num_heads": 2**14, "num_kv_heads": None, "head_dim": 2**14},
        {"num_layers": 2**14, "num_heads": 2**14, "num_kv_heads": None, "head_dim": 2**14},
        {"num_layers": 2**14, "num_blocks": 10**6},
    ],
)
def test_a_pool_that_no_memory_holds_is_refused_with_the_numbers(sizes: dict[str, Any]) -> None:
    outcome = good_or_refused(lambda: make_cache(**sizes))
    assert isinstance(outcome, CapacityError)
    assert "bytes" in str(outcome)


METHODS = {
    "allocate_sequence": 1, "append": 4, "fork": 1, "block_tables": 1, "context_lens": 1,
    "paged_attention": 4, "free_sequence": 1,
}  # fmt: skip
PLAUSIBLE = st.sampled_from([
    0, 1, 2, [1], [2, 2], [7], np.array([1]), torch.tensor([1]), lens(12), lens(300), table(3, 4),
    torch.randn(1, HEADS, DIM), torch.randn(1, HEADS, 3, DIM), torch.zeros(0, HEADS, DIM),
    torch.zeros(2, KV_HEADS, DIM), torch.zeros(9, KV_HEADS, DIM), torch.zeros(1, HEADS, 0, DIM),
    torch.zeros(2, KV_HEADS, DIM).half(), torch.zeros(0, 3, dtype=torch.int32),
])  # fmt: skip


@given(st.data(), st.sampled_from(sorted(METHODS)))
def test_any_arguments_give_a_result_or_an_error_and_the_cache_goes_on(
    data: st.DataObject, method: str
) -> None:
    cache, seq, tables = filled_cache()
    query = torch.randn(1, HEADS, DIM)
    want = cache.paged_attention(query, tables, lens(12))
    arguments = [data.draw(PLAUSIBLE | ANYTHING) for _ in range(METHODS[method])]
    good_or_refused(lambda: getattr(cache, method)(*arguments))
    cache.check_integrity()
    if cache.stats()["sequences"] >= 2 and not (method == "free_sequence" and arguments[0] is seq):
        assert torch.equal(cache.paged_attention(query, tables, lens(12)), want)


def test_what_is_no_config_is_refused() -> None:
    for value in EVERY:
        assert isinstance(
            good_or_refused(lambda value=value: PagedAttentionCache(value)), ConfigError
        )


class CacheMachine(RuleBasedStateMachine):
    """Random appends, forks and frees against lists of tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.cache = make_cache(num_blocks=12)
        self.model: dict[int, list[list[tuple[torch.Tensor, torch.Tensor]]]] = {}

    @rule(room=st.integers(0, 30))
    def allocate(self, room: int) -> None:
        try:
            self.model[self.cache.allocate_sequence(room)] = [[] for _ in range(LAYERS)]
        except CapacityError:
            assert self.cache.stats()["blocks_free"] * 8 < room

    @precondition(lambda self: self.model)
    @rule(data=st.data(), count=st.integers(1, 11))
    def append(self, data: st.DataObject, count: int) -> None:
        seq = data.draw(st.sampled_from(sorted(self.model)))
        for layer in range(LAYERS):
            key, value = tokens(count)
            try:
                self.cache.append(seq, key, value, layer)
            except CapacityError:
                assert layer == 0
                return
            self.model[seq][layer].append((key, value))

    @precondition(lambda self: self.model)
    @rule(data=st.data())
    def fork(self, data: st.DataObject) -> None:
        seq = data.draw(st.sampled_from(sorted(self.model)))
        self.model[self.cache.fork(seq)] = [list(layer) for layer in self.model[seq]]

    @precondition(lambda self: self.model)
    @rule(data=st.data())
    def free(self, data: st.DataObject) -> None:
        seq = data.draw(st.sampled_from(sorted(self.model)))
        self.cache.free_sequence(seq)
        del self.model[seq]

    @precondition(lambda self: self.model)
    @rule(data=st.data(), layer=st.integers(0, LAYERS - 1))
    def attend(self, data: st.DataObject, layer: int) -> None:
        seq = data.draw(st.sampled_from(sorted(self.model)))
        if not self.model[seq][layer]:
            return
        key, value = (torch.cat(side) for side in zip(*self.model[seq][layer], strict=True))
        query = torch.randn(1, HEADS, DIM)
        out = self.cache.paged_attention(
            query, self.cache.block_tables([seq]), self.cache.context_lens([seq]), layer
        )
        want = expected(query[0].unsqueeze(1), key, value, 1)
        torch.testing.assert_close(out[0].unsqueeze(1), want)

    @invariant()
    def holds_together(self) -> None:
        self.cache.check_integrity()
        seqs = sorted(self.model)
        lens = [sum(key.shape[0] for key, _ in self.model[seq][0]) for seq in seqs]
        assert self.cache.context_lens(seqs).tolist() == lens


TestCacheMachine = pytest.mark.no_cover(CacheMachine.TestCase)
TestCacheMachine.settings = settings(settings.get_profile("fast"), stateful_step_count=20)
