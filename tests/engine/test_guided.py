"""Guided requests: the engine draws what their driver allows, and holds up nobody meanwhile."""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from engine_harness import ANSWER_TIMEOUT_S, Harness, family_source
from guided_rows import ToyGuide, pending, reference, run_rows
from plan_driver import VOCAB, stock_model
from transformers import RepetitionPenaltyLogitsProcessor

from litecache.engine.scheduling import scheduler
from litecache.errors import ConfigError
from litecache.types import FinishReason, Guidance, Request, SamplingParams, mask_bytes

PROMPTS = [[random.Random(i).randrange(VOCAB) for _ in range(5 + 9 * i)] for i in range(6)]


@pytest.fixture(scope="module")
def llama() -> Iterator[Harness]:
    made = Harness(family_source("llama"))
    yield made
    made.check()
    made.close()


def stock(family: str = "llama") -> Any:
    return stock_model(family, 0, "cpu")


@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt2"])
def test_guided_rows_equal_a_plain_loop_of_forwards_token_for_token(family: str) -> None:
    harness = Harness(family_source(family), max_batch_tokens=32)
    try:
        rows = [pending(f"r{i}", prompt, ToyGuide(VOCAB)) for i, prompt in enumerate(PROMPTS)]
        wanted = [reference(stock(family), p, ToyGuide(VOCAB), 40) for p in PROMPTS]
        assert run_rows(harness, rows) == wanted
        assert {row.finish_reason for row in rows} == {FinishReason.LENGTH}
        harness.check()
    finally:
        harness.close()


@pytest.mark.parametrize("deterministic", [False, True])
def test_rows_beside_others_preempted_and_moved_have_the_tokens_of_each_alone(
    deterministic: bool,
) -> None:
    dice = random.Random(5)
    harness = Harness(
        family_source("llama"), num_blocks=8, max_requests=6, deterministic=deterministic
    )
    try:
        drawn = {"temperature": 0.9, "top_k": 40, "top_p": 0.9}

        def made(index: int, name: str) -> Any:
            guide = ToyGuide(VOCAB) if index % 3 else None  # every third is free
            return pending(f"{name}{index}", PROMPTS[index][:6], guide, 60, seed=index, **drawn)

        alone = [run_rows(harness, [made(i, "alone")])[0] for i in range(6)]
        before = harness.engine.stats()["preemptions"]
        assert run_rows(harness, [made(i, "together") for i in range(6)]) == alone
        assert harness.engine.stats()["preemptions"] > before
        moved = [made(i, "moved") for i in range(6)]
        assert run_rows(harness, moved, lambda row: dice.random() < 0.03) == alone
        harness.check()
    finally:
        harness.close()


def test_penalties_see_what_was_appended_and_early_ends_are_not_drawn(llama: Harness) -> None:
    repetition = RepetitionPenaltyLogitsProcessor(1.3)
    eos, prompt = 9, PROMPTS[3]

    def change(logits: torch.Tensor, tokens: list[int]) -> torch.Tensor:
        logits = repetition(torch.tensor([tokens]), logits[None])[0]
        counts = torch.bincount(torch.tensor(tokens[len(prompt) :], dtype=int), minlength=VOCAB)
        logits = logits - 0.4 * counts - 0.3 * (counts > 0)
        if len(tokens) - len(prompt) < 50:
            logits[eos] = float("-inf")
        return logits

    rules = {"repetition_penalty": 1.3, "frequency_penalty": 0.4, "presence_penalty": 0.3}
    row = pending(
        "r", prompt, ToyGuide(VOCAB), 50, min_new_tokens=50, eos_token_ids=(eos,), **rules
    )
    wanted = reference(stock(), prompt, ToyGuide(VOCAB), 50, change)
    if eos in wanted:  # appended
        wanted = wanted[: wanted.index(eos) + 1]
    assert run_rows(llama, [row]) == [wanted]


def test_logprobs_are_the_models_own_and_certain_where_nothing_was_drawn(llama: Harness) -> None:
    guide = ToyGuide(VOCAB)
    row = pending("r", PROMPTS[1], guide, logprobs=2)
    (tokens,) = run_rows(llama, [row])
    check, place = ToyGuide(VOCAB), 0
    while place < len(tokens):
        with torch.inference_mode():
            ids = torch.tensor([PROMPTS[1] + tokens[:place]])
            wanted = stock()(ids).logits[0, -1].log_softmax(-1)
        told = row.logprobs[place]
        assert told.logprob == pytest.approx(float(wanted[tokens[place]]), abs=1e-4)
        assert [token for token, _ in told.top] == wanted.topk(2).indices.tolist()
        forced = check.take([tokens[place]])
        for each in row.logprobs[place + 1 : place + 1 + len(forced)]:
            assert each == (0.0, ())
        place += 1 + len(forced)
    assert len(row.logprobs) == len(tokens)


@pytest.mark.parametrize("most", [1, 7, 30])
def test_a_row_ends_when_its_guide_is_whole(llama: Harness, most: int) -> None:
    row = pending("r", PROMPTS[2], ToyGuide(VOCAB, most=most), 100)
    wanted = reference(stock(), PROMPTS[2], ToyGuide(VOCAB, most=most), 100)
    assert run_rows(llama, [row]) == [wanted]
    assert row.finish_reason is FinishReason.STOP


def test_a_driver_that_never_answers_is_waited_for_in_vain_by_its_own_request_alone(
    llama: Harness, monkeypatch: pytest.MonkeyPatch
) -> None:
    silent = pending("silent", PROMPTS[0], ToyGuide(VOCAB))
    llama.engine.submit([silent.wire_request()])
    (((_, delta),),) = [llama.deltas.get(timeout=ANSWER_TIMEOUT_S)]
    assert delta.awaits_guidance
    (free,) = run_rows(llama, [pending("free", PROMPTS[4], None)])
    assert len(free) == 40
    assert llama.engine.stats()["running"] == 1
    monkeypatch.setattr(scheduler, "GUIDANCE_PATIENCE_S", 0.01)
    llama.engine.stats()  # it looks at its deadlines anew
    (((_, end),),) = [llama.deltas.get(timeout=ANSWER_TIMEOUT_S)]
    assert end.finish_reason is FinishReason.ERROR
    assert "its driver has allowed no token for 0.01 s" in end.error


def test_an_answer_that_nobody_waits_for_changes_nothing(llama: Harness) -> None:
    row = pending("r", PROMPTS[2], ToyGuide(VOCAB))
    mask = b"\xff" * mask_bytes(VOCAB)
    real = llama.engine.guide

    def confused(guidance: list[Guidance]) -> None:
        (right,) = guidance
        other = right._replace(num_tokens=right.num_tokens - 1, token_ids=(1, 2))
        real([other, Guidance("nobody", 5, (), mask), right, right, other])

    llama.engine.guide = confused  # type: ignore[method-assign]
    try:
        tokens = run_rows(llama, [row])
    finally:
        llama.engine.guide = real  # type: ignore[method-assign]
    assert tokens == [reference(stock(), PROMPTS[2], ToyGuide(VOCAB), 40)]


def test_rules_and_a_mask_that_leave_nothing_end_that_request_alone(llama: Harness) -> None:
    only = bytes([1 << 3]).ljust(mask_bytes(VOCAB), b"\0")
    sampling = SamplingParams(5, suppress_tokens=(3,))
    llama.serve(
        [Request("", "c", (1, 2), sampling, mask=only), Request("", "c", (1, 2), SamplingParams(5))]
    )
    assert llama.reasons == [FinishReason.ERROR, FinishReason.LENGTH]
    assert "its rules leave no token to draw" in str(llama.errors[0])


@pytest.mark.parametrize(
    ("changed", "named"),
    [
        ({"mask": b"\1"}, "mask"),
        ({"mask": bytes(mask_bytes(VOCAB))}, "mask"),
        ({"mask": "x"}, "mask"),
        ({"mask": None}, "mask"),
        ({"token_ids": (VOCAB,)}, "token_ids"),
        ({"token_ids": 7}, "token_ids"),
        ({"num_tokens": 0}, "num_tokens"),
        ({"request_id": 5}, "request_id"),
    ],
)
def test_guidance_that_no_row_could_go_on_by_is_refused(
    llama: Harness, changed: dict[str, Any], named: str
) -> None:
    good = Guidance("r", 5, (1,), b"\xff" * mask_bytes(VOCAB))
    with pytest.raises(ConfigError, match=named):
        llama.engine.guide([good, good._replace(**changed)])
    if "mask" in changed and changed["mask"] is not None:
        with pytest.raises(ConfigError, match="mask"):
            llama.engine.submit([Request("r", "c", (1,), SamplingParams(1), **changed)])
    request = Request("r", "c", (1,), SamplingParams(0), logits=1, mask=good.mask)
    with pytest.raises(ConfigError, match="logits"):
        llama.engine.submit([request])
