"""Many questions about one document: its KV is computed once, even for questions asked at once.

    python examples/shared_document.py [--model NAME] [--group GROUP] [--document FILE] [--chars N]

What is computed once stays: `warm` does it ahead of the first question, `pin` keeps it on disk, and
with `storage_dir` it is found after a restart (shared_prefix.py shows that).
"""

from __future__ import annotations

import time
from pathlib import Path

from example_options import options, parse

from litecache import KVCacheAdapter

QUESTIONS = (
    "What is the dam made of?",
    "How does the sea gate work?",
    "Where does a tide mill take its power from?",
)


def main() -> None:
    parser = options(__doc__)
    parser.add_argument("--document", type=Path, default=Path(__file__).with_name("document.txt"))
    parser.add_argument("--chars", type=int, default=2500, help="read so much of it")
    args = parse(parser)
    document = args.document.read_text(encoding="utf-8")[: args.chars]
    with KVCacheAdapter(args.model, group=args.group) as llm:
        tokenizer = llm.tokenizer

        def prompt(question: str) -> list[int]:
            message = {"role": "user", "content": f"{document}\n\nQuestion: {question}"}
            text = tokenizer.apply_chat_template(
                [message], tokenize=False, add_generation_prompt=True
            )
            ids: list[int] = tokenizer(text, add_special_tokens=False).input_ids
            return ids

        start = time.perf_counter()
        warmed = llm.warm([prompt("")])[0]
        print(f"read the document: {warmed['computed']} tokens computed in {since(start)}")

        start = time.perf_counter()
        stream = llm.stream(prompt(QUESTIONS[0]), max_new_tokens=32, do_sample=False)
        answer = next(stream)
        print(
            f"first word after {since(start)}, {sum(stream.reused_tokens.values())} tokens reused"
        )
        print(f"{QUESTIONS[0]} {answer}{''.join(stream)}")

        start = time.perf_counter()
        answers = llm.generate_batch(
            [prompt(question) for question in QUESTIONS[1:]], max_new_tokens=32, do_sample=False
        )
        print(f"{len(answers)} more questions at once: {since(start)}")
        for question, tokens in zip(QUESTIONS[1:], answers, strict=True):
            print(question, tokenizer.decode(tokens, skip_special_tokens=True))


def since(start: float) -> str:
    return f"{time.perf_counter() - start:.2f} s"


if __name__ == "__main__":
    main()
