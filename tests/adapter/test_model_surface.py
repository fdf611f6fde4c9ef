"""Programs that expect a transformers model find in an adapter what they read and call."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from letter_tokenizer import letter_tokenizer
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast, pipeline
from transformers.pipelines import base as pipelines_base

from litecache import CacheConfig
from litecache.adapter import KVCacheAdapter
from litecache.adapter.surface.model_surface import ModelSurface
from litecache.engine.loading.model_source import ModelSource
from litecache.errors import ConfigError

TEXTS = ["abc", "edcbaabcde"]
GREEDY = {"do_sample": False, "max_new_tokens": 12}


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    made = letter_tokenizer()
    made.pad_token = "<0>"
    made.chat_template = "{% for m in messages %}{{ m.content }}{% endfor %}"
    return made


@pytest.mark.parametrize(
    ("given", "options"),
    [
        ("abc", {}),
        (TEXTS, {}),
        (TEXTS, {"batch_size": 2, "return_full_text": False}),
        ([{"role": "user", "content": "abcabc"}], {}),
        ("abc", {"return_tensors": True}),
        ("abc", {"stop_sequence": "d", "max_new_tokens": 60}),
        ("abc", {"return_dict_in_generate": True}),
        ("", {}),
        ("abc", {"num_beams": 3, "num_return_sequences": 2}),
    ],
    ids=[
        *("text", "texts", "batch", "chat", "tensors", "stop", "dict", "empty", "beams"),
    ],
)
def test_the_text_generation_pipeline_says_the_same_over_an_adapter_as_over_the_model(
    llm: KVCacheAdapter,
    tiny_llama: LlamaForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    given: Any,
    options: dict[str, Any],
) -> None:
    stock, ours = (
        pipeline("text-generation", model=model, tokenizer=tokenizer)(
            given, **{**GREEDY, **options}
        )
        for model in (tiny_llama, llm)
    )
    assert str(ours) == str(stock)


def test_a_pipeline_that_samples_says_the_same_for_a_seed_in_the_driver_loop(
    llm: KVCacheAdapter, tiny_llama: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast
) -> None:
    said = []
    for model, options in ((tiny_llama, {}), (llm, {"loop": "driver"})):
        torch.manual_seed(5)
        said.append(pipeline("text-generation", model=model, tokenizer=tokenizer)("ab", **options))
    assert said[0] == said[1]


def test_the_tokenizer_is_the_one_in_the_models_folder(
    llm: KVCacheAdapter,
    tokenizer: PreTrainedTokenizerFast,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    tokenizer.save_pretrained(tmp_path)
    monkeypatch.setattr(llm, "_source", ModelSource(path=str(tmp_path)))
    monkeypatch.setattr(llm, "_tokenizer", None)
    said = "".join(llm.stream("edcba", max_new_tokens=8))
    ids = torch.tensor([tokenizer("edcba")["input_ids"]])
    new = llm.generate(ids, max_new_tokens=8)[0, ids.shape[1] :]
    assert said == tokenizer.decode(new, skip_special_tokens=True)
    assert type(llm.tokenizer) is type(tokenizer)


def test_a_pipeline_takes_an_adapter_for_a_model_that_suits_it(
    llm: KVCacheAdapter, tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    def complain(*message: object) -> None:
        raise AssertionError(message)

    monkeypatch.setattr(pipelines_base.logger, "error", complain)
    made = pipeline("text-generation", model=llm, tokenizer=tokenizer, device="cpu", **GREEDY)
    assert "KVCacheAdapter" in repr(made)


def test_what_a_program_reads_on_its_model_is_what_the_model_says(
    llm: KVCacheAdapter, tiny_llama: LlamaForCausalLM
) -> None:
    for name in ("device", "dtype", "training", "main_input_name"):
        assert getattr(llm, name) == getattr(tiny_llama, name)
    assert llm.num_parameters() == tiny_llama.num_parameters()
    embeddings_out = {"exclude_embeddings": True}
    assert llm.num_parameters(**embeddings_out) == tiny_llama.num_parameters(**embeddings_out)
    assert llm.config.to_dict() == tiny_llama.config.to_dict()
    assert llm.can_generate()
    assert llm.name_or_path == "LlamaForCausalLM"


def test_what_changes_nothing_is_done_and_what_cannot_be_done_is_refused(
    llm: KVCacheAdapter,
) -> None:
    same = [llm.eval(), llm.train(False), llm.to("cuda:0"), llm.cuda(), llm.cpu(), llm.float()]
    same += [llm.to(device="meta", dtype=torch.float32), llm.requires_grad_(False)]
    assert all(each is llm for each in same)
    llm.resize_token_embeddings(211)
    refused = {
        "mode=True": lambda: llm.train(),
        r"dtype=torch.bfloat16.*CacheConfig\(dtype='bfloat16'\)": llm.bfloat16,
        "dtype=torch.float16": lambda: llm.to(torch.zeros(1, dtype=torch.float16)),
        "requires_grad=True": lambda: llm.requires_grad_(),
        "new_num_tokens=220.*211": lambda: llm.resize_token_embeddings(220),
    }
    for message, call in refused.items():
        with pytest.raises(ConfigError, match=message):
            call()
    assert not hasattr(llm, "parameters")
    with pytest.raises(AttributeError, match="'parameters': the weights are in the actors"):
        llm.parameters()
    with pytest.raises(AttributeError, match=r"'no_such_thing'$"):
        _ = llm.no_such_thing


class Noted(ModelSurface):
    """What `from_pretrained` makes of its arguments; nothing is started."""

    def __init__(self, model: Any, *, cache_config: Any = None, group: Any = None) -> None:
        self.given = (model, cache_config, group)


@pytest.mark.parametrize(
    ("arguments", "fields"),
    [
        ({}, None),
        ({"dtype": "auto", "device_map": "auto", "attn_implementation": "sdpa"}, None),
        ({"torch_dtype": torch.float16}, {"dtype": "float16"}),
        ({"dtype": "bfloat16", "device_map": "cpu"}, {"dtype": "bfloat16", "device": "cpu"}),
        ({"device_map": {"": 1}, "low_cpu_mem_usage": True}, {"device": "cuda:1"}),
        ({"device_map": torch.device("cpu")}, {"device": "cpu"}),
    ],
)
def test_from_pretrained_takes_what_programs_give_to_transformers_own(
    arguments: dict[str, Any], fields: dict[str, Any] | None
) -> None:
    _, config, group = Noted.from_pretrained("name", group="g", **arguments).given
    assert group == "g"
    assert config == (None if fields is None else CacheConfig(**fields))


def test_from_pretrained_adds_to_a_given_configuration() -> None:
    given = CacheConfig(num_blocks=77)
    _, config, _ = Noted.from_pretrained("name", dtype=torch.float32, cache_config=given).given
    assert config == CacheConfig(num_blocks=77, dtype="float32")


@pytest.mark.parametrize(
    "argument",
    [
        {"quantization_config": {"load_in_8bit": True}},
        {"revision": "v2"},
        {"device_map": "balanced"},
        {"device_map": {"model.layers.0": 0}},
        {"dtype": "float7"},
        {"grop": "misspelt"},
    ],
)
def test_from_pretrained_names_an_argument_that_an_adapter_does_not_have(
    argument: dict[str, Any],
) -> None:
    with pytest.raises(ConfigError, match=next(iter(argument))):
        Noted.from_pretrained("name", **argument)
