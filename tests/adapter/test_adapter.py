"""`KVCacheAdapter` on real actors against stock `transformers`."""

from __future__ import annotations

import asyncio
import threading
import time
from typing import Any

import pytest
import torch
from transformers import GenerationConfig, LlamaForCausalLM

from litecache.adapter import KVCacheAdapter
from litecache.errors import CapacityError, ConfigError, RequestAborted


def prompts(*lengths: int, seed: int = 0) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(3, 211, (1, length), generator=generator) for length in lengths]


def padded(rows: list[torch.Tensor], side: str) -> tuple[torch.Tensor, torch.Tensor]:
    width = max(row.shape[1] for row in rows)
    ids = torch.zeros((len(rows), width), dtype=torch.int64)
    mask = torch.zeros_like(ids)
    for index, row in enumerate(rows):
        length = row.shape[1]
        span = slice(width - length, width) if side == "left" else slice(0, length)
        ids[index, span], mask[index, span] = row[0], 1
    return ids, mask


def stock(model: LlamaForCausalLM, ids: torch.Tensor, **kwargs: Any) -> torch.Tensor:
    mask = kwargs.pop("attention_mask", torch.ones_like(ids))
    return model.generate(input_ids=ids, attention_mask=mask, do_sample=False, **kwargs)


@pytest.mark.parametrize("side", ["left", "right"])
def test_greedy_tokens_equal_stock_generate_in_padded_batches(
    llm: KVCacheAdapter, tiny_llama: LlamaForCausalLM, side: str
) -> None:
    rows = prompts(1, 5, 16, 17, 33, 60)
    ids, mask = padded(rows, side)
    out = llm.generate(input_ids=ids, attention_mask=mask, max_new_tokens=24)
    assert torch.equal(out[:, : ids.shape[1]], ids)
    for index, row in enumerate(rows):
        alone = stock(tiny_llama, row, max_new_tokens=24)[0, row.shape[1] :]
        new = out[index, ids.shape[1] :]
        assert new[: len(alone)].tolist() == alone.tolist()
        assert not new[len(alone) :].any()  # the rest is padding


def test_a_left_padded_batch_comes_back_as_from_stock_generate(
    llm: KVCacheAdapter, tiny_llama: LlamaForCausalLM
) -> None:
    ids, mask = padded(prompts(7, 30, seed=2), "left")
    expected = stock(tiny_llama, ids, attention_mask=mask, max_length=50)
    assert torch.equal(llm.generate(ids, attention_mask=mask, max_length=50), expected)
    inferred = llm.generate(ids, generation_config=GenerationConfig(max_length=50))
    assert torch.equal(inferred, expected)


def test_reuse_is_told_per_row_and_every_tier_gives_the_same_tokens(llm: KVCacheAdapter) -> None:
    (ids,) = prompts(70, seed=3)
    reused = []
    sequences = []
    for emptied in ((), (), ("gpu",), ("gpu", "ram")):
        if emptied:
            llm.flush()
        for tier in emptied:
            llm.clear(tier)
        out = llm.generate(ids, max_new_tokens=16, return_dict_in_generate=True)
        sequences.append(out.sequences)
        reused.append(out.litecache.reused_tokens[0])
        assert out.litecache.ttft_s[0] > 0
    assert reused == [{}, {"gpu": 69}, {"ram": 64}, {"disk": 64}]
    assert all(torch.equal(sequences[0], other) for other in sequences)


def test_a_sequence_ends_at_an_end_token_and_shorter_rows_are_padded(
    llm: KVCacheAdapter, tiny_llama: LlamaForCausalLM
) -> None:
    rows = prompts(9, 9, 9, seed=4)
    ids = torch.cat(rows)
    free = stock(tiny_llama, ids, max_new_tokens=12, eos_token_id=210)
    ends = [int(free[0, 12]), int(free[1, 16])]
    expected = stock(tiny_llama, ids, max_new_tokens=12, eos_token_id=ends, pad_token_id=0)
    out = llm.generate(ids, max_new_tokens=12, eos_token_id=ends, pad_token_id=0)
    assert torch.equal(out, expected)
    minimum = stock(
        tiny_llama, ids, max_new_tokens=12, min_new_tokens=6, eos_token_id=ends, pad_token_id=0
    )
    out = llm.generate(ids, max_new_tokens=12, min_new_tokens=6, eos_token_id=ends, pad_token_id=0)
    assert torch.equal(out, minimum)


def test_a_result_tells_per_row_how_it_ended_and_how_many_tokens_it_took(
    llm: KVCacheAdapter, tiny_llama: LlamaForCausalLM
) -> None:
    ids, mask = padded(prompts(5, 9, 9, seed=4), "left")
    free = stock(tiny_llama, ids, attention_mask=mask, max_new_tokens=12, eos_token_id=210)
    ends = {"eos_token_id": [int(free[1, 12]), int(free[2, 16])], "pad_token_id": 0}
    expected = stock(tiny_llama, ids, attention_mask=mask, max_new_tokens=12, **ends)
    lengths = [int((row[9:] != 0).sum()) for row in expected]
    assert lengths[0] == 12 > max(lengths[1:])
    out = llm.generate(
        ids, attention_mask=mask, max_new_tokens=12, return_dict_in_generate=True, **ends
    )
    assert out.litecache.finish_reasons == ("length", "stop", "stop")
    assert out.litecache.completion_tokens == tuple(lengths)
    assert out.litecache.prompt_tokens == (5, 9, 9)
    stream = llm.stream(ids[1].tolist(), as_tokens=True, max_new_tokens=12, **ends)
    assert len(list(stream)) == lengths[1]
    assert stream.finish_reason == "stop"


def test_torchs_seed_reproduces_samples_and_samples_differ(llm: KVCacheAdapter) -> None:
    (ids,) = prompts(20, seed=5)
    settings = {"do_sample": True, "temperature": 1.0, "num_return_sequences": 3}
    torch.manual_seed(11)
    first = llm.generate(ids, max_new_tokens=12, **settings)
    torch.manual_seed(11)
    assert torch.equal(llm.generate(ids, max_new_tokens=12, **settings), first)
    assert len({tuple(row.tolist()) for row in first}) == 3
    assert not torch.equal(llm.generate(ids, max_new_tokens=12, **settings), first)


def test_a_batch_of_lists_gives_lists_of_new_tokens(
    llm: KVCacheAdapter, tiny_llama: LlamaForCausalLM
) -> None:
    rows = prompts(3, 40, 18, seed=6)
    out = llm.generate_batch([row[0].tolist() for row in rows], max_new_tokens=10)
    for row, new in zip(rows, out, strict=True):
        assert new == stock(tiny_llama, row, max_new_tokens=10)[0, row.shape[1] :].tolist()
    assert llm.generate_batch([], max_new_tokens=3) == []


def test_each_prompt_of_a_batch_may_have_settings_of_its_own(
    llm: KVCacheAdapter, tiny_llama: LlamaForCausalLM
) -> None:
    rows = prompts(3, 40, 18, seed=6)
    lists = [row[0].tolist() for row in rows]
    configs = [
        GenerationConfig(max_new_tokens=4),
        GenerationConfig(max_new_tokens=9, do_sample=True, top_k=0, num_return_sequences=2),
        GenerationConfig(max_new_tokens=6, repetition_penalty=1.3),
    ]
    first, *samples, last = llm.generate_batch(lists, configs, seed=3)
    for row, new, options in (
        (rows[0], first, {"max_new_tokens": 4}),
        (rows[2], last, {"max_new_tokens": 6, "repetition_penalty": 1.3}),
    ):
        assert new == stock(tiny_llama, row, **options)[0, row.shape[1] :].tolist()
    assert [len(sample) for sample in samples] == [9, 9]
    assert samples[0] != samples[1]
    assert llm.generate_batch(lists, configs, seed=3) == [first, *samples, last]
    with pytest.raises(ConfigError, match=r"generation_config=2.*a list of 3"):
        llm.generate_batch(lists, configs[:2])
    with pytest.raises(ConfigError, match="generation_config"):
        llm.generate_batch(lists, [*configs[:2], {"max_new_tokens": 4}])


def test_the_older_call_works_and_temperature_alone_changes_nothing(
    llm: KVCacheAdapter, tiny_llama: LlamaForCausalLM
) -> None:
    (ids,) = prompts(30, seed=15)
    with pytest.warns(UserWarning, match="temperature=0.7 has no effect"):
        out = llm.generate(input_ids=ids, max_length=100, temperature=0.7)
    assert torch.equal(out, stock(tiny_llama, ids, max_length=100))


def test_text_goes_in_and_comes_out_piece_by_piece(
    llm: KVCacheAdapter, tiny_llama: LlamaForCausalLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Letters:
        """One token per character."""

        def __call__(self, text: str) -> dict[str, list[int]]:
            return {"input_ids": [ord(letter) for letter in text]}

        def decode(self, token_ids: list[int], **options: Any) -> str:
            return "".join(chr(token) for token in token_ids)

    monkeypatch.setattr(llm, "_tokenizer", Letters())
    text = "Once upon a time"
    ids = torch.tensor([[ord(letter) for letter in text]])
    expected = stock(tiny_llama, ids, max_new_tokens=20)[0, len(text) :].tolist()
    pieces = list(llm.stream(text, max_new_tokens=20))
    assert "".join(pieces) == "".join(chr(token) for token in expected)


def test_a_stream_gives_the_tokens_of_generate(
    llm: KVCacheAdapter, tiny_llama: LlamaForCausalLM
) -> None:
    (ids,) = prompts(25, seed=7)
    expected = stock(tiny_llama, ids, max_new_tokens=15)[0, 25:].tolist()
    stream = llm.stream(input_ids=ids, as_tokens=True, max_new_tokens=15)
    assert stream.request_id
    assert list(stream) == expected
    assert list(llm.stream(ids[0].tolist(), as_tokens=True, max_new_tokens=15)) == expected


class Recorder:
    def __init__(self) -> None:
        self.calls: list[Any] = []

    def put(self, value: torch.Tensor) -> None:
        self.calls.append(value.tolist())

    def end(self) -> None:
        self.calls.append("end")


def test_a_streamer_sees_what_it_sees_in_stock_generate(
    llm: KVCacheAdapter, tiny_llama: LlamaForCausalLM
) -> None:
    (ids,) = prompts(8, seed=8)
    theirs, ours = Recorder(), Recorder()
    stock(tiny_llama, ids, max_new_tokens=6, streamer=theirs)
    llm.generate(ids, max_new_tokens=6, streamer=ours)
    assert ours.calls == theirs.calls


def test_an_aborted_request_raises_and_frees_its_blocks(llm: KVCacheAdapter) -> None:
    (ids,) = prompts(10, seed=9)
    stream = llm.stream(input_ids=ids, as_tokens=True, max_new_tokens=450, eos_token_id=210)
    next(stream)
    llm.abort(stream.request_id)
    with pytest.raises(RequestAborted, match=stream.request_id):
        list(stream)
    stats = llm.stats()
    assert (stats.running, stats.blocks["private"]) == (0, 0)


def test_a_stream_that_is_closed_early_is_aborted(llm: KVCacheAdapter) -> None:
    (ids,) = prompts(10, seed=10)
    before = llm.stats().requests.get("abort", 0)
    stream = llm.stream(input_ids=ids, as_tokens=True, max_new_tokens=450, eos_token_id=210)
    next(stream)
    stream.close()
    with pytest.raises(RequestAborted):
        stream._pending.wait()
    assert llm.stats().requests["abort"] == before + 1


def test_an_event_loop_streams_many_prompts_and_ends_those_it_leaves(llm: KVCacheAdapter) -> None:
    rows = [row[0].tolist() for row in prompts(12, 13, 14, 15, seed=16)]
    expected = llm.generate_batch(rows, max_new_tokens=20)
    before = llm.stats().requests.get("abort", 0)
    endless = {"as_tokens": True, "max_new_tokens": 450, "eos_token_id": 210}

    async def read(row: list[int]) -> list[int]:
        return [t async for t in llm.astream(row, as_tokens=True, max_new_tokens=20)]

    async def leave(row: list[int]) -> None:
        async for _ in llm.astream(row, **endless):
            break

    async def wait_for_ever(row: list[int], begun: asyncio.Event) -> None:
        async for _ in llm.astream(row, **endless):
            begun.set()

    async def all_of_them() -> list[list[int]]:
        begun = asyncio.Event()
        cancelled = asyncio.ensure_future(wait_for_ever(rows[1], begun))
        await begun.wait()
        cancelled.cancel()
        await leave(rows[0])
        with pytest.raises(ConfigError, match="max_new_tokens"):
            await llm.astream(rows[0], max_new_tokens=0).__anext__()
        return await asyncio.gather(*map(read, rows))

    assert asyncio.run(all_of_them()) == expected
    deadline = time.monotonic() + 60
    while (llm.stats().running, llm.stats().requests["abort"] - before) != (0, 2):
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_requests_of_several_threads_share_the_connection(
    llm: KVCacheAdapter, tiny_llama: LlamaForCausalLM
) -> None:
    rows = prompts(12, 13, 14, 15, seed=12)
    results: dict[int, torch.Tensor] = {}

    def work(index: int) -> None:
        results[index] = llm.generate(rows[index], max_new_tokens=20)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    for index, row in enumerate(rows):
        assert torch.equal(results[index], stock(tiny_llama, row, max_new_tokens=20))


def test_another_salt_shares_nothing(llm: KVCacheAdapter) -> None:
    (ids,) = prompts(40, seed=13)

    def reuse(salt: str) -> dict[str, int]:
        out = llm.generate(ids, max_new_tokens=2, return_dict_in_generate=True, cache_salt=salt)
        reused: dict[str, int] = out.litecache.reused_tokens[0]
        return reused

    assert reuse("a") == {}
    assert reuse("a") == {"gpu": 32}
    assert reuse("b") == {}


@pytest.mark.parametrize(
    ("prompt", "settings", "error", "message"),
    [
        ([], {}, ConfigError, "at least one token"),
        ([5, 211], {}, ConfigError, "input_ids=211.*token ids from 0 to 210"),
        ([5, -1], {}, ConfigError, "input_ids=-1"),
        ([5] * 500, {}, CapacityError, "500 tokens.*the model takes 512"),
        ([5], {"num_beams": 4}, ConfigError, "num_beams=4"),
        (["a"], {}, ConfigError, "a list of token ids"),
        ("text", {}, ConfigError, "a list of token ids"),
        ([5], {"cache_salt": 7}, ConfigError, "cache_salt=7"),
        ([5], {"cache": "no_store"}, ConfigError, "cache='no_store'.*default, no-store, read-only"),
        ([5], {"cache": None}, ConfigError, "cache=None"),
        ([5], {"cache_ttl_s": 0}, ConfigError, "cache_ttl_s=0"),
        ([5], {"cache_ttl_s": "1"}, ConfigError, "cache_ttl_s='1'"),
        ([5], {"retention": "top"}, ConfigError, "retention='top'.*normal, low, high"),
        ([5], {"seed": 1.5}, ConfigError, "seed=1.5"),
    ],
)
def test_bad_input_is_refused_before_anything_is_sent(
    llm: KVCacheAdapter,
    prompt: Any,
    settings: dict[str, Any],
    error: type[Exception],
    message: str,
) -> None:
    before = llm.stats()
    with pytest.raises(error, match=message):
        llm.generate_batch([[7, 8], prompt], **{"max_new_tokens": 20, **settings})
    after = llm.stats()
    assert after.prompt_tokens == before.prompt_tokens
    assert after.requests == before.requests


def test_a_stream_of_text_needs_a_tokenizer(llm: KVCacheAdapter) -> None:
    with pytest.raises(ConfigError, match="tokenizer"):
        llm.stream("Once upon a time", max_new_tokens=3)


def test_input_given_twice_is_refused_and_without_one_the_first_token_is_the_prompt(
    llm: KVCacheAdapter, tiny_llama: LlamaForCausalLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    (ids,) = prompts(4)
    with pytest.raises(ConfigError, match="given twice"):
        llm.generate(ids, input_ids=ids, max_new_tokens=3)
    expected = tiny_llama.generate(max_new_tokens=3, do_sample=False)
    assert torch.equal(llm.generate(max_new_tokens=3), expected)
    monkeypatch.setattr(llm.generation_config, "bos_token_id", None)
    with pytest.raises(ConfigError, match="input_ids=None"):
        llm.generate(max_new_tokens=3)


def test_an_unknown_tier_cannot_be_cleared(llm: KVCacheAdapter) -> None:
    with pytest.raises(ConfigError, match=r"tier='cpu'.*gpu, ram, disk, all"):
        llm.clear("cpu")


def test_counters_add_up(llm: KVCacheAdapter) -> None:
    before = llm.stats()
    (ids,) = prompts(33, seed=14)
    llm.generate(ids, max_new_tokens=3)
    llm.generate(ids, max_new_tokens=3)
    after = llm.stats()
    assert after.prompt_tokens - before.prompt_tokens == 66
    assert after.generated_tokens - before.generated_tokens == 6
    for name in ("found_tokens", "reused_tokens"):
        assert getattr(after, name)["gpu"] - getattr(before, name).get("gpu", 0) == 32
    assert after.requests["length"] - before.requests["length"] == 2
    assert sum(after.blocks.values()) == 96
    assert after.unavailable == ()
    (shard,) = after.shards.values()
    assert shard["clients"] == 1
