"""`generate` on real actors in either loop: which one is taken, and that both are right."""

from __future__ import annotations

import _thread
import signal
import threading
from typing import Any

import pytest
import torch
from letter_tokenizer import letter_tokenizer
from torch.nn.utils.rnn import pad_sequence
from transformers import DynamicCache, GenerationConfig, LlamaForCausalLM, LogitsProcessorList

from litecache.adapter import KVCacheAdapter
from litecache.errors import CapacityError, ConfigError

FULL = {"return_dict_in_generate": True}


def ragged(*lengths: int, seed: int = 0) -> dict[str, torch.Tensor]:
    width = max(lengths)
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, 211, (len(lengths), width), generator=generator)
    mask = torch.ones_like(ids)
    for index, length in enumerate(lengths):
        ids[index, : width - length], mask[index, : width - length] = 0, 0
    return {"input_ids": ids, "attention_mask": mask}


BATCH = ragged(30, 7, 18)


def loop_of(llm: KVCacheAdapter, **settings: Any) -> str:
    return llm.generate(**BATCH, max_new_tokens=2, **FULL, **settings).litecache.loop


def nothing_is_open(llm: KVCacheAdapter, model: LlamaForCausalLM) -> None:
    assert llm.stats().running == 0
    expected = model.generate(**BATCH, max_new_tokens=4, do_sample=False)
    assert torch.equal(llm.generate(**BATCH, max_new_tokens=4, loop="driver"), expected)


def test_auto_takes_the_engine_wherever_it_does_what_is_asked(llm: KVCacheAdapter) -> None:
    assert loop_of(llm) == "engine"
    assert loop_of(llm, do_sample=True, num_return_sequences=2, repetition_penalty=1.2) == "engine"
    assert loop_of(llm, cache_implementation="static", use_cache=False) == "engine"
    assert loop_of(llm, loop="driver") == "driver"
    assert loop_of(llm, num_beams=2) == "driver"
    assert loop_of(llm, generation_config=GenerationConfig(guidance_scale=1.5)) == "driver"
    assert (
        loop_of(llm, stopping_criteria=[lambda ids, scores, **_: torch.ones(3).bool()]) == "driver"
    )
    for loop in ("drivers", None, ["engine"]):
        with pytest.raises(ConfigError, match=r"loop=.*auto, engine, driver"):
            loop_of(llm, loop=loop)


def test_rows_padded_on_the_right_go_on_as_rows_without_padding_in_either_loop(
    llm: KVCacheAdapter, tiny_llama: LlamaForCausalLM
) -> None:
    masks = BATCH["attention_mask"].bool()
    rows = [row[real] for row, real in zip(BATCH["input_ids"], masks, strict=True)]
    right = {"input_ids": pad_sequence(rows, True), "attention_mask": masks.flip(1).long()}
    each = {"max_new_tokens": 4, "do_sample": False}
    alone = [tiny_llama.generate(row[None], **each)[0, -4:] for row in rows]
    for settings in ({"loop": "engine"}, {"loop": "driver"}, {"logits_processor": [keep]}):
        out = llm.generate(**right, max_new_tokens=4, **settings)
        assert torch.equal(out, torch.cat([right["input_ids"], torch.stack(alone)], dim=1))
    with pytest.raises(ConfigError, match="stop_token_ids=999"):
        llm.generate(**right, stop_token_ids=[999])


def test_arguments_may_be_given_by_place_as_transformers_has_them(llm: KVCacheAdapter) -> None:
    config, mask = GenerationConfig(max_new_tokens=2), {"attention_mask": BATCH["attention_mask"]}
    named = llm.generate(BATCH["input_ids"], config, logits_processor=[negated], **mask)
    assert torch.equal(llm.generate(BATCH["input_ids"], config, [negated], **mask), named)
    with pytest.raises(ConfigError, match=r"logits_processor=.*by place or by name"):
        llm.generate(BATCH["input_ids"], config, [negated], logits_processor=[negated])
    with pytest.raises(ConfigError, match=r"8 arguments by place.*at most 7"):
        llm.generate(BATCH["input_ids"], config, None, None, None, None, None, None)


def test_a_default_device_of_the_callers_is_none_of_the_results(llm: KVCacheAdapter) -> None:
    ids, mask = BATCH.values()
    tokenizer = letter_tokenizer(211)

    def results() -> list[Any]:
        each = {"attention_mask": mask, "max_new_tokens": 4}
        tensors = [llm.generate(ids, **each), llm.generate(ids, **each, num_beams=2)]
        tensors += [llm.generate(max_new_tokens=2, num_beams=2), llm(ids, mask).logits]
        stops = {"stop_strings": ["a"], "tokenizer": tokenizer, "max_new_tokens": 3}
        return [*(each.tolist() for each in tensors), llm.generate_batch([[5, 6]], **stops)]

    expected = results()
    with torch.device("meta"):
        assert results() == expected


def negated(ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
    return -scores


def test_what_looks_for_runs_of_tokens_sees_padding_in_either_loop(
    llm: KVCacheAdapter, tiny_llama: LlamaForCausalLM
) -> None:
    batch = ragged(3, 1)
    batch["input_ids"][batch["attention_mask"] == 0] = 9
    last = batch["input_ids"][1, -1].item()
    rules = {"sequence_bias": [[[9, 9, last, 7], 500.0]], "bad_words_ids": [[last, 7, 8]]}
    each = {"max_new_tokens": 3, "repetition_penalty": 1.5, "no_repeat_ngram_size": 1, **rules}
    expected = tiny_llama.generate(**batch, **each)
    assert expected[1, 3] == 7
    for loop in ("engine", "driver"):
        assert torch.equal(llm.generate(**batch, **each, loop=loop), expected)


def keep(ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
    return scores


def test_the_engine_loop_alone_refuses_what_it_has_not_and_names_the_driver(
    llm: KVCacheAdapter,
) -> None:
    with pytest.raises(ConfigError, match=r"num_beams=4.*loop='driver'"):
        loop_of(llm, num_beams=4, loop="engine")
    with pytest.raises(ConfigError, match=r"num_beams=4.*generate\(\.\.\., loop='driver'\)"):
        llm.generate_batch([[5, 6]], num_beams=4)
    for loop in ("auto", "engine", "driver"):
        with pytest.raises(ConfigError, match=r"inputs_embeds.*input_ids instead"):
            loop_of(llm, inputs_embeds=torch.ones(3, 4, 64), loop=loop)


@pytest.mark.parametrize(
    "settings",
    [
        {"num_beams": 3, "num_return_sequences": 2, "output_scores": True, "output_logits": True},
        {"do_sample": True, "num_beams": 2, "top_k": 0},
        {"guidance_scale": 1.7, "negative_prompt_ids": BATCH["input_ids"][:, -5:]},
        {"logits_processor": LogitsProcessorList([lambda ids, scores: -scores]), "num_beams": 2},
    ],
    ids=["beams", "beam sampling", "guidance", "processor"],
)
def test_the_driver_loop_gives_what_stock_generate_gives(
    llm: KVCacheAdapter, tiny_llama: LlamaForCausalLM, settings: dict[str, Any]
) -> None:
    torch.manual_seed(8)
    expected = tiny_llama.generate(**BATCH, max_new_tokens=12, **FULL, **settings)
    state = torch.get_rng_state()
    torch.manual_seed(8)
    out = llm.generate(**BATCH, max_new_tokens=12, **FULL, **settings)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(out.sequences, expected.sequences)
    for ours, stocks in zip(out.get("scores") or (), expected.get("scores") or (), strict=True):
        torch.testing.assert_close(ours, stocks, atol=1e-4, rtol=1e-4)
    assert out.litecache.loop == "driver"


def test_transition_scores_of_beams_are_those_of_stock(
    llm: KVCacheAdapter, tiny_llama: LlamaForCausalLM
) -> None:
    settings = {"num_beams": 3, "max_new_tokens": 6, "output_scores": True, **FULL}
    ours, stocks = (
        model.compute_transition_scores(out.sequences, out.scores, out.beam_indices)
        for model in (llm, tiny_llama)
        for out in [model.generate(**BATCH, **settings, output_logits=True)]
    )
    torch.testing.assert_close(ours, stocks, atol=1e-4, rtol=1e-4)


def test_drafts_of_an_assistant_and_of_the_prompt_are_tried(
    llm: KVCacheAdapter, tiny_llama: LlamaForCausalLM
) -> None:
    ids = BATCH["input_ids"][:1].repeat(1, 3)
    expected = tiny_llama.generate(ids, max_new_tokens=16, do_sample=False)
    for drafts in ({"assistant_model": tiny_llama}, {"prompt_lookup_num_tokens": 4}):
        assert torch.equal(llm.generate(ids, max_new_tokens=16, **drafts), expected)


def test_a_seed_in_the_driver_loop_is_torchs(
    llm: KVCacheAdapter, tiny_llama: LlamaForCausalLM
) -> None:
    torch.manual_seed(21)
    expected = tiny_llama.generate(**BATCH, max_new_tokens=10, do_sample=True)
    out = llm.generate(**BATCH, max_new_tokens=10, do_sample=True, seed=21, loop="driver")
    assert torch.equal(out, expected)


@pytest.mark.parametrize(
    "settings",
    [
        {"presence_penalty": 1.3, "frequency_penalty": 0.4},
        {"logit_bias": {7: 4.0, 9: -3.0}, "sequence_bias": {(7,): 2.0}},
        {"stop_token_ids": [*range(3, 60)]},
        {"repetition_penalty": 1.4, "no_repeat_ngram_size": 2, "min_new_tokens": 5},
    ],
    ids=["penalties", "biases", "stops", "others"],
)
def test_own_arguments_mean_the_same_in_both_loops(
    llm: KVCacheAdapter, settings: dict[str, Any]
) -> None:
    engine = llm.generate(**BATCH, max_new_tokens=14, loop="engine", **settings)
    driver = llm.generate(**BATCH, max_new_tokens=14, loop="driver", **settings)
    assert torch.equal(driver, engine)


def test_stop_strings_and_token_healing_take_the_adapters_tokenizer(
    llm: KVCacheAdapter, tiny_llama: LlamaForCausalLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenizer = letter_tokenizer()
    monkeypatch.setattr(llm, "_tokenizer", tokenizer)
    ids = BATCH["input_ids"][:1]
    settings = {"max_new_tokens": 24, "num_beams": 2, "stop_strings": ["b", "ca"]}
    expected = tiny_llama.generate(ids, tokenizer=tokenizer, **settings)
    assert torch.equal(llm.generate(ids, **settings), expected)
    assert torch.equal(llm.generate(ids, tokenizer=tokenizer, **settings), expected)
    tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token = "<1>", "<2>", "<0>"
    letters = torch.tensor([[3, 5, 4, 7, 3]])  # the last one may become the beginning of a longer
    settings = {"max_new_tokens": 6, "token_healing": True}
    expected = tiny_llama.generate(letters, tokenizer=tokenizer, **settings)
    assert not torch.equal(expected[:, :5], letters)
    assert torch.equal(llm.generate(letters, **settings), expected)


def test_the_report_tells_what_the_first_forward_reused_and_salts_are_kept_apart(
    llm: KVCacheAdapter,
) -> None:
    batch = ragged(50, 20, seed=33)
    beams = {"num_beams": 2, "num_return_sequences": 2, "max_new_tokens": 3, **FULL}
    first = llm.generate(**batch, cache_salt="loops-a", **beams).litecache
    again = llm.generate(**batch, cache_salt="loops-a", **beams).litecache
    other = llm.generate(**batch, cache_salt="loops-b", **beams).litecache
    assert [sum(found.values()) for found in first.reused_tokens] == [0] * 4
    assert [sum(found.values()) for found in again.reused_tokens] == [49, 49, 19, 19]
    assert [sum(found.values()) for found in other.reused_tokens] == [0] * 4
    assert again.prompt_tokens == (50, 50, 20, 20)
    assert again.completion_tokens == (3,) * 4
    assert 0 < again.ttft_s[0] < again.total_s[0]


def test_nothing_stays_open_when_the_callers_code_raises(
    llm: KVCacheAdapter, tiny_llama: LlamaForCausalLM
) -> None:
    def third(ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        if ids.shape[1] == 32:
            raise LookupError("mine")
        return scores

    class Streamer:
        def put(self, value: torch.Tensor) -> None:
            if value.dim() == 1:
                raise LookupError("mine")

        def end(self) -> None: ...

    for settings in ({"logits_processor": [third]}, {"streamer": Streamer(), "loop": "driver"}):
        with pytest.raises(LookupError, match="mine"):
            llm.generate(**BATCH, max_new_tokens=20, **settings)
        nothing_is_open(llm, tiny_llama)


def test_ctrl_c_in_the_midst_of_a_forward_leaves_nothing_open(
    llm: KVCacheAdapter, tiny_llama: LlamaForCausalLM
) -> None:
    timer = threading.Timer(0.2, _thread.interrupt_main)
    # a process that was started in the background ignores it
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        timer.start()
        with pytest.raises(KeyboardInterrupt):
            llm.generate(**BATCH, max_new_tokens=400, num_beams=3, eos_token_id=None)
    finally:
        timer.join()
        signal.signal(signal.SIGINT, before)
    nothing_is_open(llm, tiny_llama)


def test_a_row_that_would_grow_beyond_the_model_is_refused_at_once(llm: KVCacheAdapter) -> None:
    with pytest.raises(CapacityError, match="tokens long: the model takes"):
        llm.generate(**BATCH, max_new_tokens=4000, num_beams=2)


@pytest.mark.parametrize("only_new", [False, True])
def test_a_returned_cache_goes_from_turn_to_turn_and_from_loop_to_loop(
    llm: KVCacheAdapter, tiny_llama: LlamaForCausalLM, only_new: bool
) -> None:
    def turns(model: Any, first: dict[str, Any], second: dict[str, Any]) -> list[Any]:
        one = model.generate(**BATCH, max_new_tokens=6, **FULL, **first)
        past = one.past_key_values
        ids = torch.cat([one.sequences, BATCH["input_ids"][:, -4:]], dim=1)
        mask = torch.ones_like(ids)
        mask[:, :30] = BATCH["attention_mask"]
        new = ids[:, past.get_seq_length() :] if only_new else ids
        length = past.get_seq_length()
        two = model.generate(
            new, attention_mask=mask, past_key_values=past, max_new_tokens=6, **FULL, **second
        )
        assert two.past_key_values is past
        return [length, past.get_seq_length(), one.sequences, two.sequences, two]

    expected = turns(tiny_llama, {}, {})
    for first, second in (({}, {}), ({}, {"loop": "driver"}), ({"loop": "driver"}, {})):
        ours = turns(llm, first, second)
        assert ours[:2] == expected[:2]
        assert torch.equal(ours[2], expected[2])
        assert torch.equal(ours[3], expected[3])
        # tokens that are not there cannot be given to the engine
        driver = only_new or bool(second)
        assert ours[4].litecache.loop == ("driver" if driver else "engine")
    beams = {"num_beams": 2}
    assert torch.equal(turns(llm, {}, {})[3], expected[3])
    past = llm.generate(**BATCH, max_new_tokens=6, **FULL).past_key_values
    past.batch_repeat_interleave(2)
    reference = tiny_llama.generate(**BATCH, max_new_tokens=6, **FULL)
    reference.past_key_values.batch_repeat_interleave(2)
    ids = torch.cat([reference.sequences, BATCH["input_ids"][:, -4:]], dim=1)
    mask = torch.ones_like(ids)
    mask[:, :30] = BATCH["attention_mask"]
    ours, stocks = (
        model.generate(ids, attention_mask=mask, past_key_values=cache, max_new_tokens=6, **beams)
        for model, cache in ((llm, past), (tiny_llama, reference.past_key_values))
    )
    assert torch.equal(ours, stocks)


def test_another_cache_or_other_tokens_than_the_caches_are_no_case_for_the_engine(
    llm: KVCacheAdapter,
) -> None:
    past = llm.generate(**BATCH, max_new_tokens=2, **FULL, use_cache=True).past_key_values
    assert llm.generate(**BATCH, max_new_tokens=2, **FULL, use_cache=False).past_key_values is None
    ids = torch.cat([BATCH["input_ids"], torch.full((3, 5), 9)], dim=1)
    mask = torch.cat([BATCH["attention_mask"], torch.ones((3, 5), dtype=torch.int64)], dim=1)
    settings = {"max_new_tokens": 1, **FULL, "past_key_values": past}
    out = llm.generate(ids, attention_mask=mask, **settings)
    assert out.litecache.loop == "driver"
    with pytest.raises(ConfigError, match=r"past_key_values.*that this adapter returned"):
        llm.generate(ids, attention_mask=mask, max_new_tokens=1, past_key_values=DynamicCache())
