"""A program written for transformers, and the same over LiteCache: they differ in one line.

python examples/program.py [--model NAME]
python examples/program_ported.py [--model NAME]
diff examples/program.py examples/program_ported.py
"""

from __future__ import annotations

import torch
from example_options import options, parse
from litecache import KVCacheAdapter as AutoModelForCausalLM
from transformers import AutoTokenizer

STORY = "The lighthouse stood on a rock far out in the bay. Every evening the keeper"


def main() -> None:
    args = parse(options(__doc__))
    device = "cuda" if torch.cuda.is_available() else "cpu"
    tokenizer = AutoTokenizer.from_pretrained(args.model, padding_side="left")
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32)
    model = model.to(device).eval()

    inputs = tokenizer([STORY, "The sea"], return_tensors="pt", padding=True).to(model.device)
    with torch.inference_mode():
        greedy = model.generate(**inputs, max_new_tokens=12, do_sample=False)
        beams = model.generate(**inputs, max_new_tokens=8, num_beams=3, early_stopping=True)
    for rows in (greedy, beams):
        for text in tokenizer.batch_decode(rows, skip_special_tokens=True):
            print(repr(text))

    ids = tokenizer(STORY, return_tensors="pt").input_ids.to(model.device)
    with torch.inference_mode():
        output = model(ids, labels=ids)
    print(f"perplexity {output.loss.exp():.2f}, most likely next {output.logits[0, -1].argmax()}")
    print(f"{model.num_parameters():,} parameters, {model.config.num_hidden_layers} layers")


if __name__ == "__main__":
    main()
