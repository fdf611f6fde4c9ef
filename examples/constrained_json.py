"""Output that is valid by construction: a Python logits processor, and a function of prefixes.

    python examples/constrained_json.py [--model NAME] [--group GROUP]

Both are plain transformers: they run in this process, over the logits that the actors compute. What
they raise is raised here, and no actor ever runs a user's code.
"""

from __future__ import annotations

import json
from typing import Any

import regex
import torch
from example_options import options, parse
from transformers import LogitsProcessor, LogitsProcessorList

from litecache import KVCacheAdapter

RECORD = r'\{"name": "[A-Z][a-z]{1,11}", "age": [1-9][0-9]?, "likes": \["[a-z ]{3,16}"\]\}'
FRUIT = ("apple", "pear", "plum", "cherry")


class Pattern(LogitsProcessor):  # type: ignore[misc]
    """Leaves the likeliest tokens with which the answer is still the beginning of a match."""

    def __init__(
        self, pattern: str, tokenizer: Any, prompt_width: int, candidates: int = 8
    ) -> None:
        self.pattern, self.tokenizer = regex.compile(pattern), tokenizer
        self.prompt_width, self.candidates = prompt_width, candidates

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        allowed = torch.full_like(scores, -torch.inf)
        for row, ids in enumerate(input_ids[:, self.prompt_width :].tolist()):
            if self.pattern.fullmatch(self.tokenizer.decode(ids)):
                allowed[row, self.tokenizer.eos_token_id] = 0
                continue
            found = 0
            for token in scores[row].argsort(descending=True).tolist():
                text = self.tokenizer.decode([*ids, token])
                grows = len(text) > len(self.tokenizer.decode(ids))
                if grows and self.pattern.fullmatch(text, partial=True):
                    allowed[row, token] = scores[row, token]
                    found += 1
                if found == self.candidates:
                    break
        return allowed


def main() -> None:
    args = parse(options(__doc__))
    with KVCacheAdapter(args.model, group=args.group) as llm:
        tokenizer = llm.tokenizer
        prompt = tokenizer("Here is a record of a person, as JSON:\n", return_tensors="pt")
        width = prompt.input_ids.shape[1]
        processors = LogitsProcessorList([Pattern(RECORD, tokenizer, width)])
        rows = llm.generate(
            **prompt, max_new_tokens=48, do_sample=False, logits_processor=processors
        )
        text = tokenizer.decode(rows[0, width:], skip_special_tokens=True)
        print("record:", json.dumps(json.loads(text)))

        # One of a few answers, by transformers' prefix_allowed_tokens_fn, with beams.
        answers = [[*tokenizer(f" {name}").input_ids, tokenizer.eos_token_id] for name in FRUIT]
        prompt = tokenizer("The best fruit for a cake is the", return_tensors="pt")
        width = prompt.input_ids.shape[1]

        def continues(_: int, ids: torch.Tensor) -> list[int]:
            new = ids[width:].tolist()
            heads = [answer for answer in answers if answer[: len(new)] == new]
            return [a[len(new)] for a in heads if len(a) > len(new)] or [tokenizer.eos_token_id]

        rows = llm.generate(
            **prompt, max_new_tokens=6, num_beams=3, prefix_allowed_tokens_fn=continues
        )
        print("fruit:", tokenizer.decode(rows[0, width:], skip_special_tokens=True).strip())


if __name__ == "__main__":
    main()
