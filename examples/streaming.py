"""Text as it comes: an iterator, transformers' own streamer, and many streams of an event loop.

python examples/streaming.py [--model NAME] [--group GROUP]
"""

from __future__ import annotations

import asyncio

from example_options import options, parse
from transformers import TextStreamer

from litecache import KVCacheAdapter

PROMPTS = ("The river begins", "The desert at night", "In the old library")


async def tell_all(llm: KVCacheAdapter) -> list[str]:
    """All prompts at once: the engine serves them as one batch, and no thread waits."""

    async def tell(prompt: str) -> str:
        text = ""
        async for piece in llm.astream(prompt, max_new_tokens=16, do_sample=False):
            text += piece
        return prompt + text

    return await asyncio.gather(*map(tell, PROMPTS))


def main() -> None:
    args = parse(options(__doc__))
    with KVCacheAdapter(args.model, group=args.group) as llm:
        print("iterator: Once upon a time", end="", flush=True)
        for text in llm.stream("Once upon a time", max_new_tokens=24, do_sample=False):
            print(text, end="", flush=True)
        print()

        # Leaving early ends the request in the engine, too.
        pieces = llm.stream("Once upon a time", max_new_tokens=200, do_sample=False)
        first = next(pieces)
        pieces.close()
        print(f"left after {first!r}")

        print("streamer: ", end="", flush=True)
        inputs = llm.tokenizer("The ship sailed", return_tensors="pt")
        llm.generate(
            **inputs, max_new_tokens=16, do_sample=False, streamer=TextStreamer(llm.tokenizer)
        )

        for text in asyncio.run(tell_all(llm)):
            print(f"at once: {text!r}")


if __name__ == "__main__":
    main()
