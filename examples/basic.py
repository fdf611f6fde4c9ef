"""Load a model by name, generate, and see that the second request skips what both begin with.

python examples/basic.py [--model NAME] [--group GROUP]
"""

from __future__ import annotations

from example_options import options, parse

from litecache import KVCacheAdapter

INTRODUCTION = (
    "A tide mill takes its power from the sea. At flood the water opens a gate and fills a pond; "
    "at ebb the gate falls shut, and the pond drives the wheel until the next flood. "
)


def main() -> None:
    args = parse(options(__doc__))
    with KVCacheAdapter(args.model, group=args.group) as llm:
        tokenizer = llm.tokenizer
        for ending in ("The keeper of the mill", "The wheel of the mill"):
            inputs = tokenizer(INTRODUCTION + ending, return_tensors="pt")
            out = llm.generate(
                **inputs, max_new_tokens=16, do_sample=False, return_dict_in_generate=True
            )
            text = tokenizer.decode(out.sequences[0, inputs.input_ids.shape[1] :])
            reused = sum(out.litecache.reused_tokens[0].values())
            print(f"{ending}{text}")
            print(f"  {reused} of {inputs.input_ids.shape[1]} prompt tokens were reused")

        # A batch, padded as for any model; and lists of token ids, of any lengths, without padding.
        tokenizer.padding_side = "left"
        tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
        prompts = ["Water is", "The colours of the rainbow are"]
        batch = tokenizer(prompts, return_tensors="pt", padding=True)
        rows = llm.generate(**batch, max_new_tokens=8, do_sample=False)
        print(tokenizer.batch_decode(rows, skip_special_tokens=True))
        answers = llm.generate_batch(
            tokenizer(prompts).input_ids, max_new_tokens=8, do_sample=False
        )
        print(tokenizer.batch_decode(answers))
        print(f"hit rate {llm.stats().hit_rate:.0%}")


if __name__ == "__main__":
    main()
