"""Rules, log-probabilities and stop strings through real actors, against stock `transformers`."""

from __future__ import annotations

import tracemalloc
from typing import Any

import pytest
import torch
from letter_tokenizer import letter_tokenizer
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast, StopStringCriteria

from litecache.adapter import KVCacheAdapter
from litecache.adapter.pending import PendingRequest, StopStrings
from litecache.errors import ConfigError
from litecache.types import FinishReason, Request, SamplingParams, TokenDelta, TokenLogprobs


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return letter_tokenizer()


def prompts(rows: int, length: int, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, 158, (rows, length), generator=generator)


def stock(model: LlamaForCausalLM, ids: torch.Tensor, **settings: Any) -> torch.Tensor:
    return model.generate(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        do_sample=False,
        pad_token_id=0,
        eos_token_id=210,
        **settings,
    )


def test_rules_give_the_tokens_of_stock_generate(
    llm: KVCacheAdapter, tiny_llama: LlamaForCausalLM
) -> None:
    ids = prompts(3, 20, seed=21)
    free = stock(tiny_llama, ids, max_new_tokens=24)[:, 20:].tolist()
    settings: dict[str, Any] = {
        "max_new_tokens": 24,
        "repetition_penalty": 1.3,
        "no_repeat_ngram_size": 3,
        "bad_words_ids": [free[0][2:3], free[1][4:6]],
        "suppress_tokens": [free[2][1]],
        "begin_suppress_tokens": [free[0][0]],
        "sequence_bias": [[free[2][3:5], -4.0], [[77], 1.0]],
    }
    expected = stock(tiny_llama, ids, **settings)
    assert not torch.equal(expected[:, 20:], torch.tensor(free))
    ours = llm.generate(ids, pad_token_id=0, eos_token_id=210, **settings)
    assert torch.equal(ours, expected)


def test_logprobs_come_with_the_result_and_with_a_stream(
    llm: KVCacheAdapter, tiny_llama: LlamaForCausalLM
) -> None:
    ids = prompts(2, 15, seed=22)
    out = llm.generate(ids, max_new_tokens=8, logprobs=2, return_dict_in_generate=True)
    with torch.no_grad():
        logits = tiny_llama(out.sequences).logits[:, 14:-1].float().log_softmax(-1)
    for row in range(2):
        told = out.litecache.logprobs[row]
        chosen = logits[row].gather(1, out.sequences[row, 15:, None])[:, 0]
        assert [t.logprob for t in told] == pytest.approx(chosen.tolist(), abs=1e-4)
        top = logits[row].topk(2)
        assert [[i for i, _ in t.top] for t in told] == top.indices.tolist()
    stream = llm.stream(ids[0].tolist(), as_tokens=True, max_new_tokens=8, logprobs=2)
    assert list(stream) == out.sequences[0, 15:].tolist()
    assert [t.logprob for t in stream.logprobs] == pytest.approx(
        [t.logprob for t in out.litecache.logprobs[0]], abs=1e-5
    )
    with pytest.raises(ConfigError, match=r"logprobs=2.*return_dict_in_generate"):
        llm.generate(ids, max_new_tokens=2, logprobs=2)
    with pytest.raises(ConfigError, match="logprobs=2"):
        llm.generate_batch([[5]], max_new_tokens=2, logprobs=2)
    with pytest.raises(ConfigError, match=r"logprobs=9999.*211"):
        llm.generate(ids, max_new_tokens=2, logprobs=9999, return_dict_in_generate=True)
    with pytest.raises(ConfigError, match=r"bad_words_ids=211.*0 to 210"):
        llm.generate(ids, max_new_tokens=2, bad_words_ids=[[211]])


def test_stop_strings_end_a_sequence_where_stock_generate_ends_it(
    llm: KVCacheAdapter, tiny_llama: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast
) -> None:
    ids = prompts(4, 20, seed=23)
    free = stock(tiny_llama, ids, max_new_tokens=60)[:, 20:]
    texts = [tokenizer.decode(row) for row in free]
    # Texts that begin and end inside tokens.
    stops = [texts[0][13:17], texts[1][21:26], texts[3][2:5]]
    settings = {"max_new_tokens": 60, "stop_strings": stops}
    expected = stock(tiny_llama, ids, tokenizer=tokenizer, **settings)
    assert expected.shape != (4, 80) or not torch.equal(expected[:, 20:], free)
    before = llm.stats()
    ours = llm.generate(ids, tokenizer=tokenizer, pad_token_id=0, eos_token_id=210, **settings)
    assert torch.equal(ours, expected)
    lengths = [int((row[20:] != 0).sum()) for row in expected]
    assert min(lengths) < 40
    stats = llm.stats()
    assert (stats.running, stats.blocks["private"]) == (0, 0), "nobody told the engine"
    assert stats.requests["abort"] > before.requests.get("abort", 0)


def test_a_stop_string_needs_a_tokenizer(llm: KVCacheAdapter) -> None:
    with pytest.raises(ConfigError, match="tokenizer"):
        llm.generate(prompts(1, 4, seed=1), max_new_tokens=4, stop_strings="ab")


def test_every_end_that_transformers_sees_is_seen(tokenizer: PreTrainedTokenizerFast) -> None:
    texts = ["abc", "dd", "eabcde"]
    ours, theirs = StopStrings(tokenizer, texts), StopStringCriteria(tokenizer, texts)
    generator = torch.Generator().manual_seed(4)
    ends = 0
    for _ in range(60):
        tokens = torch.randint(0, 211, (30,), generator=generator).tolist()
        wanted = next(
            (n for n in range(6, 31) if bool(theirs(torch.tensor([tokens[:n]]), None)[0])), None
        )
        count = ours.first_end(tokens[:5], tokens[5:])
        assert (None if count is None else count + 5) == wanted
        ends += wanted is not None
    assert 20 < ends < 60


def test_what_follows_a_stop_string_in_the_same_message_is_cut(
    tokenizer: PreTrainedTokenizerFast,
) -> None:
    vocab = tokenizer.get_vocab()
    stop = StopStrings(tokenizer, ["abc"])
    row = PendingRequest(Request("r", "c", (vocab["d"],), SamplingParams(9)), stop=stop)
    tokens = tuple(vocab[t] for t in ("ea", "bcd", "abc", "e"))
    told = tuple(TokenLogprobs(-float(i), ()) for i in range(4))
    row.feed(TokenDelta("r.0", tokens[:1], logprobs=told[:1]))
    assert not row.done
    row.feed(TokenDelta("r.0", tokens[1:], FinishReason.ERROR, "late", logprobs=told[1:]))
    assert row.wait() == list(tokens[:2])
    assert row.logprobs == list(told[:2])
    assert row.finish_reason is FinishReason.STOP


def test_the_work_for_a_token_does_not_grow_with_the_prompt(
    tokenizer: PreTrainedTokenizerFast,
) -> None:
    token = tokenizer.get_vocab()["d"]
    request = Request("r", "c", (token,) * 200_000, SamplingParams(99))
    row = PendingRequest(request, stop=StopStrings(tokenizer, ["abc"]))
    tracemalloc.start()
    try:
        for _ in range(20):
            row.feed(TokenDelta("r.0", (token,)))
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert len(row.tokens) == 20
    assert peak < 100_000, "the prompt was copied"


@pytest.mark.parametrize("ends", [{"stop_token_ids": [5]}, {"stop_strings": "ab"}])
def test_rows_that_may_end_early_need_a_token_to_fill_them(
    llm: KVCacheAdapter,
    tokenizer: PreTrainedTokenizerFast,
    monkeypatch: pytest.MonkeyPatch,
    ends: dict[str, Any],
) -> None:
    monkeypatch.setattr(llm.generation_config, "pad_token_id", None)
    monkeypatch.setattr(llm.generation_config, "eos_token_id", None)
    settings = {"max_new_tokens": 4, "tokenizer": tokenizer, **ends}
    two = prompts(2, 6, seed=24)
    with pytest.raises(ConfigError, match=r"pad_token_id=None.*a token id"):
        llm.generate(two, **settings)
    with pytest.raises(ConfigError, match="pad_token_id"):
        llm.generate(two[:1], do_sample=True, num_return_sequences=2, **settings)
    assert llm.generate(two, pad_token_id=0, **settings).shape[0] == 2
    assert llm.generate(two[:1], **settings).shape[0] == 1
    assert len(llm.generate_batch(two.tolist(), **settings)) == 2
    assert llm.generate(two, max_new_tokens=4, max_time=60.0).shape == (2, 10)
