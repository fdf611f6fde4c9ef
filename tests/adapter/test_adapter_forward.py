"""`forward`, a call of the adapter and `prompt_logprobs` give what the stock model gives."""

from __future__ import annotations

import math
from typing import Any
from unittest.mock import Mock

import pytest
import torch
from transformers import LlamaForCausalLM

from litecache.adapter import KVCacheAdapter
from litecache.adapter.forward import ReplicaForward
from litecache.engine.engine_info import EngineInfo
from litecache.errors import ConfigError
from litecache.token_ids import TokenIds

IDS = torch.tensor([[(i * i * 7 + row * 31) % 200 + 5 for i in range(40)] for row in range(3)])


def padded(side: str) -> tuple[torch.Tensor, torch.Tensor]:
    mask = torch.ones_like(IDS)
    for row, count in enumerate((0, 13, 39)):
        mask[row, IDS.shape[1] - count :] = 0
    return IDS, mask if side == "right" else mask.flip(1)


def stock(model: LlamaForCausalLM, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Row by row, without padding; zeros elsewhere."""
    logits = torch.zeros((*ids.shape, model.config.vocab_size))
    with torch.inference_mode():
        for row in range(len(ids)):
            there = mask[row] != 0
            logits[row, there] = model(ids[row, there][None]).logits[0]
    return logits


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("keep", [0, 5])
def test_logits_of_a_padded_batch_are_stocks(
    llm: KVCacheAdapter, tiny_llama: LlamaForCausalLM, side: str, keep: int
) -> None:
    ids, mask = padded(side)
    expected = stock(tiny_llama, ids, mask)[:, -keep:]
    for cache in ("default", "no-store"):
        logits = llm.forward(ids, mask, keep, cache=cache)
        assert logits.dtype == llm.dtype
        torch.testing.assert_close(logits, expected, atol=1e-4, rtol=1e-4)
    assert llm.stats().running == 0


def test_more_logits_than_a_message_holds_come_in_parts(
    llm: KVCacheAdapter, tiny_llama: LlamaForCausalLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(EngineInfo, "max_logits", 7)
    ids, mask = padded("left")
    logits = llm.forward(ids, mask)
    torch.testing.assert_close(logits, stock(tiny_llama, ids, mask), atol=1e-4, rtol=1e-4)


def test_a_call_gives_logits_and_loss_as_the_model_does(
    llm: KVCacheAdapter, tiny_llama: LlamaForCausalLM
) -> None:
    labels = IDS.clone()
    labels[:, :10] = -100
    positions = torch.arange(IDS.shape[1])[None]
    output = llm(IDS, position_ids=positions, labels=labels, use_cache=False, return_dict=True)
    with torch.inference_mode():
        expected = tiny_llama(IDS, labels=labels)
    torch.testing.assert_close(output.logits, expected.logits, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(output.loss, expected.loss, atol=1e-4, rtol=1e-4)
    assert llm(input_ids=IDS[:1, :3]).loss is None


def test_logprobs_of_prompts_are_those_of_stocks_logits(
    llm: KVCacheAdapter, tiny_llama: LlamaForCausalLM
) -> None:
    prompts = [IDS[0].tolist(), IDS[1, :20].tolist(), [7]]
    told = llm.prompt_logprobs(prompts, 2, first=[1, 15, 1])
    assert [len(each) for each in told] == [39, 5, 0]
    for prompt, first, each in zip(prompts, (1, 15, 1), told, strict=True):
        with torch.inference_mode():
            scores = tiny_llama(torch.tensor([prompt])).logits[0].log_softmax(-1)
        for place, one in enumerate(each, start=first):
            assert math.isclose(one.logprob, scores[place - 1, prompt[place]], abs_tol=1e-4)
            assert [token for token, _ in one.top] == scores[place - 1].topk(2).indices.tolist()


DRAWS = {"do_sample": True}


@pytest.mark.parametrize(
    ("name", "call"),
    [
        ("input_ids", lambda llm: llm.forward()),
        ("input_ids", lambda llm: llm.forward(torch.tensor([[5, 211]]))),
        ("attention_mask", lambda llm: llm.forward(IDS, torch.ones(2, 2))),
        ("logits_to_keep", lambda llm: llm.forward(IDS, None, 41)),
        ("logits_to_keep", lambda llm: llm(IDS, labels=IDS, logits_to_keep=1)),
        ("labels", lambda llm: llm(IDS, labels=IDS[:, :2])),
        ("return_dict", lambda llm: llm(IDS, return_dict=False)),
        ("nonsense", lambda llm: llm(IDS, nonsense=3)),
        ("past_key_values", lambda llm: llm(IDS, past_key_values=((IDS,),))),
        ("position_ids", lambda llm: llm(IDS, position_ids=torch.ones_like(IDS))),
        ("top", lambda llm: llm.prompt_logprobs([[5, 6]], -1)),
        ("first", lambda llm: llm.prompt_logprobs([[5, 6]], first=0)),
        ("first", lambda llm: llm.prompt_logprobs([[5, 6]], first=[1, 1])),
        ("first", lambda llm: llm.prompt_logprobs([[5, 6]], first=None)),
        ("prompts[0]", lambda llm: llm.prompt_logprobs([[]])),
        ("cache", lambda llm: llm.forward(IDS, cache="some")),
        ("guides", lambda llm: llm.submit([[5]], guides=[5])),
        ("samples", lambda llm: llm.submit([[5]] * 2, samples=1 << 16)),
        ("num_return_sequences", lambda llm: llm.submit([[5]], num_return_sequences=2, **DRAWS)),
    ],
)
def test_a_bad_argument_is_named(llm: KVCacheAdapter, name: str, call: Any) -> None:
    with pytest.raises(ConfigError) as error:
        call(llm)
    assert error.value.field == name
    assert llm.stats().running == 0


def test_samples_of_a_prompt_compute_it_once(llm: KVCacheAdapter) -> None:
    prompt = (IDS[:1] + 3) % 200 + 5
    output = llm.generate(
        prompt,
        do_sample=True,
        num_return_sequences=4,
        max_new_tokens=4,
        seed=1,
        return_dict_in_generate=True,
    )
    found = output.litecache.reused_tokens
    assert sorted(sum(row.values()) for row in found) == [0, 39, 39, 39]


@pytest.mark.parametrize("options", [{}, {"num_beams": 2}])
def test_generate_tells_of_its_prompts_tokens(
    llm: KVCacheAdapter, tiny_llama: LlamaForCausalLM, options: dict[str, Any]
) -> None:
    ids, mask = padded("left")
    output = llm.generate(
        ids,
        attention_mask=mask,
        max_new_tokens=3,
        pad_token_id=0,
        prompt_logprobs=1,
        return_dict_in_generate=True,
        **options,
    )
    scores = stock(tiny_llama, ids, mask).log_softmax(-1)
    assert output.litecache.loop == ("driver" if options else "engine")
    for row, told in enumerate(output.litecache.prompt_logprobs):
        width = int(mask[row].sum())
        first = ids.shape[1] - width
        assert told[0] is None
        assert len(told) == width
        for place, one in enumerate(told[1:], start=first + 1):
            token = int(ids[row, place])
            assert math.isclose(one.logprob, scores[row, place - 1, token], abs_tol=1e-4)
            assert one.top[0][0] == int(scores[row, place - 1].argmax())
    with pytest.raises(ConfigError, match="return_dict_in_generate"):
        llm.generate(ids, prompt_logprobs=1)


def test_a_row_that_is_refused_is_so_before_its_first_part_is_computed() -> None:
    def check(tokens: TokenIds) -> None:
        if tokens.array.max() >= 8:
            raise ConfigError("input_ids", int(tokens.array.max()), "token ids from 0 to 7")

    info, replicas = Mock(vocab_size=8, dtype="float32", max_logits=2, check=check), Mock()
    forward = ReplicaForward(replicas, info, lambda tokens, count, logprobs: tokens)  # type: ignore[arg-type,return-value]
    with pytest.raises(ConfigError, match="input_ids=9"):
        forward([TokenIds([1, 2, 3, 9])], [4])
    assert not replicas.mock_calls
