"""A call of the driver loop: LiteCache's own arguments, random numbers, errors, streamers."""

from __future__ import annotations

import contextlib
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from stock_forward import StockForward
from tiny_models import ragged, tiny_model
from transformers import (
    DynamicCache,
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
)
from transformers.generation import BaseStreamer

from litecache.adapter.driver_loop import generate_in_driver
from litecache.adapter.proxy import ModelProxy
from litecache.errors import ConfigError

BATCH = ragged(12, 5, 9)


@pytest.fixture
def forward() -> StockForward:
    return StockForward(tiny_model())


def drive(forward: Any, given: GenerationConfig | None = None, **arguments: Any) -> Any:
    model = tiny_model()
    proxy = ModelProxy(model.config, model.generation_config, forward)
    options = ("streamer", "seed", "tokenizer", "own_tokenizer", "most_threads")
    own = {name: arguments.pop(name) for name in options if name in arguments}
    arguments = {**BATCH, "max_new_tokens": 8, **arguments}
    return generate_in_driver(proxy, arguments.pop("input_ids"), given, arguments, **own)


def stock(**arguments: Any) -> Any:
    return tiny_model().generate(**{**BATCH, "max_new_tokens": 8, **arguments})


class Penalised(LogitsProcessor):
    """What presence and frequency penalties mean, token by token."""

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        scores = scores.clone()
        for row, ids in enumerate(input_ids.tolist()):
            for token in set(ids[12:]):
                scores[row, token] -= 1.5 + 0.75 * ids[12:].count(token)
        return scores


def test_penalties_of_the_output_lower_what_was_drawn_before(forward: StockForward) -> None:
    for settings in ({}, {"num_beams": 3}):
        out = drive(forward, presence_penalty=1.5, frequency_penalty=0.75, **settings)
        expected = stock(logits_processor=LogitsProcessorList([Penalised()]), **settings)
        assert torch.equal(out, expected)
        assert not torch.equal(out, stock(**settings))


def test_penalties_come_before_the_callers_processors(forward: StockForward) -> None:
    seen: list[torch.Tensor] = []

    def look(ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        seen.append(scores)
        return scores

    out = drive(forward, presence_penalty=1e6, logits_processor=LogitsProcessorList([look]))
    assert seen[1][0, out[0, 12]] < -1e5


def test_logit_bias_is_added_to_sequence_bias(forward: StockForward) -> None:
    out = drive(forward, logit_bias={7: 5.0, 8: 40.0}, sequence_bias={(7,): 36.0, (9, 9): 1.0})
    expected = stock(sequence_bias={(7,): 41.0, (8,): 40.0, (9, 9): 1.0})
    assert torch.equal(out, expected)
    assert {*out[:, 12].tolist()} <= {7, 8}
    forbidden = drive(forward, logit_bias=dict.fromkeys(range(50), float("-inf")))
    assert (forbidden[:, 12:] >= 50).all()


def test_stop_tokens_end_rows_as_end_tokens_do(forward: StockForward) -> None:
    free = stock()
    end, stops = int(free[2, 14]), [int(free[0, 13]), int(free[1, 15])]
    out = drive(forward, stop_token_ids=stops, eos_token_id=end)
    assert torch.equal(out, stock(eos_token_id=[end, *stops]))
    assert not torch.equal(out, stock(eos_token_id=stops))
    with pytest.raises(ConfigError, match="pad_token_id=None"):
        drive(
            forward, GenerationConfig(), stop_token_ids=stops, eos_token_id=None, pad_token_id=None
        )


def test_logprobs_are_refused_and_the_logits_named(forward: StockForward) -> None:
    with pytest.raises(ConfigError, match=r"logprobs=2.*output_logits=True"):
        drive(forward, logprobs=2)


def test_a_seed_gives_stocks_tokens_for_that_seed_and_leaves_torchs_generator_alone(
    forward: StockForward,
) -> None:
    torch.manual_seed(99)
    expected = stock(do_sample=True)
    torch.manual_seed(5)
    before = torch.get_rng_state()
    assert torch.equal(drive(forward, do_sample=True, seed=99), expected)
    assert torch.equal(torch.get_rng_state(), before)
    with pytest.raises(RuntimeError, match="mine"):
        drive(forward, do_sample=True, seed=99, logits_processor=[raising(RuntimeError("mine"))])
    assert torch.equal(torch.get_rng_state(), before)
    assert not torch.equal(drive(forward, do_sample=True), expected)
    with pytest.raises(ConfigError, match="seed=-1"):
        drive(forward, seed=-1)


def test_threads_with_seeds_do_not_draw_from_each_others(forward: StockForward) -> None:
    def expected(seed: int) -> torch.Tensor:
        torch.manual_seed(seed)
        return stock(do_sample=True)

    in_step = threading.Barrier(2)

    class InStep(LogitsProcessor):
        def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
            with contextlib.suppress(threading.BrokenBarrierError):
                in_step.wait(0.3)  # in vain: one waits for the other's end
            return scores

    def draw(seed: int) -> torch.Tensor:
        return drive(forward, do_sample=True, seed=seed, logits_processor=[InStep()])

    before = torch.get_rng_state()
    with ThreadPoolExecutor(2) as threads:
        found = list(threads.map(draw, (1, 2)))
    assert torch.equal(torch.get_rng_state(), before)
    assert all(map(torch.equal, found, map(expected, (1, 2))))


def raising(error: BaseException) -> Any:
    def process(ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        raise error

    return process


@pytest.mark.parametrize("error", [KeyError("mine"), ValueError("mine"), KeyboardInterrupt()])
def test_what_the_callers_code_raises_reaches_the_caller(
    forward: StockForward, error: BaseException
) -> None:
    class Streamer(BaseStreamer):
        def put(self, value: Any) -> None:
            raise error

        def end(self) -> None: ...

    def loop(model: Any, input_ids: torch.Tensor, **kwargs: Any) -> Any:
        raise error

    for arguments in (
        {"logits_processor": [raising(error)]},
        {"stopping_criteria": [raising(error)], "num_beams": 2},
        {"prefix_allowed_tokens_fn": raising(error)},
        {"streamer": Streamer()},
        {"custom_generate": loop},
    ):
        with pytest.raises(type(error)) as raised:
            drive(forward, **arguments)
        assert raised.value is error


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (
            {"num_beams": 2, "streamer": BaseStreamer()},
            "`streamer` cannot be used with beam search",
        ),
        ({"num_return_sequences": 2}, "Greedy methods .* not support `num_return_sequences`"),
        ({"num_beams": 2, "num_return_sequences": 3}, "has to be smaller or equal to `num_beams`"),
        ({"num_beams": 2, "low_memory": True}, "low_memory=True"),
        (
            {"num_beams": 4, "num_beam_groups": 2, "diversity_penalty": 0.5},
            "trust_remote_code=True",
        ),
        ({"num_beams": 2, "force_words_ids": [[5]]}, "trust_remote_code=True"),
        ({"penalty_alpha": 0.6, "top_k": 4}, "trust_remote_code=True"),
        ({"dola_layers": "high"}, "trust_remote_code=True"),
        ({"prompt_lookup_num_tokens": 2}, "only supported for batch_size = 1"),
        ({"max_new_token": 2}, "not used by the model: .'max_new_token'"),
        ({"stop_strings": ["a"]}, "must pass the model's tokenizer"),
        ({"top_p": -0.5, "do_sample": True, "num_beams": 2}, "`top_p` has to be a float"),
        ({"max_length": 5, "max_new_tokens": None}, "Input length of input_ids is 12"),
        ({"max_new_tokens": 0}, "max_new_tokens"),
    ],
)
def test_what_transformers_refuses_comes_in_its_own_words(
    forward: StockForward, arguments: dict[str, Any], words: str
) -> None:
    with pytest.raises(ConfigError, match=words):
        drive(forward, **arguments)
    assert forward.calls == [] or "prompt_lookup" in str(arguments)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("num_beams", object()),
        ("bad_words_ids", [[object()]]),
        ("logits_processor", [3]),
        ("logits_processor", object()),
        ("stopping_criteria", lambda ids, scores: False),
        ("prefix_allowed_tokens_fn", [1, 2]),
        ("assistant_model", "gpt2"),
        ("custom_generate", 7),
        ("past_key_values", DynamicCache()),
        ("negative_prompt_ids", [[1, 2]]),
        ("attention_mask", torch.ones(3, 4)),
        ("attention_mask", torch.ones(12)),
        ("input_ids", [[1, 2]]),
        ("inputs_embeds", torch.ones(3, 12, 32)),
        ("output_attentions", True),
        ("output_hidden_states", True),
        ("encoder_outputs", (1,)),
        ("use_mtp", True),
        ("assistant_early_exit", 1),
        ("token_type_ids", torch.ones(3, 12)),
        ("cache_implementation", "quantized"),
        ("compile_config", 3),
        ("num_return_sequences", 1 << 20),
        ("logit_bias", {97: 1.0}),
        ("stop_token_ids", [97]),
    ],
)
def test_bad_values_are_refused_by_name_before_transformers_sees_them(
    forward: StockForward, field: str, value: Any
) -> None:
    with pytest.raises(ConfigError) as refusal:
        drive(forward, **{field: value})
    assert refusal.value.field == field
    assert forward.calls == []


def padded_on_the_right() -> dict[str, torch.Tensor]:
    rows = zip(BATCH["input_ids"], BATCH["attention_mask"].bool(), strict=True)
    ids = [[*row[real].tolist(), *[0] * int((~real).sum())] for row, real in rows]
    return {"input_ids": torch.tensor(ids), "attention_mask": BATCH["attention_mask"].flip(1)}


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"attention_mask": None, "eos_token_id": 2, "pad_token_id": 0},
        {"num_beams": 3, "num_return_sequences": 2},
        {"do_sample": True, "num_return_sequences": 2},
        {"no_repeat_ngram_size": 1, "min_length": 17},
        {"guidance_scale": 1.7},
        {"position_ids": BATCH["attention_mask"].flip(1).cumsum(1) - 1},
    ],
    ids=lambda settings: ", ".join(settings) or "greedy",
)
def test_padding_on_the_right_gives_the_tokens_of_padding_on_the_left(
    forward: StockForward, settings: dict[str, Any]
) -> None:
    batch = padded_on_the_right()
    out = drive(forward, seed=7, **{**batch, **settings})
    torch.manual_seed(7)
    left = stock(**{name: value for name, value in settings.items() if name != "position_ids"})
    assert torch.equal(out[:, 12:], left[:, 12:])
    assert torch.equal(out[:, :12], batch["input_ids"].repeat_interleave(len(out) // 3, dim=0))


def test_a_cache_of_rows_padded_on_the_right_is_one_of_the_rows_as_given(
    forward: StockForward,
) -> None:
    first = drive(forward, **padded_on_the_right(), return_dict_in_generate=True, num_beams=2)
    ids, prompts = first.sequences, padded_on_the_right()["attention_mask"]
    new = torch.ones(3, ids.shape[1] - prompts.shape[1], dtype=torch.int64)
    turn = {"input_ids": ids, "attention_mask": torch.cat([prompts, new], dim=1)}
    past = first.past_key_values
    past.batch_select_indices(torch.tensor([0, 2, 4]))
    assert past.tokens[:, :12].tolist() == padded_on_the_right()["input_ids"].tolist()
    past.crop(-7)
    again = drive(forward, **turn, past_key_values=past)
    assert torch.equal(again, drive(forward, **turn))


@pytest.mark.parametrize("name", ["past_key_values", "token_healing"])
def test_padding_on_the_right_is_refused_where_columns_mean_something_else(
    forward: StockForward, name: str
) -> None:
    past = drive(forward, return_dict_in_generate=True, max_new_tokens=1).past_key_values
    forward.calls.clear()
    given = {"past_key_values": past, "token_healing": True}[name]
    with pytest.raises(ConfigError, match=rf"attention_mask='padding behind row 1'.*{name}"):
        drive(forward, **padded_on_the_right(), **{name: given})
    assert forward.calls == []


def test_any_number_but_0_in_a_mask_is_a_token_and_no_use_cache_is_the_default(
    forward: StockForward,
) -> None:
    mask = -2.0 * BATCH["attention_mask"]
    assert torch.equal(drive(forward, attention_mask=mask, use_cache=None), stock())


def test_minus_one_is_no_end_token_and_what_is_none_is_refused_before_a_pass(
    forward: StockForward,
) -> None:
    out = drive(forward, eos_token_id=-1, return_dict_in_generate=True)
    assert torch.equal(out.sequences, stock(eos_token_id=None))
    assert out.litecache.finish_reasons == ("length",) * 3
    forward.calls.clear()
    with pytest.raises(ConfigError, match="eos_token_id=-5"):
        drive(forward, eos_token_id=-5, return_dict_in_generate=True)
    assert forward.calls == []


def test_a_row_of_padding_alone_is_refused(forward: StockForward) -> None:
    mask = BATCH["attention_mask"].clone()
    mask[1] = 0
    with pytest.raises(ConfigError, match=r"row 1.*at least one token"):
        drive(forward, attention_mask=mask)


def test_a_streamer_gets_what_it_gets_from_stock(forward: StockForward) -> None:
    class Recorder(BaseStreamer):
        def __init__(self) -> None:
            self.got: list[Any] = []

        def put(self, value: torch.Tensor) -> None:
            self.got.append(value.tolist())

        def end(self) -> None:
            self.got.append("end")

    for settings in ({}, {"do_sample": True, "num_return_sequences": 2}):
        ours, stocks = Recorder(), Recorder()
        torch.manual_seed(3)
        stock(streamer=stocks, **settings)
        drive(forward, streamer=ours, seed=3, **settings)
        assert ours.got == stocks.got
        assert ours.got[-1] == "end"


def test_fewer_threads_are_taken_for_the_time_of_the_call_and_never_more(
    forward: StockForward,
) -> None:
    seen: list[int] = []

    def look(ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        seen.append(torch.get_num_threads())
        return scores

    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        for most in (1, 2, 3, None):
            drive(forward, logits_processor=[look], max_new_tokens=1, most_threads=most)
            assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)
    assert seen == [1, 2, 2, 2]


def test_without_an_input_the_models_first_token_begins(forward: StockForward) -> None:
    arguments = {"input_ids": None, "attention_mask": None, "num_beams": 2}
    out = drive(forward, **arguments)
    assert torch.equal(out, tiny_model().generate(num_beams=2, max_new_tokens=8))
    assert int(out[0, 0]) == 1


def test_the_callers_settings_and_the_models_stay_as_they_were(forward: StockForward) -> None:
    given = GenerationConfig(num_beams=2, eos_token_id=[5], bad_words_ids=[[7]])
    defaults = tiny_model().generation_config
    before = given.to_dict(), defaults.to_dict()
    drive(forward, given, stop_token_ids=[9], logit_bias={4: 1.0}, presence_penalty=0.5)
    assert (given.to_dict(), defaults.to_dict()) == before


def test_max_time_ends_all_rows(forward: StockForward) -> None:
    out = drive(forward, max_time=1e-9, num_beams=2)
    assert out.shape[1] == 13


def test_the_report_tells_how_each_row_ended_and_how_many_tokens_it_took(
    forward: StockForward,
) -> None:
    free = stock()[:, 12:].tolist()
    # one row draws an end token, one is ended by a criterion, the others go on to the end
    end = free[0][3]
    lengths = [row.index(end) + 1 if end in row else 8 for row in free]
    other = next(index for index, length in enumerate(lengths) if length == 8)
    lengths[other] = 5

    def criterion(ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        done = torch.zeros(len(ids), dtype=torch.bool)
        done[other] = ids.shape[1] >= 12 + 5
        return done

    for bound in ({"max_new_tokens": 8}, {"max_new_tokens": None, "max_length": 20}):
        out = drive(
            forward,
            eos_token_id=end,
            pad_token_id=0,
            stopping_criteria=[criterion],
            return_dict_in_generate=True,
            **bound,
        )
        assert out.litecache.completion_tokens == tuple(lengths)
        reasons = tuple("length" if length == 8 else "stop" for length in lengths)
        assert out.litecache.finish_reasons == reasons
        assert len(set(reasons)) == 2


def test_a_call_tells_how_far_it_has_come(forward: StockForward) -> None:
    model = tiny_model()
    proxy = ModelProxy(model.config, model.generation_config, forward)
    told = []

    def criterion(ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        told.append(proxy.progress()[:2])
        return torch.zeros(len(ids), dtype=torch.bool)

    arguments = {**BATCH, "max_new_tokens": 4, "stopping_criteria": [criterion]}
    generate_in_driver(proxy, arguments.pop("input_ids"), None, arguments)
    # what was drawn last is never forwarded
    assert told == [(done, 3) for done in range(4)]
    assert proxy.progress().words == "4 forward passes"
