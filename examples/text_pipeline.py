"""`pipeline("text-generation")` over an adapter: texts, chats and batches as with any model.

python examples/text_pipeline.py [--model NAME] [--group GROUP]
"""

from __future__ import annotations

from example_options import options, parse
from transformers import pipeline

from litecache import KVCacheAdapter


def main() -> None:
    args = parse(options(__doc__))
    with KVCacheAdapter(args.model, group=args.group) as llm:
        generator = pipeline("text-generation", model=llm, tokenizer=llm.tokenizer)
        settings = {"max_new_tokens": 16, "do_sample": False}
        print("text:", generator("The harbour was", **settings)[0]["generated_text"])

        chat = [{"role": "user", "content": "Name one animal that lives in the sea."}]
        print("chat:", generator(chat, **settings)[0]["generated_text"][-1]["content"])

        prompts = ["One is", "Two is", "Three is"]
        for (answer,) in generator(prompts, batch_size=3, return_full_text=False, **settings):
            print("batch:", repr(answer["generated_text"]))


if __name__ == "__main__":
    main()
