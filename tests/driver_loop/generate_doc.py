"""docs/generate.md, written from the tests: `python tests/driver_loop/generate_doc.py`.

Its rows are the features that test_features.py tries, the refusals of `adapter/generation.py`, and
transformers' own tests as `hf_tests.py` has them; test_generate_doc.py holds the file to it.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Iterable, Iterator
from itertools import groupby
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
if __name__ == "__main__":
    sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "engine")]

from features import FEATURES, Feature  # noqa: E402
from hf_tests import FEATURE, HF_TESTS, PASSES, REFUSED, Stand  # noqa: E402
from scene import Scene, tiny_scene  # noqa: E402
from transformers import GenerationConfig  # noqa: E402

from litecache.adapter.generation import NEITHER_LOOP, needs_driver  # noqa: E402

DOC = ROOT / "docs" / "generate.md"
# Beside a feature, and not what its row is about.
_BESIDE = {"input_ids", "attention_mask", "tokenizer", "output_scores", "output_logits"}

# What the features' test has not: by argument, the loop and the test.
OTHERS: dict[str, tuple[str, str]] = {
    "`streamer`: any object with `put` and `end`": (
        "both",
        "test_a_streamer_gets_what_it_gets_from_stock",
    ),
    "`TextStreamer`": ("both", "test_a_text_streamer_prints_the_text"),
    "`TextIteratorStreamer`": ("both", "test_an_iterator_of_texts_gives_the_text"),
    "`past_key_values` of an earlier call": (
        "driver",
        "test_a_returned_cache_goes_on_in_the_next_turn",
    ),
    "`past_key_values` with the new tokens alone": (
        "driver",
        "test_a_cache_goes_on_with_the_new_tokens_alone",
    ),
    "`past_key_values`, cropped, copied, selected, repeated": (
        "driver",
        "test_a_cache_may_be_cropped_copied_selected_and_repeated",
    ),
    "`custom_generate`, a folder, with `trust_remote_code=True`": (
        "driver",
        "test_a_loop_from_a_folder_runs_if_its_code_is_trusted",
    ),
    "`assistant_model` with `tokenizer` and `assistant_tokenizer`": (
        "driver",
        "test_an_assistant_with_a_tokenizer_of_its_own_drafts",
    ),
    "`compile_config`, `disable_compile`, `cache_config`": (
        "both",
        "test_how_transformers_would_compute_changes_no_output",
    ),
    "`presence_penalty`, `frequency_penalty`, not of transformers": (
        "both",
        "test_penalties_of_the_output_lower_what_was_drawn_before",
    ),
    "`logit_bias`, not of transformers": ("both", "test_logit_bias_is_added_to_sequence_bias"),
    "`stop_token_ids`, not of transformers": ("both", "test_stop_tokens_end_rows_as_end_tokens_do"),
    "`seed`, not of transformers": (
        "both",
        "test_a_seed_gives_stocks_tokens_for_that_seed_and_leaves_torchs_generator_alone",
    ),
}

_HEAD = """# Everything `generate` does

<!-- written by tests/driver_loop/generate_doc.py from the tests; edit there -->

`llm.generate` takes what `generate` of a transformers model takes, in one of two loops. In the
**engine** loop the replicas draw the tokens. In the **driver** loop transformers' own `generate`
runs in the calling process over a model without weights, and the replicas answer its forward
passes: a pass carries all tokens of its rows, so what an earlier pass or call has computed is found
in the pool, and beams that fork, drafts that are thrown away and a cache that is handed back later
cost nothing but their new tokens. Processors, criteria, streamers and other Python of the caller's
run in the calling process alone.

`loop="auto"` takes the engine loop unless a call asks for what that does not do;
`return_dict_in_generate=True` says which it was in `.litecache.loop`, and `loop="engine"` or
`loop="driver"` asks for one. Greedy tokens are the same in both. While sampling, the engine loop
draws from a generator of its own; the driver loop draws as transformers does, so that a seed gives
the tokens of a stock model on the CPU.

Padding may stand on either side. Rows padded on the right are padded on the left in transformers'
loop, where the caller's processors, criteria and streamers see them so, and come back as they were
given; with `past_key_values` or `token_healing` the driver loop refuses them. Rules that look for
runs of tokens (n-grams, biases and bad words of several) see padding, too, in either loop. In a
model with sliding windows a mask with holes inside a row gives other tokens than stock `generate`,
whose windows count columns where LiteCache's count tokens.
"""

_FEATURES_HEAD = """## Features

{changing} calls whose value changes what stock `generate` gives, and {others} that change how it is
computed. Each is made from an empty pool and again with its prompt in the pool, and both times
tokens are equal, scores and logits to 1e-4, and torch's random state afterwards is the same: on a
random Llama of two layers in the fast tests; and with the prompt in the pool on six layers of
SmolLM2-135M in the slow ones, on all thirty with `scripts/test.sh --long`. The test is a case of
`{test}` and of
`test_a_feature_on_smollm2_with_a_prefix_hit` (tests/driver_loop/test_features.py), in the driver
loop; the loop below is the one that `auto` takes. Eighty calls with two to four features drawn at
random give what stock `generate` gives, too, or are refused by both.
"""

_OTHERS_HEAD = """## Shown by tests of their own

In tests/driver_loop; what the engine loop does of it is in tests/adapter.
"""

_REFUSED_HEAD = """## Refused

Neither loop takes these, and the error says what to do instead. A checkpoint that is an
encoder-decoder is refused when it is loaded.
"""

_HF_HEAD = """## Transformers' own tests of generation

What transformers' tests hold (tests/generation of its version 5), test by test, and the test here
that holds the same promise or shows the refusal: {passes} pass, {refused} are refused, {apart} are
about something else. Those of `GenerationTesterMixin` run on seven families (Llama, GPT-2, Qwen3,
Gemma 2 and Mistral with sliding windows, Mixtral, OPT), over an engine and over a stock model's
forward passes; tests/driver_loop/test_generation_mixin.py and test_generation_integration.py.
"""


def loop_of(feature: Feature, scene: Scene) -> str:
    """Which loop `auto` takes."""
    beside = _BESIDE - {*feature.changes}
    settings = {k: v for k, v in feature.settings(scene).items() if k not in beside}
    settings.pop("attention_mask", None)
    given = settings.pop("generation_config", None)
    return "driver" if needs_driver(given, settings, GenerationConfig()) else "engine"


def table(head: Iterable[str], rows: Iterable[Iterable[str]]) -> Iterator[str]:
    """Lines of a table."""
    head = list(head)
    yield "| " + " | ".join(head) + " |"
    yield "|" + "---|" * len(head)
    for row in rows:
        yield "| " + " | ".join(row) + " |"
    yield ""


def hf_row(name: str, stand: Stand) -> tuple[str, str, str]:
    """A row for a test of transformers'."""
    by = stand.by
    if by.startswith(FEATURE):
        by = f"feature `{by.removeprefix(FEATURE)[1:-1]}`"
    elif by:
        by = f"`{by}`"
    why = stand.why.removeprefix("; ")
    return name, stand.verdict, "; ".join(filter(None, (by, why)))


def rendered() -> str:
    """The whole of docs/generate.md."""
    scene = tiny_scene()
    changing = sum(bool(feature.changes) for feature in FEATURES.values())
    stands = Counter(stand.verdict for group in HF_TESTS.values() for stand in group.values())
    counts = {"passes": stands[PASSES], "refused": stands[REFUSED]}
    lines = [_HEAD]
    lines += [
        _FEATURES_HEAD.format(changing=changing, others=len(FEATURES) - changing, test=FEATURE)
    ]
    for group, named in groupby(FEATURES.items(), lambda item: item[1].group):
        lines += [f"### {group}", ""]
        rows = ((f.asks, loop_of(f, scene), f"`[{name}]`") for name, f in named)
        lines += table(("argument or class", "loop", "test"), rows)
    lines += [_OTHERS_HEAD]
    rows = ((what, loop, f"`{test}`") for what, (loop, test) in OTHERS.items())
    lines += table(("argument or class", "loop", "test"), rows)
    lines += [_REFUSED_HEAD]
    lines += table(
        ("argument", "instead"), ((f"`{name}`", valid) for name, valid in NEITHER_LOOP.items())
    )
    lines += [_HF_HEAD.format(**counts, apart=stands.total() - sum(counts.values()))]
    for group, tests in HF_TESTS.items():
        lines += [f"### {group}", ""]
        lines += table(
            ("test of transformers", "", "here"), (hf_row(*item) for item in tests.items())
        )
    return "\n".join(lines).rstrip() + "\n"


if __name__ == "__main__":
    DOC.write_text(rendered())
