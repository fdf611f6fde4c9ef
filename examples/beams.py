"""Beam search and its kin: transformers' own loops here, forward passes on the actors.

    python examples/beams.py [--model NAME] [--group GROUP]

Every argument of transformers' `generate` is taken. What the engine's own loop does not have runs
in transformers' loop in this process; `.litecache.loop` says which it was. Beams share their blocks
of KV: a beam that forks copies none but its last one.
"""

from __future__ import annotations

import torch
from example_options import options, parse

from litecache import KVCacheAdapter

PROMPT = "The three things that one should bring to the beach are"


def main() -> None:
    args = parse(options(__doc__))
    with KVCacheAdapter(args.model, group=args.group) as llm:
        tokenizer = llm.tokenizer
        inputs = tokenizer(PROMPT, return_tensors="pt")
        width = inputs.input_ids.shape[1]
        ways = {
            "greedy": {"do_sample": False},
            "4 beams": {"num_beams": 4, "num_return_sequences": 2, "do_sample": False},
            "beams without repetition": {"num_beams": 3, "no_repeat_ngram_size": 2},
            "sampled, nucleus": {"do_sample": True, "top_p": 0.9, "seed": 7},
        }
        for name, settings in ways.items():
            out = llm.generate(
                **inputs,
                max_new_tokens=16,
                return_dict_in_generate=True,
                output_scores="num_beams" in settings,
                **settings,
            )
            scores = getattr(out, "sequences_scores", None)
            for index, row in enumerate(out.sequences):
                score = "" if scores is None else f" (score {float(scores[index]):.3f})"
                text = tokenizer.decode(row[width:], skip_special_tokens=True)
                print(f"{name}, {out.litecache.loop} loop{score}: {text!r}")

        # The scores of the best beam, from the model's own log-probabilities.
        best = llm.generate(**inputs, max_new_tokens=16, num_beams=4, do_sample=False)
        told = llm.prompt_logprobs([best[0].tolist()], first=width)[0]
        mean = torch.tensor([token.logprob for token in told]).mean()
        print(f"mean log-probability of the best beam: {mean:.3f}")


if __name__ == "__main__":
    main()
