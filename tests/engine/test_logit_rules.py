"""Penalties, biases and forbidden tokens: transformers' processors on the same logits, and its
tokens from the whole engine."""

from __future__ import annotations

import dataclasses
import random
from typing import Any

import plan_driver
import pytest
import torch
from engine_harness import Harness, family_source
from hypothesis import given
from hypothesis import strategies as st
from plan_driver import VOCAB, PlanDriver, random_prompt, stock_model, tiny_model
from transformers import (
    LogitsProcessorList,
    NoBadWordsLogitsProcessor,
    NoRepeatNGramLogitsProcessor,
    RepetitionPenaltyLogitsProcessor,
    SequenceBiasLogitsProcessor,
    SuppressTokensLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from litecache.engine.running.logit_rules import RowRules, RuleBook, RuledSample
from litecache.types import LogitRules, SamplingParams

SMALL = 24

_IDS = st.lists(st.integers(0, SMALL - 1), min_size=1, max_size=4).map(tuple)
RULES = st.builds(
    LogitRules,
    sequence_bias=st.dictionaries(_IDS, st.floats(-4, 4, width=32), max_size=4).map(
        lambda biases: tuple(biases.items())
    ),
    bad_words_ids=st.lists(_IDS, max_size=3, unique=True).map(tuple),
    suppress_tokens=st.lists(st.integers(0, SMALL - 1), max_size=3).map(tuple),
    repetition_penalty=st.sampled_from([1.0, 1.0, 1.3, 0.7]),
    no_repeat_ngram_size=st.sampled_from([0, 0, 1, 2, 3]),
)


def hf_scores(rules: LogitRules, tokens: list[int], logits: torch.Tensor) -> torch.Tensor:
    """What transformers makes of one row's logits, after columns with padding."""
    processors = LogitsProcessorList()
    if rules.sequence_bias:
        processors.append(
            SequenceBiasLogitsProcessor([[list(i), b] for i, b in rules.sequence_bias])
        )
    if rules.repetition_penalty != 1:
        padding = torch.tensor([rules.padding])
        processors.append(
            RepetitionPenaltyLogitsProcessor(rules.repetition_penalty, prompt_ignore_length=padding)
        )
    if rules.no_repeat_ngram_size:
        processors.append(NoRepeatNGramLogitsProcessor(rules.no_repeat_ngram_size))
    if rules.bad_words_ids:
        processors.append(NoBadWordsLogitsProcessor([list(ids) for ids in rules.bad_words_ids]))
    if rules.suppress_tokens:
        processors.append(SuppressTokensLogitsProcessor(rules.suppress_tokens))
    return processors(torch.tensor([tokens]), logits[None].clone())[0]


@given(st.lists(RULES, min_size=1, max_size=4), st.integers(0, 10_000))
def test_logits_become_those_of_transformers_processors_step_after_step(
    rules: list[LogitRules], seed: int
) -> None:
    rng = random.Random(seed)
    generator = torch.Generator().manual_seed(seed)
    rows = rng.sample(range(9), len(rules))
    tokens = [rng.choices(range(SMALL), k=rng.randrange(1, 20)) for _ in rules]
    pads = [rng.choices(range(SMALL), k=rng.choice([0, 0, 1, 3, 80])) for _ in rules]
    rules = [
        dataclasses.replace(rule, columns=(*pad, *row) if pad else (), padding=len(pad))
        for rule, pad, row in zip(rules, pads, tokens, strict=True)
    ]
    entries = [RowRules(r, t, len(t)) for r, t in zip(rules, tokens, strict=True)]
    book = RuleBook(64, torch.device("cpu"))
    for _ in range(4):
        # Rows come and go between the steps, among others without rules.
        present = sorted(rng.sample(range(len(rules)), rng.randrange(1, len(rules) + 1)))
        places = sorted(rng.sample(range(6), len(present)))
        logits = torch.randn(6, SMALL, generator=generator)
        samples = [
            RuledSample(place, rows[i], len(tokens[i]), entries[i])
            for place, i in zip(places, present, strict=True)
        ]
        got = book.apply(logits.clone(), samples)
        drawn = torch.tensor(rng.choices(range(SMALL), k=6))
        book.remember(drawn)
        untouched = [place for place in range(6) if place not in places]
        assert torch.equal(got[untouched], logits[untouched])
        for place, i in zip(places, present, strict=True):
            wanted = hf_scores(rules[i], [*pads[i], *tokens[i]], logits[place])
            torch.testing.assert_close(got[place], wanted, rtol=1e-6, atol=1e-6)
            assert torch.equal(got[place] == float("-inf"), wanted == float("-inf"))
            tokens[i].append(int(drawn[place]))


def test_presence_and_frequency_count_the_output_only() -> None:
    rules = LogitRules(presence_penalty=0.5, frequency_penalty=0.25)
    book = RuleBook(16, torch.device("cpu"))
    # Two tokens of prompt, then 3, 3, 5 generated before a preemption.
    entry = RowRules(rules, [1, 3, 3, 3, 5], 2)
    got = book.apply(torch.zeros(1, 8), [RuledSample(0, 0, 5, entry)])
    assert got[0].tolist() == [0, 0, 0, -1.0, 0, -0.75, 0, 0]
    book.remember(torch.tensor([5]))
    got = book.apply(torch.zeros(1, 8), [RuledSample(0, 0, 6, entry)])
    assert got[0].tolist() == [0, 0, 0, -1.0, 0, -1.0, 0, 0]


def test_a_sequence_longer_than_the_history_does_not_match_it() -> None:
    rules = LogitRules(sequence_bias=(((5, 5, 6), 2.0), ((5, 7), 1.0)))
    entry = RowRules(rules, [5], 1)
    got = RuleBook(8, torch.device("cpu")).apply(torch.zeros(1, 8), [RuledSample(0, 0, 1, entry)])
    assert got[0].tolist() == [0, 0, 0, 0, 0, 0, 0, 1.0]


def test_bfloat16_logits_are_changed_in_float32() -> None:
    logits = torch.tensor([[3.0, -2.0]], dtype=torch.bfloat16)
    entry = RowRules(LogitRules(repetition_penalty=1.001), [0, 1], 2)
    got = RuleBook(8, torch.device("cpu")).apply(logits, [RuledSample(0, 0, 2, entry)])
    torch.testing.assert_close(got, torch.tensor([[3 / 1.001, -2 * 1.001]]))


def stock(prompt: list[int], count: int, **settings: Any) -> list[int]:
    model = stock_model("llama", 0, plan_driver.DEVICE)
    ids = torch.tensor([prompt], device=plan_driver.DEVICE)
    out = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=count,
        do_sample=False,
        pad_token_id=0,
        **settings,
    )
    return out[0, len(prompt) :].tolist()


def words_of(outputs: list[list[int]]) -> list[tuple[int, ...]]:
    """Sequences that the free outputs contain, of one to three tokens, so that bans bite."""
    return [
        tuple(out[5 + size : 5 + 2 * size]) for size, out in zip((1, 2, 3), outputs, strict=True)
    ]


CASES: dict[str, dict[str, Any]] = {
    "repetition": {"repetition_penalty": 1.4},
    "encouraged repetition": {"repetition_penalty": 0.6},
    "ngrams": {"no_repeat_ngram_size": 2},
    "bad words": {"bad_words_ids": "words"},
    "suppressed": {"suppress_tokens": "tokens"},
    "begin suppressed": {"begin_suppress_tokens": "first"},
    "biased": {"sequence_bias": "biases"},
    "all": {
        "repetition_penalty": 1.2,
        "no_repeat_ngram_size": 3,
        "bad_words_ids": "words",
        "suppress_tokens": "tokens",
        "begin_suppress_tokens": "first",
        "sequence_bias": "biases",
    },
}


def filled(case: str, free: list[list[int]]) -> tuple[dict[str, Any], dict[str, Any]]:
    """A case's settings, for the engine and for transformers."""
    words = words_of(free)
    values = {
        "words": tuple(words),
        "tokens": tuple(sorted({out[3] for out in free})),
        "first": tuple(sorted({out[0] for out in free})),
        "biases": ((words[0], -3.0), (words[1], -50.0), ((7,), 2.0)),
    }
    ours = {name: values.get(str(value), value) for name, value in CASES[case].items()}
    theirs = {name: list(v) if isinstance(v, tuple) else v for name, v in ours.items()}
    if "bad_words_ids" in theirs:
        theirs["bad_words_ids"] = [list(word) for word in words]
    if "sequence_bias" in theirs:
        theirs["sequence_bias"] = [[list(ids), bias] for ids, bias in ours["sequence_bias"]]
    return ours, theirs


PROMPTS = [random_prompt(20 + i, seed=i) for i in range(3)]


@pytest.fixture(scope="module")
def free() -> list[list[int]]:
    """What the prompts give without rules."""
    return [stock(prompt, 40) for prompt in PROMPTS]


@pytest.mark.parametrize("case", CASES)
def test_greedy_tokens_equal_stock_generate_in_a_pool_that_preempts(
    case: str, free: list[list[int]]
) -> None:
    ours, theirs = filled(case, free)
    wanted = [stock(prompt, 40, **theirs) for prompt in PROMPTS]
    assert wanted != free, "the case changes nothing"
    with Harness(family_source("llama"), num_blocks=8, max_batch_tokens=16) as harness:
        assert harness.run(PROMPTS, 40, **ours) == wanted
        assert harness.engine.stats()["preemptions"] > 0


def test_rows_with_and_without_rules_share_a_batch_and_a_row_is_reused() -> None:
    loaded = tiny_model("llama")
    prompt = random_prompt(21, seed=4)
    other = random_prompt(9, seed=5)
    (missing,) = stock(other, 1)
    rules: dict[str, Any] = {"repetition_penalty": 1.4, "suppress_tokens": [missing]}
    penalised = SamplingParams(64, repetition_penalty=1.4, suppress_tokens=(missing,))
    driver = PlanDriver(loaded)
    driver.add(0, prompt)
    driver.add(1, prompt, penalised)
    steps = [driver.step({0: 21, 1: 21}).result().tokens]
    steps += [driver.step({0: 1, 1: 1}).result().tokens for _ in range(11)]
    columns = list(zip(*steps, strict=True))
    assert list(columns[0]) == stock(prompt, 12)
    assert list(columns[1]) == stock(prompt, 12, **rules)
    driver.add(1, other)
    first = driver.step({1: 9}).result().tokens[0]
    assert [first, *driver.decode(1, 7)] == stock(other, 8), "the rules of the row's last owner"


def test_sampling_with_rules_draws_what_transformers_keeps() -> None:
    loaded = tiny_model("llama")
    prompt = random_prompt(30, seed=6)
    ids = torch.tensor([prompt])
    with torch.no_grad():
        model = stock_model("llama", 0, plan_driver.DEVICE)
        logits = model(ids.to(plan_driver.DEVICE)).logits[0, -1].float().cpu()
    rules = LogitRules(repetition_penalty=1.5, sequence_bias=(((int(logits.argmax()),), -2.0),))
    scores = hf_scores(rules, prompt, logits)[None]
    for warper in (TemperatureLogitsWarper(1.2), TopKLogitsWarper(12), TopPLogitsWarper(0.9)):
        scores = warper(ids, scores)
    probabilities = scores[0].softmax(dim=-1)
    draws = 600
    driver = PlanDriver(loaded, num_blocks=40)
    counts = torch.zeros(VOCAB)
    sampling = SamplingParams(8, temperature=1.2, top_k=12, top_p=0.9, **dataclasses.asdict(rules))
    for seed in range(draws // 8):
        for row in range(8):
            number = dataclasses.replace(sampling, seed=seed, sample_index=row)
            if seed == 0:
                driver.add(row, prompt, number)
            else:
                # The prompt's KV lies there: only the last token is computed again.
                blocks = driver.rows[row].blocks
                driver._new.append(new_row(row, prompt, number))
                driver.rows[row] = type(driver.rows[row])(30, 29, blocks)
        step = dict.fromkeys(range(8), 30 if seed == 0 else 1)
        for token in driver.step(step).result().tokens:
            counts[token] += 1
    kept = probabilities > 0
    assert counts[~kept].sum() == 0
    expected = probabilities[kept] * draws
    chi = float(((counts[kept] - expected) ** 2 / expected).sum())
    freedom = int(kept.sum()) - 1
    assert freedom > 2
    assert chi <= freedom + 5 * (2 * freedom) ** 0.5


def new_row(row: int, prompt: list[int], sampling: SamplingParams) -> Any:
    from litecache.engine.scheduling.orders import NewRow

    return NewRow(row, tuple(prompt), len(prompt), sampling)


@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_logprobs_are_the_models_own_before_rules_and_temperature(temperature: float) -> None:
    prompts = [random_prompt(18, seed=8), random_prompt(11, seed=9)]
    with Harness(family_source("llama"), num_blocks=5) as harness:
        outputs = harness.run(
            prompts, 30, logprobs=3, repetition_penalty=1.3, temperature=temperature, seed=5
        )
        told = harness.logprobs
        assert harness.engine.stats()["preemptions"] > 0
    model = stock_model("llama", 0, plan_driver.DEVICE)
    for prompt, output, rows in zip(prompts, outputs, told, strict=True):
        with torch.no_grad():
            ids = torch.tensor([prompt + output], device=plan_driver.DEVICE)
            logits = model(ids).logits[0, len(prompt) - 1 : -1]
        wanted = logits.float().log_softmax(dim=-1).cpu()
        assert len(rows) == len(output) == 30
        for position, (token, row) in enumerate(zip(output, rows, strict=True)):
            assert row.logprob == pytest.approx(float(wanted[position, token]), abs=1e-4)
            top = wanted[position].topk(3)
            assert [t for t, _ in row.top] == top.indices.tolist()
            assert [v for _, v in row.top] == pytest.approx(top.values.tolist(), abs=1e-4)
