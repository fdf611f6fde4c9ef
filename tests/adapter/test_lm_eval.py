"""lm-evaluation-harness over an adapter: the scores of its own `hf` model, task by task."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from small_tokenizers import small_tokenizer
from tiny_config import small_llama
from transformers import LlamaForCausalLM

from litecache import CacheConfig, KVCacheAdapter

pytest.importorskip("lm_eval", reason='needs pip install "litecache[eval]"')
pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]

POSITIONS = 128
SENTENCE = "the owl hunts at night and the hawk hunts by day while the mill turns with the tide"
WORDS = [*SENTENCE.split()]


@pytest.fixture(scope="module")
def model() -> LlamaForCausalLM:
    torch.set_num_threads(1)
    torch.manual_seed(3)
    config = small_llama(vocab_size=300, max_position_embeddings=POSITIONS, pad_token_id=2)
    return LlamaForCausalLM(config).eval()


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    made = copy.deepcopy(small_tokenizer("byte-level"))
    made.pad_token = made.eos_token
    return made


@pytest.fixture(scope="module")
def adapter(ray_local: None, model: LlamaForCausalLM) -> Iterator[KVCacheAdapter]:
    config = CacheConfig(num_blocks=256, dtype="float32", device="cpu", ram_bytes="32MB")
    with KVCacheAdapter(model, cache_config=config, num_threads=1) as started:
        yield started


def tasks() -> list[dict[str, Any]]:
    """Multiple choice with examples in front, a text to rate, a text to continue."""
    from datasets import Dataset

    def documents(**_: Any) -> dict[str, Any]:
        shifted = [WORDS[i:] + WORDS[:i] for i in range(0, len(WORDS), 3)]
        rows = [
            {
                "text": " ".join(words),
                "choices": [words[-1], words[2] + " " + words[3], "x"],
                "answer": i % 3,
            }
            for i, words in enumerate(shifted)
        ]
        return {"test": Dataset.from_list(rows), "train": Dataset.from_list(rows[:2])}

    common = {"custom_dataset": documents, "test_split": "test", "fewshot_split": "train"}
    return [
        {
            **common,
            "task": "choice",
            "output_type": "multiple_choice",
            "doc_to_text": "{{text[:24]}} ->",
            "doc_to_target": "{{answer}}",
            "doc_to_choice": "{{choices}}",
            "num_fewshot": 2,
            "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}],
        },
        {
            **common,
            "task": "rolling",
            "output_type": "loglikelihood_rolling",
            "doc_to_text": "",
            "doc_to_target": "{{text}} {{text}}",  # longer than the model takes at once
            "metric_list": [{"metric": "bits_per_byte"}, {"metric": "word_perplexity"}],
        },
        {
            **common,
            "task": "continue",
            "output_type": "generate_until",
            "doc_to_text": "{{text[:30]}}",
            "doc_to_target": "{{text[30:]}}",
            "generation_kwargs": {"until": ["e", "\n"], "max_gen_toks": 24},
            "metric_list": [{"metric": "exact_match"}],
        },
    ]


def evaluated(lm: Any) -> dict[str, Any]:
    from lm_eval import simple_evaluate

    found: dict[str, Any] = simple_evaluate(
        model=lm, tasks=tasks(), log_samples=True, bootstrap_iters=0, verbosity="ERROR"
    )
    return found


def test_every_score_and_answer_is_that_of_the_hf_model(
    adapter: KVCacheAdapter, model: LlamaForCausalLM, tokenizer: Any
) -> None:
    from lm_eval.models.huggingface import HFLM

    from litecache.adapter.lm_eval import LiteCacheLM

    own = evaluated(LiteCacheLM(adapter, tokenizer=tokenizer, batch_size=4))
    stock = evaluated(HFLM(pretrained=model, tokenizer=tokenizer, batch_size=4))
    assert own["results"].keys() == stock["results"].keys() == {"choice", "rolling", "continue"}
    for task, scores in stock["results"].items():
        numbers = {k: v for k, v in scores.items() if isinstance(v, float)}
        assert numbers, scores
        for name, value in numbers.items():
            assert own["results"][task][name] == pytest.approx(value, rel=1e-4, abs=1e-3), (
                task,
                name,
            )
    for task, samples in stock["samples"].items():
        pairs = zip(own["samples"][task], samples, strict=True)
        for mine, other in pairs:
            assert flat(mine["resps"]) == pytest.approx(flat(other["resps"]), abs=1e-3), task


def flat(answers: Any) -> list[Any]:
    """Numbers of nested lists; texts as the numbers of their characters."""
    if isinstance(answers, str):
        return [ord(letter) for letter in answers]
    if isinstance(answers, (list, tuple)):
        return [number for each in answers for number in flat(each)]
    return [answers]


def test_what_examples_have_in_common_is_computed_once(
    adapter: KVCacheAdapter, tokenizer: Any
) -> None:
    from lm_eval.api.instance import Instance

    from litecache.adapter.lm_eval import LiteCacheLM

    adapter.clear("all")
    lm = LiteCacheLM(adapter, tokenizer=tokenizer)
    shared = " ".join(WORDS)[:64]
    requests = [
        Instance("loglikelihood", {}, (shared + first, second), i)
        for i, (first, second) in enumerate([(" a", "b"), (" a", "c"), (" d", "b")])
    ]
    before = adapter.stats()
    lm.loglikelihood(requests[:1], disable_tqdm=True)
    lm.loglikelihood(requests[1:], disable_tqdm=True)
    after = adapter.stats()
    reused = sum(after.reused_tokens.values()) - sum(before.reused_tokens.values())
    assert reused >= 2 * 48
