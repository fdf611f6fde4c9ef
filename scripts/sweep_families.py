"""Every decoder family of the installed transformers, tiny: right beyond its lengths, or refused.

Each family is made from its default configuration with small sizes, once for each case of `CASES`
(windows of 8 and 32, original lengths of 40, other rotations, the family's own lengths), and runs
150 tokens packed, chunked and paged against its own eager attention in float32, with each pass on
and off. A refusal must be true: where a `max_model_len` is said to be accepted it is, and beyond
that the logits really differ. Exits 1 when a family is silently wrong or refused without need.

    python scripts/sweep_families.py --json sweep.json
    python scripts/sweep_families.py --only mistral --only gemma2
"""

from __future__ import annotations

import argparse
import copy
import inspect
import json
import logging
import multiprocessing
import os
import sys
import tempfile
import warnings
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table

from litecache.config import CacheConfig
from litecache.engine.loading.model_checks import check_config
from litecache.engine.loading.model_loader import Admission, admit
from litecache.engine.loading.probe import GATHERED, PAGED, ProbePlan, Way, check_own_cache
from litecache.engine.loading.twin import build_twin, lengths, shrink
from litecache.engine.running.hf_attention import register
from litecache.errors import ModelNotSupportedError

TOKENS = 150
LIMIT = 160
TOLERANCE = 2e-4
PASSES = ("none", "fused,merged,small")
WAYS = {way.name: way for way in (PAGED, GATHERED)}
EACH = ("fused", "merged", "small")
"""Alone, too, where the positions matter."""

DEFAULTS: dict[str, dict[str, Any]] = {
    "bert": {"is_decoder": True},
    "bert-generation": {"is_decoder": True},
    "big_bird": {"is_decoder": True, "attention_type": "original_full"},
    "camembert": {"is_decoder": True},
    "cohere_compass_text": {
        "num_hidden_layers": 4,
        "layer_types": ["full_attention"] * 4,
        "rope_parameters": {
            "full_attention": {
                "rope_type": "default",
                "rope_theta": 10_000.0,
                "mrope_section": [24, 20, 20],
            }
        },
    },
    "data2vec-text": {"is_decoder": True},
    "dbrx": {"attn_config": {"rope_theta": 10_000.0, "clip_qkv": 8.0}},
    "deepseek_v2": {"num_experts_per_tok": 2, "n_routed_experts": 4, "qk_nope_head_dim": 8},
    "dots1": {"n_routed_experts": 4, "num_experts_per_tok": 2, "n_shared_experts": 1},
    "electra": {"is_decoder": True},
    "ernie": {"is_decoder": True},
    "gpt_neo": {"num_layers": 2, "attention_types": [[["global", "local"], 1]]},
    "hunyuan_v1_dense": {"head_dim": 16},
    "hunyuan_v1_moe": {"head_dim": 16},
    "megatron-bert": {"is_decoder": True},
    "ministral": {"head_dim": 16},
    "nemotron": {"head_dim": 16, "num_key_value_heads": 8},
    "reformer": {"is_decoder": True},
    "rembert": {"is_decoder": True},
    "roberta": {"is_decoder": True},
    "roberta-prelayernorm": {"is_decoder": True},
    "roc_bert": {"is_decoder": True},
    "roformer": {"is_decoder": True},
    "xlm-roberta": {"is_decoder": True},
    "xlm-roberta-xl": {"is_decoder": True},
    "xmod": {"is_decoder": True, "default_language": "en_XX"},
}
"""What a family's default configuration lacks or has otherwise."""

SLIDING, FULL = "sliding_attention", "full_attention"


@dataclass(frozen=True)
class Case:
    """A change of a tiny configuration.

    Attributes:
        fields: set in the text configuration.
        layers: its `layer_types`, repeated; only where the family has such layers.
        rope: set in its `rope_parameters`; only where it has some.
        known: all lengths that a twin's configuration knows are shrunk.
        reads: only families whose code has this word.
    """

    fields: dict[str, Any] | None = None
    layers: tuple[str, ...] = ()
    rope: dict[str, Any] | None = None
    known: bool = False
    reads: str = ""


_SCALED = {"factor": 8.0, "original_max_position_embeddings": 40}
CASES: dict[str, Case] = {
    "plain": Case(),
    "window 8": Case({"sliding_window": 8, "use_sliding_window": True}, (SLIDING, FULL)),
    "window 32": Case({"sliding_window": 32, "use_sliding_window": True}, (FULL, SLIDING)),
    "window 8 everywhere": Case({"sliding_window": 8, "use_sliding_window": True}, (SLIDING,)),
    "window 8 unused": Case({"sliding_window": 8}, (FULL,)),
    "known lengths": Case(known=True),
    "yarn from 40": Case(rope={"rope_type": "yarn", **_SCALED}),
    "llama3 from 40": Case(
        rope={"rope_type": "llama3", "low_freq_factor": 1.0, "high_freq_factor": 4.0, **_SCALED}
    ),
    "linear": Case(rope={"rope_type": "linear", "factor": 4.0}),
    "dynamic": Case(rope={"rope_type": "dynamic", **_SCALED}),
    "longrope from 40": Case(rope={"rope_type": "longrope", **_SCALED}),
    "query scale from 40": Case(
        rope={"rope_type": "yarn", "llama_4_scaling_beta": 0.5, **_SCALED},
        reads="llama_4_scaling_beta",
    ),
}
OWN_CASES: dict[str, dict[str, Case]] = {
    "llama4_text": {
        "chunk 32": Case({"attention_chunk_size": 32}),
        "scale from 40": Case({"floor_scale": 40}),
    },
    "deepseek_v32": {"top 32": Case({"index_topk": 32})},
    "doge": {"keep 32": Case({"keep_window_size": 32})},
    "minimax_m3_vl_text": {
        "sparse": Case({"index_block_size": 8, "index_topk_blocks": 2}, ("minimax_m3_sparse", FULL))
    },
    "modernbert-decoder": {"local 32": Case({"local_attention": 32}, (SLIDING, FULL))},
    "olmo3": {"window 20": Case({"sliding_window": 20}, (SLIDING, SLIDING, FULL))},
}
"""Lengths that one family has."""


BY_RULE = {
    ("lfm2", "plain"),  # its default configuration alone has no convolution
    ("deepseek_v4", "plain"),  # joins the keys of neighbours, also of other sequences in a batch
}
"""Refused by rule: 150 tokens alone would not show why."""


@dataclass(frozen=True)
class Result:
    """What became of a family in a case.

    Attributes:
        outcome: "right", "refused", "not made", or what is a fault: "WRONG", "NEEDLESS" (refused
            though it would be right) and "UNTRUE" (what the refusal accepts is wrong or refused).
        detail: the reason, or the largest error.
        passes: that were applied when all were allowed.
        right_to: the `max_model_len` that a refusal says is accepted.
    """

    family: str
    case: str
    outcome: str
    detail: str
    passes: tuple[str, ...] = ()
    right_to: int | None = None

    @property
    def fault(self) -> bool:
        """Whether it must not be so."""
        return self.outcome.isupper()


def families() -> list[str]:
    """The model types of all causal language models that are decoders alone."""
    from transformers import CONFIG_MAPPING
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as NAMES

    return sorted(name for name in NAMES if name in CONFIG_MAPPING)  # others may be registered


def cases_of(family: str) -> dict[str, Case]:
    """The cases of a family by name."""
    return {**CASES, **OWN_CASES.get(family, {})}


def sweep(family: str, names: Sequence[str] | None = None) -> list[Result]:
    """Run a family through its cases, all or some of them."""
    results: list[Result] = []
    for name, case in cases_of(family).items():
        if names is not None and name not in names:
            continue
        result = _run(family, name, case)
        if result is None:
            continue
        results.append(result)
        if name == "plain" and result.outcome != "right" and not result.right_to:
            break  # so it is in every case
    return results


class Made:
    """A tiny configuration of a family, from which equal models are built.

    Args:
        family: model type.
        case: what to change.

    Attributes:
        config: the tiny one.
        checked: the one that the gate reads: where transformers finds the model only by the
            configuration of a larger whole, that.

    Raises:
        LookupError: the case does not concern the family.
    """

    def __init__(self, family: str, case: Case) -> None:
        import transformers
        from transformers import MODEL_FOR_CAUSAL_LM_MAPPING
        from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

        self.model_class = getattr(transformers, MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[family])
        config = transformers.AutoConfig.for_model(family, **DEFAULTS.get(family, {}))
        whole = config
        if type(config) is not self.model_class.config_class:
            config = config.get_text_config(decoder=True)
        if case.reads:
            source = inspect.getsourcefile(self.model_class)
            if source is None or case.reads not in Path(source).read_text(encoding="utf-8"):
                raise LookupError
        fields = config.to_dict()
        known = frozenset(lengths(fields))
        if case.known and not known:
            raise LookupError
        tiny = shrink(fields, frozenset() if case.known else known)
        text = tiny["text_config"] if isinstance(tiny.get("text_config"), dict) else tiny
        kinds = text.get("layer_types")
        window = "sliding_window" in (case.fields or {})
        if window and "sliding_window" not in text and case is not CASES["window 8"]:
            raise LookupError
        if case.layers and kinds:
            if window and not set(kinds) <= {SLIDING, FULL}:
                raise LookupError
            text["layer_types"] = [case.layers[n % len(case.layers)] for n in range(len(kinds))]
        text.update(case.fields or {})
        if case.rope:
            self._rotate(text, case.rope)
        self.config = type(config).from_dict(tiny)
        found = type(config) in MODEL_FOR_CAUSAL_LM_MAPPING
        self.checked = self.config if found else whole
        self._built: Any = None

    @staticmethod
    def _rotate(text: dict[str, Any], rope: dict[str, Any]) -> None:
        parameters = text.get("rope_parameters")
        if not parameters:
            raise LookupError
        dim = text.get("head_dim") or text["hidden_size"] // text["num_attention_heads"]
        nested = [v for v in parameters.values() if isinstance(v, dict)]
        for entry in nested or [parameters]:
            rotary = text.get("qk_rope_head_dim") or dim * (entry.get("partial_rotary_factor") or 1)
            entry.update(rope)
            if rope["rope_type"] == "longrope":
                entry.update(short_mscale=1.0, long_mscale=1.0)
                entry["short_factor"] = [1.0] * (int(rotary) // 2)
                entry["long_factor"] = [4.0 + n for n in range(int(rotary) // 2)]
        if "original_max_position_embeddings" in text:
            text["original_max_position_embeddings"] = 40
        text["max_position_embeddings"] = 320

    def build(self) -> Any:
        """A model; all of them have the same weights."""
        if self._built is None:
            self._built = build_twin(self.model_class, copy.deepcopy(self.config))
        return copy.deepcopy(self._built)


def _run(family: str, name: str, case: Case) -> Result | None:
    try:
        made = Made(family, case)
        stock = Stock(made.build())
    except LookupError:
        return None
    except Exception as error:
        return _not_made(family, name, error)
    worst, kept = 0.0, ()
    for chosen in (*PASSES, *(EACH if name == "plain" or case.known or case.reads else ())):
        try:
            model, admission = _admitted(made, LIMIT, chosen)
        except ModelNotSupportedError as error:
            return _refused(family, name, made, stock, error)
        specs, passes, attention = admission
        error = stock.error(model, WAYS[attention], specs, TOKENS)
        if not error <= TOLERANCE:
            return Result(family, name, "WRONG", f"by {error:.1e} with passes {chosen}", passes)
        worst = max(worst, error)
        kept = passes if len(passes) > len(kept) else kept
        if attention == GATHERED.name:
            break  # it has no passes
    return Result(family, name, "right", f"{attention}, within {worst:.0e}", kept)


def _admitted(made: Made, max_model_len: int, passes: str = PASSES[-1]) -> tuple[Any, Admission]:
    config = CacheConfig(device="cpu", dtype="float32", max_model_len=max_model_len)
    check_config(made.checked)
    model = made.build()
    with mock.patch.dict(os.environ, LITECACHE_PASSES=passes):
        return model, admit(model, config, max_model_len)


class Stock:
    """What a model's own eager attention makes of some prompts."""

    def __init__(self, model: Any) -> None:
        model.set_attn_implementation("eager")
        self._ids, _ = ProbePlan((0, 0, 0), TOKENS).inputs(model)
        self._model = model
        self._logits = {TOKENS: self._run(TOKENS)}

    def _run(self, tokens: int) -> torch.Tensor:
        with torch.inference_mode():
            logits: torch.Tensor = self._model(self._ids[:, :tokens], use_cache=False).logits
        return logits

    def error(self, model: Any, way: Way, specs: Any, tokens: int) -> float:
        """The largest relative error over the prompts' positions, run over a pool."""
        plan = Prompts((0, 0, 0), tokens, self._ids[:, :tokens])
        if tokens not in self._logits:
            self._logits[tokens] = self._run(tokens)
        return _distance(way.logits(model, specs, 16, plan), self._logits[tokens])

    def at_odds(self) -> bool:
        """Whether its logits change when more tokens follow, or when it uses its own cache."""
        few = self._run(TOKENS // 5)
        if not _distance(few, self._logits[TOKENS][:, : TOKENS // 5]) <= TOLERANCE:
            return True
        try:
            check_own_cache(self._model, ProbePlan((0,), TOKENS))
        except ModelNotSupportedError:
            return True
        return False


@dataclass(frozen=True)
class Prompts(ProbePlan):
    """A plan over given ids."""

    ids: torch.Tensor | None = None

    def inputs(self, model: Any) -> tuple[torch.Tensor, torch.Tensor]:
        """The ids and their positions, `[rows, tokens]` each."""
        assert self.ids is not None
        return self.ids, torch.arange(self.tokens).expand(len(self.starts), -1)


def _distance(logits: torch.Tensor, expected: torch.Tensor) -> float:
    errors = (logits - expected).norm(dim=-1) / expected.norm(dim=-1).clamp_min(1e-30)
    return float(errors.nan_to_num(float("inf")).max())


def _refused(
    family: str, name: str, made: Made, stock: Stock, error: ModelNotSupportedError
) -> Result:
    result = Result(family, name, "refused", error.reason, (), error.right_to)
    if error.right_to:
        try:
            model, admission = _admitted(made, error.right_to)
            tokens, way = min(error.right_to, TOKENS), WAYS[admission.attention]
            if not stock.error(model, way, admission.specs, tokens) <= TOLERANCE:
                return replace(result, outcome="UNTRUE", detail=f"wrong below: {error.reason}")
        except ModelNotSupportedError as second:
            return replace(result, outcome="UNTRUE", detail=f"{error.reason}; then {second.reason}")
    if (family, name) not in BY_RULE and not stock.at_odds():
        for way in WAYS.values():
            try:
                model = made.build()
                way.choose(model)
                specs = way.record(model, "float32", 2)
                right = stock.error(model, way, specs, TOKENS) <= TOLERANCE
            except Exception:
                right = False
            if right:
                return replace(result, outcome="NEEDLESS", detail=f"{way.name}: {error.reason}")
    return result


def _not_made(family: str, name: str, error: Exception) -> Result:
    try:
        import transformers

        config = transformers.AutoConfig.for_model(family, **DEFAULTS.get(family, {}))
        check_config(config)
    except ModelNotSupportedError as refusal:
        return Result(family, name, "refused", refusal.reason)
    except Exception as second:
        error = second
    text = " ".join(str(error).split())[:160]
    return Result(family, name, "not made", f"{type(error).__name__}: {text}")


def _work(family: str) -> list[Result]:
    warnings.filterwarnings("ignore")
    logging.disable(logging.CRITICAL)
    torch.set_num_threads(1)
    register()
    return sweep(family)


def main() -> int:
    """Sweep, print the list, write the file."""
    options = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    options.add_argument("--only", action="append", metavar="FAMILY", help="a model type")
    options.add_argument("--json", type=Path, metavar="FILE", help="write the results there")
    options.add_argument("--jobs", type=int, default=os.cpu_count(), help="processes")
    arguments = options.parse_args()
    chosen = arguments.only or families()
    unknown = sorted(set(chosen) - set(families()))
    if unknown:
        options.error(f"no such family: {', '.join(unknown)}")
    console = Console()
    with tempfile.TemporaryDirectory() as home:
        os.environ.update(LITECACHE_HOME=home, HF_HUB_OFFLINE="1")
        with multiprocessing.get_context("fork").Pool(arguments.jobs) as pool:
            rows = pool.imap(_work, chosen)
            results: list[Result] = []
            for part in track(rows, "families", total=len(chosen)):
                results += part
                if arguments.json:  # whole after each family: a run may be cut short
                    text = json.dumps([asdict(result) for result in results], indent=1)
                    arguments.json.write_text(text)
    table = Table("family", "case", "outcome", "passes", "detail")
    for result in results:
        table.add_row(
            result.family, result.case, result.outcome, " ".join(result.passes), result.detail
        )
    console.print(table)
    counts = Counter(result.outcome for result in results)
    console.print(", ".join(f"{count} {outcome}" for outcome, count in counts.most_common()))
    return int(any(result.fault for result in results))


if __name__ == "__main__":
    sys.exit(main())
