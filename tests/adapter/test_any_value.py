"""Any value given to a public call is a result or a `LiteCacheError`, and leaves nothing behind."""

from __future__ import annotations

import math
import os
import re
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import ray
import torch
from any_values import ANYTHING, good_or_refused
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from small_tokenizers import small_tokenizer
from transformers import GenerationConfig, LlamaForCausalLM

from litecache.adapter import KVCacheAdapter
from litecache.adapter.generation import DRIVER_ARGUMENTS, NEITHER_LOOP
from litecache.errors import CapacityError, ConfigError, LiteCacheError

GOOD = torch.tensor([[5, 6, 7]])


def tensors() -> list[torch.Tensor]:
    return [
        torch.ones(2, 3),
        torch.ones(2, 3, dtype=torch.complex64),
        torch.full((1, 3), math.nan),
        torch.empty((1, 3), dtype=torch.int64, device="meta"),
        torch.ones((1, 3), dtype=torch.int64).to_sparse(),
        torch.tensor([[5, -1]]),
        torch.tensor([[5, 211]]),
        torch.tensor([[2**40]]),
        torch.ones((0, 3), dtype=torch.int64),
        torch.ones((1, 0), dtype=torch.int64),
        torch.ones((1, 2, 3), dtype=torch.int64),
        torch.tensor(5),
        torch.zeros((1, 1), dtype=torch.int64).expand(10**9, 1),
        torch.zeros((1, 1), dtype=torch.int64).expand(1, 10**9),
        torch.zeros(1, dtype=torch.int64).expand(10**9),
        torch.nested.nested_tensor([torch.ones(2), torch.ones(3)]),
        GOOD.to(torch.uint8),
        GOOD.bool(),
        GOOD,
        torch.cat([GOOD, GOOD + 20]),
    ]


VALUES = st.one_of(
    ANYTHING,
    st.integers(0, len(tensors()) - 1).map(lambda index: tensors()[index]),
    st.integers(0, 300),
    st.lists(st.integers(-2, 212), max_size=3),
    st.lists(ANYTHING, max_size=2),
    st.dictionaries(st.one_of(st.integers(-1, 300), st.text(max_size=2)), ANYTHING, max_size=2),
)
FIELDS = sorted(
    {name for name in vars(GenerationConfig()) if not name.startswith("_")}
    | {"logit_bias", "presence_penalty", "frequency_penalty", "stop_token_ids", "logprobs"}
    | {"attention_mask", "input_ids", "logits_processor", "past_key_values", "no_such_argument"}
    | {*DRIVER_ARGUMENTS, *NEITHER_LOOP}
)
# Good values go on to run: what they come to must stay short.
SHORT: dict[str, Any] = {"max_new_tokens": 2}
# As many examples as the profile has; FUZZ_EXAMPLES says how many for a longer search.
EXAMPLES = int(os.environ.get("FUZZ_EXAMPLES", settings.default.max_examples))
PER_CALL = settings(max_examples=EXAMPLES, suppress_health_check=list(HealthCheck))


def ends_well(call: Callable[[], Any]) -> Any:
    """What comes of a call; neither a raw error nor a long wait."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return good_or_refused(call)


def settings_of(data: st.DataObject) -> dict[str, Any]:
    names = data.draw(st.lists(st.sampled_from(FIELDS), max_size=3, unique=True))
    given = {name: data.draw(VALUES, label=name) for name in names}
    # A thousand samples are no error, only long.
    for name in ("num_return_sequences", "max_new_tokens", "max_length"):
        value = given.get(name)
        assume(not isinstance(value, int) or not 8 < value < 2**30)
    return {**SHORT, **given}


def still_works(llm: KVCacheAdapter) -> None:
    """The next good request is answered and no request is left running."""
    assert len(llm.generate_batch([[5, 6]], max_new_tokens=2, eos_token_id=210)[0]) in (1, 2)
    assert llm.stats().running == 0


@PER_CALL
@given(data=st.data())
def test_any_value_given_to_generate(llm: KVCacheAdapter, data: st.DataObject) -> None:
    inputs = data.draw(st.one_of(st.just(GOOD), st.just(GOOD), VALUES), label="inputs")
    options = {
        name: data.draw(VALUES, label=name)
        for name in data.draw(
            st.sets(st.sampled_from(["streamer", "cache", "cache_salt", "seed", "loop"]))
        )
    }
    if data.draw(st.booleans()):
        options["generation_config"] = data.draw(VALUES, label="generation_config")
    if data.draw(st.booleans()):
        options["tokenizer"] = data.draw(st.one_of(VALUES, st.just(small_tokenizer("wordpiece"))))
    given = settings_of(data)
    if data.draw(st.booleans()):
        options["loop"] = "driver"
    ends_well(lambda: llm.generate(inputs, **{**options, **given}))


@PER_CALL
@given(data=st.data())
def test_any_value_given_to_generate_batch(llm: KVCacheAdapter, data: st.DataObject) -> None:
    prompts = data.draw(
        st.one_of(st.just([[5, 6]]), VALUES, st.lists(st.lists(st.integers(-2, 212), max_size=3)))
    )
    options = {
        name: data.draw(VALUES, label=name)
        for name in data.draw(
            st.sets(st.sampled_from(["generation_config", "cache", "cache_salt", "seed"]))
        )
    }
    given = settings_of(data)
    given.pop("input_ids", None)
    ends_well(lambda: llm.generate_batch(prompts, **{**options, **given}))


@PER_CALL
@given(data=st.data())
def test_any_value_given_to_stream(
    llm: KVCacheAdapter, monkeypatch_tokenizer: None, data: st.DataObject
) -> None:
    texts = st.one_of(st.text(max_size=20), st.sampled_from(["\x00", "\udcff", "a\udc80b", ""]))
    prompt = data.draw(st.one_of(st.just([5, 6]), texts, VALUES), label="prompt")
    as_tokens = data.draw(st.one_of(st.booleans(), VALUES), label="as_tokens")
    skip = data.draw(st.one_of(st.booleans(), VALUES), label="skip_special_tokens")
    given = settings_of(data)
    ends_well(
        lambda: list(llm.stream(prompt, as_tokens=as_tokens, skip_special_tokens=skip, **given))
    )


@pytest.fixture
def monkeypatch_tokenizer(llm: KVCacheAdapter, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(llm, "_tokenizer", small_tokenizer("wordpiece"))


@settings(PER_CALL, max_examples=25)
@given(data=st.data())
def test_any_value_given_to_abort_pin_unpin_flush_and_clear(
    llm: KVCacheAdapter, data: st.DataObject
) -> None:
    value = data.draw(VALUES)
    ends_well(lambda: llm.abort(value))
    ends_well(lambda: llm.unpin(value))
    ends_well(lambda: llm.unpin([5] * 16, cache_salt=value))
    if not isinstance(ends_well(lambda: llm.pin(value)), LiteCacheError):
        llm.unpin(value)
    if not isinstance(value, (int, float)) or not 0 < value < 1e6:
        assert isinstance(ends_well(lambda: llm.flush(value)), (LiteCacheError, dict))
    assert isinstance(ends_well(lambda: llm.clear(value)), LiteCacheError)


@settings(PER_CALL, max_examples=15)
@given(data=st.data())
def test_any_value_given_to_warm_export_import_and_delete(
    llm: KVCacheAdapter,
    tmp_path_factory: pytest.TempPathFactory,
    monkeypatch_tokenizer: None,
    data: st.DataObject,
) -> None:
    value = data.draw(VALUES)
    file = tmp_path_factory.getbasetemp() / "any.kv"
    for call in (
        lambda: llm.warm(value),
        lambda: llm.warm([value]),
        lambda: llm.warm([[5] * 16], cache_salt=value),
        lambda: llm.export_prefix(value, file),
        lambda: llm.export_prefix([5] * 16, file, cache_salt=value),
        lambda: llm.import_prefix(value),
        lambda: llm.import_prefix(file, cache_salt=value),
        lambda: llm.delete(cache_salt=value),
    ):
        ends_well(call)


def test_after_all_that_the_adapter_works(llm: KVCacheAdapter) -> None:
    still_works(llm)


def good(name: str, value: Any) -> bool:
    """Whether an adapter may start with it."""
    optional = ("cache_config", "tokenizer", "group", "num_threads", "actor_options")
    if (name in optional and value is None) or (
        name == "actor_options" and type(value) is dict and not value
    ):
        return True
    if name == "group":
        return type(value) is str and re.fullmatch(r"[A-Za-z0-9._-]{1,64}", value) is not None
    if name in ("seed", "replicas", "num_threads"):
        low, high = (0, 2**63 - 1) if name == "seed" else (1, 4096)
        return type(value) is int and low <= value <= high
    return name == "detached" and type(value) is bool


OPTIONS = ["cache_config", "tokenizer", "group", "detached", "actor_options"]
OPTIONS += ["replicas", "num_threads", "weights", "seed"]


@PER_CALL
@given(data=st.data())
def test_any_value_given_to_an_adapter_is_refused_before_ray_starts(data: st.DataObject) -> None:
    from tiny_config import endless_llama

    name = data.draw(st.sampled_from(["model", *OPTIONS]))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ray, "is_initialized", lambda: False)
        patch.setattr(ray, "init", lambda *args, **options: pytest.fail("Ray was started"))
        options: dict[str, Any] = {"weights": "random"}
        model: Any = endless_llama()
        if name == "model":
            model, options["weights"] = data.draw(VALUES), "auto"
        else:
            options[name] = data.draw(VALUES, label=name)
            assume(not good(name, options[name]))
        assert isinstance(ends_well(lambda: KVCacheAdapter(model, **options)), LiteCacheError)


BAD_FILES = [
    "{",
    "[]",
    "null",
    '{"temperature": "hot", "do_sample": true}',
    '{"top_k": []}',
    '{"eos_token_id": "x"}',
    '{"pad_token_id": 1e30}',
    "\x00",
]


@pytest.mark.parametrize("text", BAD_FILES)
def test_a_bad_generation_config_file_is_named(
    llm: KVCacheAdapter,
    tiny_llama: LlamaForCausalLM,
    tmp_path: Path,
    text: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from litecache.adapter.sources import resolve_model

    tiny_llama.save_pretrained(tmp_path)
    (tmp_path / "generation_config.json").write_text(text)
    try:
        model = resolve_model(tmp_path)
    except LiteCacheError:
        return
    monkeypatch.setattr(llm, "generation_config", model.generation_config)
    assert isinstance(
        ends_well(lambda: llm.generate(GOOD, do_sample=True, max_new_tokens=2)), LiteCacheError
    )


def test_a_huge_number_of_samples_is_refused_before_memory_is_filled(llm: KVCacheAdapter) -> None:
    for count in (2**70, 10**9, 70_000):
        with pytest.raises(ConfigError, match="num_return_sequences"):
            llm.generate(GOOD, do_sample=True, num_return_sequences=count, max_new_tokens=2)
        with pytest.raises(ConfigError, match="num_return_sequences"):
            llm.generate_batch([[5]], do_sample=True, num_return_sequences=count)
    with pytest.raises(CapacityError, match=r"1,000,000,000 tokens.*512"):
        llm.generate_batch([range(10**9)], max_new_tokens=2)  # type: ignore[list-item]
