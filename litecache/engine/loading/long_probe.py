"""What a family does only beyond some length, tried on its twin and remembered.

Per model class, versions and behavioural fields the twin (twin.py) is run once over 150 tokens,
packed, chunked and paged, with and without each pass; `$LITECACHE_HOME/probes` keeps the outcome. A
model that would be wrong is refused only where `max_model_len` reaches the length in question, and
a pass that is wrong there is left out.
"""

from __future__ import annotations

import functools
import inspect
import json
import os
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
import xxhash

from litecache.engine.kv_layout import KVSpec
from litecache.engine.loading.model_checks import refusal
from litecache.engine.loading.probe import (
    PROBE_TOKENS,
    ProbePlan,
    check_prefix,
    ordinary_logits,
    record_specs,
    use_paged_attention,
    verify_paged,
)
from litecache.engine.loading.twin import TWIN_TOKENS, build_twin, lengths, shrink
from litecache.engine.running.passes import PASSES, apply_passes
from litecache.errors import ModelNotSupportedError
from litecache.paths import litecache_home

OWN_WEIGHTS_TOKENS = 512
"""A model without a twin is tried over its whole `max_model_len`, up to so many tokens."""
_BLOCK_SIZE = 16


@dataclass(frozen=True)
class TwinOutcome:
    """What a twin showed.

    Attributes:
        wrong: what is wrong over long sequences; empty when nothing is.
        fields: the lengths, by name, beyond each of which it is wrong, with the number of tokens
            before it where that begins; none with `wrong` set: it is wrong whatever they are.
        wrong_passes: passes that change the logits.
        no_twin: why there is no twin; empty when there is one.
    """

    wrong: str = ""
    fields: Mapping[str, int] = field(default_factory=dict)
    wrong_passes: Sequence[str] = ()
    no_twin: str = ""


def probe_model(
    model: Any, kv_dtype: str, block_size: int, max_model_len: int
) -> tuple[tuple[KVSpec, ...], tuple[str, ...]]:
    """Refuse a model that is not right over paged KV at every length up to `max_model_len`.

    Args:
        model: a causal language model with this package's attention function chosen.
        kv_dtype: of the pool, by name.
        block_size: tokens per block.
        max_model_len: longest sequence in tokens.

    Returns:
        Each layer's KV shape, and the passes that its twin has not shown to be wrong.

    Raises:
        ModelNotSupportedError: with the `max_model_len` that would be accepted, if there is one.
    """
    outcome = twin_outcome(type(model), model.config)
    real = lengths(model.config.to_dict())
    ends = sorted((real[name][0] - less, name) for name, less in outcome.fields.items())
    if ends and max_model_len > ends[0][0]:
        right_to, name = ends[0]
        reason = f"beyond its {name} of {real[name][0]} tokens, {outcome.wrong}"
        raise refusal(model.config, reason, right_to)
    specs = record_specs(model, kv_dtype, max_model_len)
    if outcome.wrong and not ends and max_model_len > PROBE_TOKENS:
        raise refusal(model.config, outcome.wrong)
    if outcome.no_twin and max_model_len > OWN_WEIGHTS_TOKENS:
        raise refusal(
            model.config,
            "what it does over long sequences cannot be tried, as no small model of its class can"
            f" be made ({outcome.no_twin}), and its own weights are tried over a few hundred"
            " tokens at most",
            OWN_WEIGHTS_TOKENS,
        )
    verify_paged(model, specs, block_size, ProbePlan.reaching(max_model_len))
    if outcome.no_twin:
        plan = ProbePlan((0, 0), max_model_len)
        verify_paged(model, specs, block_size, plan, positions=False)
        check_prefix(model, plan)
    return specs, tuple(name for name in PASSES if name not in outcome.wrong_passes)


_OUTCOMES: dict[str, TwinOutcome] = {}


def twin_outcome(model_class: type, config: Any) -> TwinOutcome:
    """What the twin of a model shows, from memory or from disk where it has been tried before."""
    fields = config.to_dict()
    try:
        key = _key(model_class, shrink(fields))
    except Exception as error:  # a configuration of any kind of class
        return TwinOutcome(no_twin=_line(error))
    if key not in _OUTCOMES:
        file = litecache_home() / "probes" / f"{key}.json"
        found = _read(file)
        if found is None:
            found = _try(model_class, config, fields)
            _write(file, found)
        _OUTCOMES[key] = found
    return _OUTCOMES[key]


def _try(model_class: type, config: Any, fields: dict[str, Any]) -> TwinOutcome:
    sizes = lengths(fields)

    def twin(keep: Iterable[str] = ()) -> Any:
        made = build_twin(model_class, type(config).from_dict(shrink(fields, frozenset(keep))))
        use_paged_attention(made)
        return made

    try:
        model = twin()
        ordinary_logits(model, ProbePlan((0,), 2))
    except Exception as error:
        return TwinOutcome(no_twin=_line(error))
    specs, wrong = _verify(model)
    found: dict[str, int] = {}
    if wrong:
        # Which of the lengths is it that the family does not stand?
        if not sizes or _verify(twin(sizes))[1]:
            return TwinOutcome(wrong)
        for name in [n for n in sizes if _verify(twin(set(sizes) - {n}))[1]] or [*sizes]:
            alone = twin(set(sizes) - {name})
            below = [_verify(alone, sizes[name][1] - less)[1] for less in (0, 1)]
            if all(below):  # not even right up to the length
                return TwinOutcome(f"also below its {name}, {below[1]}")
            found[name] = below.index("")
        model = twin(found)
        specs, _ = _verify(model)
    plan = ProbePlan((0, 0, 0), TWIN_TOKENS)
    results = apply_passes(model, specs, _BLOCK_SIZE, TWIN_TOKENS, names=PASSES, plan=plan)
    return TwinOutcome(wrong, found, [name for name, right in results.items() if not right])


def _verify(model: Any, tokens: int = TWIN_TOKENS) -> tuple[tuple[KVSpec, ...], str]:
    """The KV shapes of a float32 model, and what is wrong over so many tokens."""
    plan = ProbePlan((0, 0, 0), tokens)
    try:
        specs = record_specs(model, "float32", tokens)
        verify_paged(model, specs, _BLOCK_SIZE, plan, positions=False)
        check_prefix(model, plan)
    except ModelNotSupportedError as error:
        return (), error.reason
    return specs, ""


def _key(model_class: type, twin_fields: dict[str, Any]) -> str:
    import transformers

    source = inspect.getsourcefile(model_class)
    parts = [
        transformers.__version__,
        torch.__version__,
        _own_code(),
        f"{model_class.__module__}.{model_class.__qualname__}",
        xxhash.xxh3_128_hexdigest(Path(source).read_bytes()) if source else "",
        {k: v for k, v in twin_fields.items() if k not in ("_name_or_path", "dtype")},
    ]
    return xxhash.xxh3_128_hexdigest(json.dumps(parts, sort_keys=True, default=str).encode())


@functools.cache
def _own_code() -> str:
    """A digest of the code that a probe tries."""
    state = xxhash.xxh3_128()
    package = Path(__file__).parents[2]
    for folder in ("engine", "kernels"):
        for file in sorted((package / folder).rglob("*.py")):
            state.update(file.read_bytes())
    return state.hexdigest()


def _read(file: Path) -> TwinOutcome | None:
    try:
        return TwinOutcome(**json.loads(file.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        return None


def _write(file: Path, outcome: TwinOutcome) -> None:
    """Best effort, through a rename: what cannot be kept is tried again."""
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        descriptor, temporary = tempfile.mkstemp(dir=file.parent, suffix=".tmp")
        with os.fdopen(descriptor, "w", encoding="utf-8") as out:
            json.dump(asdict(outcome), out)
        os.replace(temporary, file)
    except OSError:
        return


def _line(error: Exception) -> str:
    text = str(error).strip().splitlines()
    return f"{type(error).__name__}: {' '.join(text)[:200]}" if text else type(error).__name__
