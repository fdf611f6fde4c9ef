"""What transformers promises of `generate` for every model, over the proxy, on seven families.

Its own tests of a model class (`GenerationTesterMixin`) say what shape outputs have, which ways of
decoding give the same tokens, and what a cache that is handed back continues. The same promises
here, each beside a stock model with the same weights; `hf_tests.py` says which test of
transformers' each stands for.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any, NamedTuple

import pytest
import torch
from engine_harness import EngineForward, Harness
from features import ALL
from stock_forward import StockForward
from tiny_models import TINY_FAMILIES, VOCAB, assert_same, ragged, tiny_model
from transformers import CompileConfig, GenerationMixin
from transformers.generation import GenerateBeamDecoderOnlyOutput, GenerateDecoderOnlyOutput

from litecache.adapter.driver_loop import generate_in_driver
from litecache.adapter.proxy import ModelProxy, TokenRows
from litecache.engine.loading.model_source import ModelSource
from litecache.errors import ConfigError

NEW = 4
BATCH = ragged(9, 5)
ONE = ragged(9, seed=1)
ENDLESS = {"eos_token_id": None, "pad_token_id": 0}
RULES = {"bad_words_ids": [[1, 0], [7]], "repetition_penalty": 1.2, "remove_invalid_values": True}
SAMPLED = {"do_sample": True, "top_k": 10, "top_p": 0.7, "temperature": 0.7}
# By name: the settings, the rows of scores for a prompt, the rows of the result for a prompt.
MODES: dict[str, tuple[dict[str, Any], int, int]] = {
    "greedy": ({}, 1, 1),
    "sampling": (SAMPLED, 1, 1),
    "two samples": ({**SAMPLED, "num_return_sequences": 2}, 2, 2),
    "beams": ({"num_beams": 2, "length_penalty": 2.0}, 2, 1),
    "beams, both": ({"num_beams": 2, "num_return_sequences": 2}, 2, 2),
    "beam sampling": ({**SAMPLED, "num_beams": 2, "length_penalty": 2.0}, 2, 1),
}


class Pair(NamedTuple):
    """A stock model, and passes over its weights that a proxy makes."""

    model: Any
    forward: Any

    def proxy(self) -> ModelProxy:
        return ModelProxy(self.model.config, self.model.generation_config, self.forward)

    def stock(self, **call: Any) -> Any:
        torch.manual_seed(42)
        return self.model.generate(**{**BATCH, "max_new_tokens": NEW, **ENDLESS, **call})

    def ours(self, **call: Any) -> Any:
        torch.manual_seed(42)
        call = {**BATCH, "max_new_tokens": NEW, **ENDLESS, **call}
        return generate_in_driver(self.proxy(), call.pop("input_ids"), None, call)


# The loop alone, over stock passes, knows no families: two stand for all.
WAYS = [
    *("gemma2, engine", "gpt2, stock passes", "mixtral, stock passes"),
    *(
        pytest.param(f"{family}, engine", marks=pytest.mark.slow)
        for family in TINY_FAMILIES
        if family != "gemma2"
    ),
]
pytestmark = pytest.mark.no_cover


@pytest.fixture(scope="module", params=WAYS)
def pair(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Pair]:
    family, way = request.param.split(", ")
    model = tiny_model(family)
    if way != "engine":
        yield Pair(model, StockForward(model))
        return
    folder = str(tmp_path_factory.mktemp(family))
    model.save_pretrained(folder)
    with Harness(ModelSource(path=folder), block_size=8) as harness:
        yield Pair(model, EngineForward(harness))


@pytest.mark.parametrize("use_cache", [True, False])
@pytest.mark.parametrize("mode", MODES)
def test_every_mode_gives_outputs_of_the_promised_types_and_shapes(
    pair: Pair, mode: str, use_cache: bool
) -> None:
    settings, rows, results = MODES[mode]
    call = {**settings, **RULES, **ALL, "use_cache": use_cache, "min_new_tokens": NEW}
    out = pair.ours(**call)
    searched = "num_beams" in settings
    assert type(out) is (GenerateBeamDecoderOnlyOutput if searched else GenerateDecoderOnlyOutput)
    assert out.sequences.shape == (2 * results, 9 + NEW)
    for steps in (out.scores, out.logits):
        assert [step.shape for step in steps] == [(2 * rows, VOCAB)] * NEW
    if use_cache:
        assert (out.past_key_values.batch_size, out.past_key_values.get_seq_length()) == (
            2 * rows,
            9 + NEW - 1,
        )
    else:
        assert "past_key_values" not in out
    assert_same(out, pair.stock(**call))


def test_without_an_input_the_first_token_of_all_begins(pair: Pair) -> None:
    call = {"input_ids": None, "attention_mask": None, "remove_invalid_values": True}
    assert torch.equal(pair.ours(**call), pair.stock(**call))


@pytest.mark.parametrize("layers", [1, 2], ids=["often wrong", "always right"])
def test_drafts_of_an_assistant_change_nothing_of_a_greedy_output(pair: Pair, layers: int) -> None:
    assistant = copy.deepcopy(tiny_model(pair.model.config.model_type, layers))
    assistant.generation_config.num_assistant_tokens = 2
    assistant.generation_config.num_assistant_tokens_schedule = "constant"
    call = {**ONE, **RULES, **ALL}
    plain, drafted = pair.ours(**call), pair.ours(**call, assistant_model=assistant)
    assert_same(drafted, plain)
    assert_same(drafted, pair.stock(**call))


def test_drafts_of_the_prompt_change_nothing_of_a_greedy_output(pair: Pair) -> None:
    call = {**RULES, **ALL, "max_new_tokens": 8}
    call |= {name: tensor.repeat(1, 2) for name, tensor in ONE.items()}
    plain, drafted = pair.ours(**call), pair.ours(**call, prompt_lookup_num_tokens=2)
    assert_same(drafted, plain)
    assert_same(drafted, pair.stock(**call))


def test_sampling_with_an_assistant_gives_full_outputs(pair: Pair) -> None:
    assistant = tiny_model(pair.model.config.model_type)
    call = {**ONE, **ALL, **SAMPLED, "assistant_model": assistant, "num_assistant_tokens": 2}
    out = pair.ours(**call)
    assert [step.shape for step in out.scores] == [(1, VOCAB)] * NEW
    assert_same(out, pair.stock(**call))


def test_a_draft_of_the_prompt_does_not_run_over_an_end_token(pair: Pair) -> None:
    ids = torch.tensor([[5, 6, 51, 7, 8, 9, 51]])
    call = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "max_new_tokens": 8}
    end = int(pair.stock(**call)[0, 9])
    ids[0, 3] = end
    call |= {"eos_token_id": end}
    drafted = pair.ours(**call, prompt_lookup_num_tokens=4, max_matching_ngram_size=1)
    assert torch.equal(drafted, pair.ours(**call))
    assert end not in drafted[0, 7:-1].tolist()


def test_padding_on_the_left_changes_no_logits(pair: Pair) -> None:
    plain = pair.proxy()(**ONE).logits[:, -1]
    padded = {name: torch.nn.functional.pad(tensor, (32, 0)) for name, tensor in ONE.items()}
    logits = pair.proxy()(**padded).logits[:, -1]
    torch.testing.assert_close(logits, plain, atol=1e-5, rtol=1e-5)


def test_a_returned_cache_counts_rows_and_columns_and_holds_no_keys(pair: Pair) -> None:
    cache = pair.proxy()(**BATCH, use_cache=True).past_key_values
    assert isinstance(cache, TokenRows)
    assert (cache.batch_size, cache.get_seq_length(), len(cache)) == (2, 9, 0)
    with pytest.raises(ConfigError, match="past_key_values"):
        cache.update(torch.ones(1), torch.ones(1), 0)


@pytest.mark.parametrize("beams", [1, 2])
def test_embeddings_instead_of_tokens_are_refused(pair: Pair, beams: int) -> None:
    embeddings = pair.model.get_input_embeddings()(BATCH["input_ids"])
    for call in ({}, {"input_ids": None}, {"cache_implementation": "static"}):
        with pytest.raises(ConfigError, match=r"inputs_embeds.*input_ids instead"):
            pair.ours(inputs_embeds=embeddings, num_beams=beams, **call)


def test_a_call_of_four_tokens_is_one_of_three_and_one_that_goes_on(pair: Pair) -> None:
    whole = pair.ours(**ALL)
    first = pair.ours(**ALL, max_new_tokens=3)
    mask = torch.nn.functional.pad(BATCH["attention_mask"], (0, 3), value=1)
    turn = {"input_ids": first.sequences, "attention_mask": mask}
    last = pair.ours(**ALL, **turn, past_key_values=first.past_key_values, max_new_tokens=1)
    assert torch.equal(last.sequences, whole.sequences)
    assert_same(first.scores + last.scores, whole.scores)
    assert last.past_key_values.get_seq_length() == whole.past_key_values.get_seq_length()
    assert (last.past_key_values.tokens == whole.past_key_values.tokens).all()


def test_a_cache_goes_on_with_the_new_tokens_alone(pair: Pair) -> None:
    whole, first = pair.ours(**ALL), pair.ours(**ALL, max_new_tokens=2)
    mask = torch.nn.functional.pad(BATCH["attention_mask"], (0, 2), value=1)
    turn = {"attention_mask": mask, "max_new_tokens": 2}
    for ids in (first.sequences, first.sequences[:, -1:]):
        past = copy.deepcopy(first.past_key_values)
        last = pair.ours(**ALL, **turn, input_ids=ids, past_key_values=past)
        assert torch.equal(last.sequences[:, -3:], whole.sequences[:, -3:])
        assert_same(last.scores, whole.scores[2:])


@pytest.mark.parametrize(
    "settings",
    [
        {"cache_implementation": "static"},
        {"cache_implementation": "static", "cache_config": {"max_cache_len": 64}},
        {"compile_config": CompileConfig(fullgraph=True, dynamic=False)},
        {"disable_compile": True},
    ],
    ids=["static cache", "its length", "compiled", "not compiled"],
)
def test_how_transformers_would_compute_changes_no_output(
    pair: Pair, settings: dict[str, Any]
) -> None:
    assert_same(pair.ours(**ALL, **settings), pair.ours(**ALL))


def test_a_quantised_cache_is_refused(pair: Pair) -> None:
    with pytest.raises(ConfigError, match=r"cache_implementation='quantized'.*kv_dtype"):
        pair.ours(cache_implementation="quantized", cache_config={"nbits": 4})


@pytest.mark.parametrize("kept", [0, 1])
def test_logits_to_keep_changes_no_tokens(pair: Pair, kept: int) -> None:
    assert torch.equal(pair.ours(logits_to_keep=kept), pair.ours())


def test_a_forward_keeps_all_logits_or_those_of_the_last_columns(pair: Pair) -> None:
    every = pair.proxy()(**ONE, logits_to_keep=0).logits
    last = pair.proxy()(**ONE, logits_to_keep=1).logits
    assert (every.shape, last.shape) == ((1, 9, VOCAB), (1, 1, VOCAB))
    torch.testing.assert_close(every[:, -1:], last, atol=1e-5, rtol=1e-5)


def test_the_proxy_is_a_generation_mixin_and_hands_arguments_on(pair: Pair) -> None:
    proxy = pair.proxy()
    assert GenerationMixin in type(proxy).__bases__
    ids = torch.tensor([[1, 2, 3], [4, 5, 6]])
    others = {"custom": "value", "number": 42, "use_cache": True}
    inputs = proxy.prepare_inputs_for_generation(ids, **others)
    assert torch.equal(inputs["input_ids"], ids)
    assert {name: inputs[name] for name in others} == others


def test_positions_may_be_given_or_left_out(pair: Pair) -> None:
    positions = (BATCH["attention_mask"].cumsum(-1) - 1).clamp(min=0)
    assert torch.equal(pair.ours(position_ids=positions), pair.ours())


def test_a_forward_goes_on_from_positions_that_are_given(pair: Pair) -> None:
    first = pair.proxy()(**ONE, position_ids=torch.arange(9)[None], use_cache=True)
    token = first.logits[:, -1:].argmax(-1)
    then = pair.proxy()(
        token, past_key_values=first.past_key_values, position_ids=torch.tensor([[9]])
    )
    out = pair.ours(**ONE, **ALL, max_new_tokens=2)
    torch.testing.assert_close(then.logits[:, -1], out.logits[1], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("packed", ["positions that begin again", "a mask of four dimensions"])
def test_rows_packed_into_one_are_refused(pair: Pair, packed: str) -> None:
    ids = torch.tensor([[5, 6, 7, 8, 9]])
    inputs: dict[str, Any] = {"position_ids": torch.tensor([[0, 1, 2, 0, 1]])}
    if packed == "a mask of four dimensions":
        inputs = {"attention_mask": torch.ones(1, 1, 5, 5)}
    with pytest.raises(ConfigError, match=next(iter(inputs))):
        pair.proxy()(ids, **inputs)


@pytest.mark.parametrize("name", ["output_attentions", "output_hidden_states"])
def test_what_lies_in_the_layers_is_refused(pair: Pair, name: str) -> None:
    with pytest.raises(ConfigError, match=f"{name}=True.*another process"):
        pair.ours(**ALL, **{name: True})
