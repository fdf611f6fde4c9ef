"""The proxy and its cache of tokens: what is asked of a forward, and what is refused."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from stock_forward import StockForward
from tiny_models import VOCAB, assert_same, ragged, tiny_model
from transformers import DynamicCache, GenerationConfig

from litecache.adapter.proxy import ModelProxy, TokenRows
from litecache.errors import CapacityError, ConfigError, GroupUnavailableError

BATCH = ragged(12, 5, 9)
FULL = {"return_dict_in_generate": True, "output_logits": True, "max_new_tokens": 6}


@pytest.fixture
def forward() -> StockForward:
    return StockForward(tiny_model())


@pytest.fixture
def proxy(forward: StockForward) -> ModelProxy:
    return proxy_over(forward)


def proxy_over(forward: Any, **options: Any) -> ModelProxy:
    model = tiny_model()
    return ModelProxy(model.config, model.generation_config, forward, **options)


def stock_logits(batch: dict[str, torch.Tensor]) -> torch.Tensor:
    positions = (batch["attention_mask"].cumsum(-1) - 1).clamp(min=0)
    with torch.no_grad():
        return tiny_model()(**batch, position_ids=positions).logits


def test_a_forward_of_a_padded_batch_gives_stock_logits_at_every_token(proxy: ModelProxy) -> None:
    real = BATCH["attention_mask"].bool()
    logits = proxy(**BATCH).logits
    assert logits.shape == (3, 12, VOCAB)
    torch.testing.assert_close(logits[real], stock_logits(BATCH)[real], atol=1e-4, rtol=1e-4)
    assert not logits[~real].any()


@pytest.mark.parametrize("kept", [1, 4, torch.tensor([11, 8])])
def test_logits_to_keep_are_the_last_columns_or_those_named(
    proxy: ModelProxy, forward: StockForward, kept: Any
) -> None:
    logits = proxy(**BATCH, logits_to_keep=kept).logits
    columns = slice(-kept, None) if isinstance(kept, int) else kept
    expected = stock_logits(BATCH)[:, columns]
    torch.testing.assert_close(logits, expected, atol=1e-4, rtol=1e-4)
    assert forward.calls == [([12, 5, 9], [len(kept) + 2] * 3 if kept is columns else [kept] * 3)]


def test_columns_padded_on_the_right_have_the_logits_of_the_rows_last_token(
    proxy: ModelProxy, forward: StockForward
) -> None:
    ids = torch.tensor([[5, 6, 7, 0, 0], [8, 9, 10, 11, 12]])
    mask = torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]])
    last = proxy(ids, attention_mask=mask, logits_to_keep=1).logits
    alone = proxy(ids[:1, :3], logits_to_keep=1).logits
    assert torch.equal(last[0], alone[0])
    assert forward.calls[0] == ([3, 5], [1, 1])


def test_equal_rows_are_asked_for_once_for_the_most_positions(forward: StockForward) -> None:
    ids = torch.tensor([[5, 6, 0], [0, 5, 6], [0, 0, 9], [0, 5, 6]])
    logits = proxy_over(forward)(ids, attention_mask=(ids != 0).long(), logits_to_keep=2).logits
    assert forward.calls == [([2, 1], [2, 1])]
    assert torch.equal(logits[1], logits[3])
    assert torch.equal(logits[0, 0], logits[1, 1])


def test_the_first_step_of_beams_asks_for_each_prompt_once_and_later_ones_for_every_beam(
    proxy: ModelProxy, forward: StockForward
) -> None:
    proxy.generate(**BATCH, num_beams=4, max_new_tokens=4)
    assert [len(lengths) for lengths, _ in forward.calls] == [3, 12, 12, 12]
    assert all(set(wanted) == {1} for _, wanted in forward.calls)


def test_rows_that_have_ended_are_not_asked_for_unless_somebody_looks_at_their_scores(
    forward: StockForward,
) -> None:
    free = tiny_model().generate(**BATCH, max_new_tokens=6, eos_token_id=[96], pad_token_id=0)
    ends = {"eos_token_id": [int(free[0, 13])], "pad_token_id": 0, "max_new_tokens": 6}
    expected = tiny_model().generate(**BATCH, **ends)
    assert expected[1:, -1].all(), "only the first row ends"

    def rows(**settings: Any) -> list[int]:
        forward.calls.clear()
        sequences = proxy_over(forward).generate(**BATCH, **ends, **settings)
        assert torch.equal(getattr(sequences, "sequences", sequences), expected)
        return [len(lengths) for lengths, _ in forward.calls]

    assert rows() == [3, 3, 2, 2, 2, 2]
    assert rows(return_dict_in_generate=True) == [3, 3, 2, 2, 2, 2]
    assert rows(return_dict_in_generate=True, output_scores=True) == [3] * 6
    assert rows(return_dict_in_generate=True, output_logits=True) == [3] * 6
    assert rows(logits_processor=[lambda ids, scores: scores]) == [3] * 6
    assert rows(prefix_allowed_tokens_fn=lambda row, ids: range(VOCAB)) == [3] * 6


def test_rows_that_go_on_after_their_end_are_asked_for(forward: StockForward) -> None:
    def first_row_ends(ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        return torch.tensor([ids.shape[1] >= 14, False, False])

    # without end tokens there is no padding: transformers goes on with every row until all ended
    settings = {"stopping_criteria": [first_row_ends], "max_new_tokens": 6, "eos_token_id": None}
    models = (copy.copy(tiny_model()), proxy_over(forward))
    for model in models:
        model.generation_config = GenerationConfig(pad_token_id=0)
    stocks, ours = (model.generate(**BATCH, **settings) for model in models)
    assert torch.equal(ours, stocks)
    assert [len(lengths) for lengths, _ in forward.calls] == [3] * 6


def test_rows_that_ended_in_one_turn_are_asked_for_in_the_next(forward: StockForward) -> None:
    free = tiny_model().generate(**BATCH, max_new_tokens=4, eos_token_id=[96])
    ends = {"eos_token_id": [int(free[0, 12])], "pad_token_id": 0, "max_new_tokens": 4}
    results = []
    for model in (tiny_model(), proxy_over(forward)):
        first = model.generate(**BATCH, **ends, return_dict_in_generate=True)
        assert first.sequences[:, -1].tolist()[0] == 0
        past, turn = first.past_key_values, longer(first.sequences, BATCH["attention_mask"])
        results.append(model.generate(**turn, past_key_values=past, max_new_tokens=4))
    assert torch.equal(*results)


def test_drafts_are_tried_in_one_forward_of_several_positions(
    proxy: ModelProxy, forward: StockForward
) -> None:
    ids = torch.tensor([[5, 6, 7, 8, 5, 6]])
    proxy.generate(ids, prompt_lookup_num_tokens=3, max_new_tokens=5, pad_token_id=0)
    assert forward.calls[0] == ([9], [4])  # of the prompt's last token and three drafts


def test_guidance_asks_for_the_last_position_of_the_negative_prompt_alone(
    proxy: ModelProxy, forward: StockForward
) -> None:
    negative = ragged(7, 7, 7, seed=2)["input_ids"]
    proxy.generate(**BATCH, guidance_scale=2.0, negative_prompt_ids=negative, max_new_tokens=2)
    assert [lengths for lengths, _ in forward.calls] == [[12, 5, 9], [7] * 3, [13, 6, 10], [8] * 3]
    assert all(set(wanted) == {1} for _, wanted in forward.calls)


def test_a_forward_that_fails_leaves_the_cache_as_it_was() -> None:
    class Failing(StockForward):
        def __call__(self, rows: Any, wanted: Any) -> Any:
            if len(self.calls) == 1:
                raise GroupUnavailableError("gone")
            return super().__call__(rows, wanted)

    proxy = proxy_over(Failing(tiny_model()))
    cache = proxy(**BATCH).past_key_values
    with pytest.raises(GroupUnavailableError, match="gone"):
        proxy(torch.tensor([[7], [8], [9]]), past_key_values=cache)
    assert cache.get_seq_length() == 12


def longer(sequences: torch.Tensor, mask: torch.Tensor) -> dict[str, torch.Tensor]:
    """The next turn's input: everything so far and some tokens more."""
    ids = torch.cat([sequences, ragged(4, 4, 4, seed=5)["input_ids"]], dim=1)
    grown = torch.ones((3, ids.shape[1] - mask.shape[1]), dtype=mask.dtype)
    return {"input_ids": ids, "attention_mask": torch.cat([mask, grown], dim=1)}


@pytest.mark.parametrize("only_new", [False, True])
def test_a_returned_cache_goes_on_in_the_next_turn(proxy: ModelProxy, only_new: bool) -> None:
    results = []
    for model in (tiny_model(), proxy):
        first = model.generate(**BATCH, **FULL)
        turn = longer(first.sequences, BATCH["attention_mask"])
        past = first.past_key_values
        if only_new:
            turn["input_ids"] = turn["input_ids"][:, past.get_seq_length() :]
        second = model.generate(**turn, past_key_values=past, **FULL)
        assert second.past_key_values is past
        results.append(second)
    assert_same(results[1], results[0])


def test_drafts_go_on_from_a_returned_cache(proxy: ModelProxy) -> None:
    ids = torch.tensor([[5, 6, 7, 8, 5, 6]])
    first = proxy.generate(ids, max_new_tokens=4, return_dict_in_generate=True)
    ids = torch.cat([first.sequences, ids], dim=1)
    settings = {"max_new_tokens": 5, "pad_token_id": 0}
    drafted = {"prompt_lookup_num_tokens": 3, "past_key_values": first.past_key_values}
    out = proxy.generate(ids, **settings, **drafted)
    assert torch.equal(out, tiny_model().generate(ids, **settings))
    assert first.past_key_values.get_seq_length() == out.shape[1] - 1


def test_a_cache_may_be_cropped_copied_selected_and_repeated(proxy: ModelProxy) -> None:
    results = []
    for model in (tiny_model(), proxy):
        first = model.generate(**BATCH, **FULL)
        kept = first.past_key_values
        kept.crop(-4)
        past = copy.deepcopy(kept)
        past.batch_select_indices(torch.tensor([2, 0]))
        past.batch_repeat_interleave(2)
        width = past.get_seq_length()
        assert (width, kept.get_seq_length()) == (13, 13)
        turn = {
            name: tensor[[2, 2, 0, 0]]
            for name, tensor in longer(
                first.sequences[:, : width + 1], BATCH["attention_mask"]
            ).items()
        }
        results.append(model.generate(**turn, past_key_values=past, **FULL))
        assert kept.get_seq_length() == 13
    assert_same(results[1], results[0])


def test_crop_takes_the_length_to_keep_of_older_transformers_too() -> None:
    rows = TokenRows()
    rows.assign(*rows.extended(torch.arange(10).reshape(2, 5).numpy(), None))
    rows.crop(9)
    assert rows.get_seq_length() == 5
    rows.crop(4)
    assert rows.tokens.tolist() == [[0, 1, 2, 3], [5, 6, 7, 8]]
    rows.crop(0)
    assert rows.get_seq_length() == 4
    rows.crop(-9)
    assert rows.get_seq_length() == 0


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("inputs_embeds", torch.ones(1, 3, 32)),
        ("output_attentions", True),
        ("output_hidden_states", True),
        ("labels", torch.ones(1, 3)),
        ("past_key_values", DynamicCache()),
        ("past_key_values", "two rows"),
        ("attention_mask", torch.ones(1, 4)),
        ("attention_mask", torch.ones(1, 1, 3, 3)),
        ("attention_mask", [[1, 1, 1]]),
        ("position_ids", torch.tensor([[1, 2, 3]])),
        ("position_ids", "three"),
        ("input_ids", torch.ones(1, 3)),
        ("input_ids", None),
    ],
)
def test_a_forward_refuses_by_name_what_it_cannot_do(
    proxy: ModelProxy, forward: StockForward, field: str, value: Any
) -> None:
    inputs: dict[str, Any] = {"input_ids": torch.tensor([[5, 6, 7]])}
    if isinstance(value, str) and field == "past_key_values":
        value = proxy(torch.tensor([[5], [6]])).past_key_values
    forward.calls.clear()
    with pytest.raises(ConfigError) as refusal:
        proxy(**{**inputs, field: value})
    assert refusal.value.field == field
    assert forward.calls == []


def test_positions_that_follow_from_the_mask_pass(proxy: ModelProxy) -> None:
    cache = proxy(**BATCH).past_key_values
    new = torch.tensor([[7], [8], [9]])
    proxy(new, past_key_values=cache, position_ids=torch.tensor([[12], [5], [9]]))
    with pytest.raises(ConfigError, match="position_ids"):
        proxy(new, past_key_values=cache, position_ids=torch.tensor([[13], [13], [13]]))


def test_a_row_that_may_grow_too_long_is_refused_before_anything_is_computed(
    forward: StockForward,
) -> None:
    proxy = proxy_over(forward, max_model_len=20)
    with pytest.raises(CapacityError, match="21 tokens long: the model takes 20"):
        proxy.generate(**BATCH, max_new_tokens=9, num_beams=2)
    assert forward.calls == []
    proxy.generate(**BATCH, max_new_tokens=8)
    only_padding_is_long = {name: tensor[1:2] for name, tensor in BATCH.items()}
    proxy.generate(**only_padding_is_long, max_new_tokens=15)


def test_learned_positions_count_from_the_first_token_of_a_padded_row() -> None:
    model = tiny_model("gpt2")
    proxy = ModelProxy(model.config, model.generation_config, StockForward(model))
    expected = model.generate(**BATCH, **FULL, num_beams=2)
    assert_same(proxy.generate(**BATCH, **FULL, num_beams=2), expected)
