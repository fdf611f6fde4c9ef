from __future__ import annotations

from typing import Any

import pytest
import torch

from litecache.adapter.generation import refuse_arguments
from litecache.adapter.prompts import (
    MOST_SEQUENCES,
    append_rows,
    check_input_ids,
    check_prompt,
    check_prompts,
    split_rows,
)
from litecache.errors import ConfigError


def test_padding_on_either_side_is_left_out() -> None:
    ids = torch.tensor([[0, 0, 5, 6], [7, 8, 0, 0], [1, 2, 3, 4]])
    mask = torch.tensor([[0, 0, 1, 1], [1, 1, 0, 0], [1, 1, 1, 1]])
    assert split_rows(ids, mask, None) == [(5, 6), (7, 8), (1, 2, 3, 4)]


def test_a_masked_pad_token_that_is_also_a_word_stays_where_the_mask_says_so() -> None:
    ids = torch.tensor([[0, 0, 5]])
    assert split_rows(ids, torch.tensor([[0, 1, 1]]), 0) == [(0, 5)]


def test_without_a_mask_the_pad_token_is_padding() -> None:
    ids = torch.tensor([[9, 9, 5, 6]])
    assert split_rows(ids, None, 9) == [(5, 6)]
    assert split_rows(ids, None, None) == [(9, 9, 5, 6)]


def test_a_row_of_nothing_but_padding_is_refused() -> None:
    with pytest.raises(ConfigError, match="row 1"):
        split_rows(torch.tensor([[1, 2], [0, 0]]), torch.tensor([[1, 1], [0, 0]]), None)


def test_a_tensor_of_too_many_prompts_is_refused_before_its_rows_are_made(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    prompts = torch.zeros((1, 1), dtype=torch.int64).expand(MOST_SEQUENCES + 1, 1)
    made = []
    monkeypatch.setattr(torch.Tensor, "__iter__", lambda rows: made.append(rows) or iter(()))
    with pytest.raises(ConfigError, match="at most 65,536 sequences"):
        check_prompts(prompts, 100)
    assert not made


@pytest.mark.parametrize("mask", [torch.ones(1, 3), torch.ones(2), [[1, 1]]])
def test_a_mask_of_another_shape_is_refused(mask: Any) -> None:
    with pytest.raises(ConfigError, match="attention_mask"):
        split_rows(torch.ones(1, 2, dtype=torch.int64), mask, None)


@pytest.mark.parametrize(
    "ids",
    [
        *(None, [[1, 2]], torch.ones(2, 2), torch.ones(3, dtype=torch.int64), torch.ones(0, 4)),
        torch.ones(1, 3, dtype=torch.bool),  # a mask in the place of the ids
    ],
)
def test_what_is_no_integer_matrix_is_refused(ids: Any) -> None:
    with pytest.raises(ConfigError, match="input_ids"):
        check_input_ids(ids)


def test_an_empty_prompt_is_refused() -> None:
    with pytest.raises(ConfigError, match="at least one row and one token"):
        check_input_ids(torch.ones((1, 0), dtype=torch.int64))


def test_new_tokens_are_appended_and_shorter_rows_padded() -> None:
    ids = torch.tensor([[0, 5], [6, 7]], dtype=torch.uint8)
    out = append_rows(ids, [[1], [2, 50_000]], 9)
    assert out.tolist() == [[0, 5, 1, 9], [6, 7, 2, 50_000]]  # whatever a byte can hold
    assert out.dtype == torch.int64


SECRET = "the patient said"


@pytest.mark.parametrize("prompt", [SECRET.encode(), [SECRET], [[SECRET]], {SECRET: 1}, (SECRET,)])
def test_no_error_about_a_prompt_repeats_it(prompt: Any) -> None:
    for check in (check_input_ids, lambda given: check_prompt(given, 0, 512)):
        with pytest.raises(ConfigError) as refusal:
            check(prompt)
        assert SECRET not in f"{refusal.value!r} {vars(refusal.value)}"


def test_a_prompt_under_a_wrong_name_is_not_repeated() -> None:
    with pytest.raises(ConfigError, match="promt=<str of 16 characters>") as refusal:
        refuse_arguments({"promt": SECRET})
    assert SECRET not in f"{refusal.value!r} {vars(refusal.value)}"


def test_without_a_pad_token_rows_are_cut_to_the_shortest() -> None:
    out = append_rows(torch.tensor([[5], [6]]), [[1], [2, 3]], None)
    assert out.tolist() == [[5, 1], [6, 2]]
