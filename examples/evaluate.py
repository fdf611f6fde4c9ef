"""lm-evaluation-harness over an adapter, on tasks of one's own: choices, perplexity, answers.

    pip install "litecache[eval]"
    python examples/evaluate.py [--model NAME] [--group GROUP]

The scores are those of the harness's own `hf` model. The examples in front of each question are the
same for all of a task, so they are computed once.
"""

from __future__ import annotations

from typing import Any

from datasets import Dataset
from example_options import options, parse
from lm_eval import simple_evaluate

from litecache import KVCacheAdapter
from litecache.adapter.lm_eval import LiteCacheLM

FACTS = (
    ("A cow gives", ["milk", "ink", "sand"], 0),
    ("A bird lays", ["stones", "eggs", "bread"], 1),
    ("Snow is", ["hot", "loud", "cold"], 2),
    ("Fish live in the", ["water", "fire", "sky"], 0),
    ("At night it is", ["green", "dark", "noon"], 1),
    ("Honey is made by", ["cats", "spoons", "bees"], 2),
)


def documents(**_: Any) -> dict[str, Dataset]:
    rows = [{"text": text, "choices": choices, "answer": i} for text, choices, i in FACTS]
    return {"test": Dataset.from_list(rows[2:]), "examples": Dataset.from_list(rows[:2])}


COMMON = {
    "custom_dataset": documents,
    "test_split": "test",
    "fewshot_split": "examples",
    "num_fewshot": 2,
}
CHOICES = {
    **COMMON,
    "task": "facts",
    "output_type": "multiple_choice",
    "doc_to_text": "{{text}}",
    "doc_to_choice": "{{choices}}",
    "doc_to_target": "{{answer}}",
    "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}],
}
PERPLEXITY = {
    **COMMON,
    "task": "sentences",
    "num_fewshot": 0,
    "output_type": "loglikelihood_rolling",
    "doc_to_text": "",
    "doc_to_target": "{{text}} {{choices[answer]}}.",
    "metric_list": [{"metric": "word_perplexity"}, {"metric": "bits_per_byte"}],
}
ANSWERS = {
    **COMMON,
    "task": "answers",
    "output_type": "generate_until",
    "doc_to_text": "{{text}}",
    "doc_to_target": "{{choices[answer]}}",
    "generation_kwargs": {"until": ["\n", "."], "max_gen_toks": 4},
    "metric_list": [{"metric": "exact_match"}],
}


def main() -> None:
    args = parse(options(__doc__))
    with KVCacheAdapter(args.model, group=args.group) as llm:
        found = simple_evaluate(
            model=LiteCacheLM(llm), tasks=[CHOICES, PERPLEXITY, ANSWERS], bootstrap_iters=0
        )
    for task, scores in found["results"].items():
        for name, value in scores.items():
            if isinstance(value, float):
                print(f"{task} {name.removesuffix(',none')} {value:.4f}")


if __name__ == "__main__":
    main()
