"""A quick benchmark against stock transformers: the same questions about one text, same tokens.

    python examples/against_hf.py [--model NAME] [--group GROUP] [--questions N] [--new-tokens N]

Three sides: stock `generate`, the adapter with an empty cache, and the adapter once more. Figures
that say more come from scripts/bench_*.py, which alternate and repeat.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import torch
from example_options import options, parse
from transformers import AutoModelForCausalLM

from litecache import KVCacheAdapter


def main() -> None:
    parser = options(__doc__)
    parser.add_argument("--questions", type=int, default=4)
    parser.add_argument("--new-tokens", type=int, default=16)
    parser.add_argument("--chars", type=int, default=2000, help="of the text")
    args = parse(parser)
    text = Path(__file__).with_name("document.txt").read_text(encoding="utf-8")[: args.chars]
    settings = {"max_new_tokens": args.new_tokens, "min_new_tokens": args.new_tokens}
    with KVCacheAdapter(args.model, group=args.group) as llm:
        tokenizer = llm.tokenizer
        prompts = [
            tokenizer(f"{text}\n\nQuestion {number}:", return_tensors="pt")
            for number in range(args.questions)
        ]
        stock = AutoModelForCausalLM.from_pretrained(args.model, dtype=llm.dtype)
        if torch.cuda.is_available():
            stock = stock.cuda()
        llm.clear("all")
        answers = {}
        for name, model in {"stock": stock, "empty cache": llm, "again": llm}.items():
            start = time.perf_counter()
            answers[name] = [ask(model, prompt, settings) for prompt in prompts]
            seconds = time.perf_counter() - start
            tokens = args.questions * args.new_tokens
            print(f"{name:>12}: {seconds:6.2f} s, {tokens / seconds:6.1f} new tokens/s")
    same = answers["stock"] == answers["empty cache"] == answers["again"]
    print("same tokens" if same else "different tokens (in bf16 where two are all but tied)")


def ask(model: Any, prompt: Any, settings: dict[str, int]) -> list[int]:
    with torch.no_grad():
        rows = model.generate(**prompt.to(model.device), do_sample=False, **settings)
    tokens: list[int] = rows[0].tolist()
    return tokens


if __name__ == "__main__":
    main()
