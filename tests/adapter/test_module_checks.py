"""A module gives the tokens that it would give by itself, or it is refused with the reason."""

from __future__ import annotations

import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import (
    AttentionInterface,
    AutoConfig,
    AutoModelForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaModel,
)
from transformers.models.llama import modeling_llama

from litecache.adapter.sources import resolve_model
from litecache.errors import ConfigError

accelerate = pytest.importorskip("accelerate")

FIELDS = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "max_position_embeddings": 128,
}


class Louder(LlamaForCausalLM):
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return super().forward(*args, **kwargs)


class Named(LlamaForCausalLM):
    def describe(self) -> str:
        return "the same forward"


def llama(kind: type[LlamaForCausalLM] = LlamaForCausalLM, **fields: Any) -> Any:
    torch.manual_seed(0)
    return kind(LlamaConfig(**{**FIELDS, **fields})).eval()


def double(module: nn.Module, args: Any, output: Any = None) -> None:
    """A hook that only needs a name here."""


def attention(model: Any) -> Any:
    return model.model.layers[1].self_attn


def replace_forward(part: Any) -> None:
    part.forward = types.MethodType(lambda self, *a, **k: type(self).forward(self, *a, **k), part)


CHANGES: dict[str, tuple[Callable[[Any], Any], str]] = {
    "hook": (lambda m: m.register_forward_hook(double), "hook double of the model"),
    "inner hook": (lambda m: attention(m).register_forward_hook(double), r"double.*1\.self_attn"),
    "pre-hook": (lambda m: m.lm_head.register_forward_pre_hook(double), "double of lm_head"),
    "forward": (replace_forward, "method forward of the model was replaced by .*lambda"),
    "inner forward": (lambda m: replace_forward(m.model.norm), r"forward of model\.norm"),
    "other part": (
        lambda m: setattr(attention(m), "q_proj", nn.Sequential(attention(m).q_proj)),
        "q_proj is a Sequential, not a Linear",
    ),
    "part more": (lambda m: m.add_module("extra", nn.Linear(2, 2)), "extra .Linear. is no part"),
    "part less": (lambda m: m.model.layers.__delitem__(1), r"model\.layers\.1 is missing"),
    "scale": (lambda m: setattr(attention(m), "scaling", 9.0), r"scaling of .* is 9\.0, not 0\.25"),
    "parametrization": (
        lambda m: nn.utils.parametrizations.weight_norm(m.lm_head),
        "lm_head|parametrizations",
    ),
    "old weight norm": (lambda m: nn.utils.weight_norm(m.lm_head), "WeightNorm"),
    "parameter": (lambda m: m.register_parameter("t", nn.Parameter(torch.ones(1))), "tensor t is"),
    "rows": (
        lambda m: m.set_output_embeddings(nn.Linear(32, 70, bias=False)),
        r"\[70, 32\], not \[64, 32\]|out_features of lm_head is 70, not 64",
    ),
    "config": (lambda m: setattr(m.config, "head_dim", 64), r"not \[|head_dim of"),
    "dtype": (lambda m: m.lm_head.to(torch.bfloat16), r"one dtype.*lm_head\.weight is"),
    "meta": (lambda m: m.lm_head.to("meta"), r"meta device \(lm_head\.weight\)"),
    "quantised": (
        lambda m: setattr(m, "is_quantized", True),
        "give its name or folder.*dequantize",
    ),
    "packed weights": (
        lambda m: setattr(m.lm_head, "weight", nn.Parameter(torch.ones(8, 8).byte(), False)),
        "give its name or folder.*dequantize",
    ),
    "kind of tensor": (
        lambda m: setattr(m.lm_head, "weight", nn.Parameter(Spread(torch.ones(64, 32)), False)),
        r"lm_head\.weight is a Spread; gather it",
    ),
    "shared layer": (
        lambda m: setattr(m.model.layers[1], "mlp", m.model.layers[0].mlp),
        r"layers\.1\.\S+ is model\.layers\.0\.\S+, to which its config does not tie it",
    ),
    "hook of accelerate's kind": (
        lambda m: accelerate.hooks.add_hook_to_module(m.model.norm, Doubling(), append=True),
        r"hook Doubling of model\.norm",
    ),
    "attention function": (
        lambda m: m.set_attn_implementation("tests-sharper"),
        "its logits differ from theirs by",
    ),
}


class Spread(torch.Tensor):
    """As a tensor over many processes, or of packed numbers."""


class Doubling(accelerate.hooks.ModelHook):
    def post_forward(self, module: Any, output: Any) -> Any:
        return 2 * output


def sharper(module: Any, query: Any, key: Any, value: Any, mask: Any, **kwargs: Any) -> Any:
    kwargs["scaling"] = 3 * kwargs["scaling"]
    return modeling_llama.eager_attention_forward(module, query, key, value, mask, **kwargs)


AttentionInterface.register("tests-sharper", sharper)


@pytest.mark.parametrize("change", CHANGES)
def test_what_would_be_lost_on_the_way_to_the_actors_is_refused_by_name(change: str) -> None:
    make, reason = CHANGES[change]
    module = llama()
    make(module)
    with pytest.raises(ConfigError, match=f"model='LlamaForCausalLM'.*(?s:{reason})"):
        resolve_model(module)


def test_a_class_with_a_forward_of_its_own_is_refused_and_one_without_is_not() -> None:
    with pytest.raises(ConfigError, match=r"Louder\.forward replaces that of LlamaForCausalLM"):
        resolve_model(llama(Louder))
    assert resolve_model(llama(Named)).source == resolve_model(llama()).source


def test_a_model_without_a_head_is_refused() -> None:
    with pytest.raises(ConfigError, match="LlamaModel, not a LlamaForCausalLM"):
        resolve_model(LlamaModel(LlamaConfig(**FIELDS)))


def test_a_head_that_its_config_ties_but_that_is_not_tied_is_refused() -> None:
    module = llama(tie_word_embeddings=True)
    resolve_model(module)
    module.lm_head.weight = nn.Parameter(module.lm_head.weight.detach() + 1)
    with pytest.raises(ConfigError, match=r"lm_head\.weight is not model\.embed_tokens\.weight"):
        resolve_model(module)


def test_a_hook_for_all_modules_is_refused() -> None:
    handle = nn.modules.module.register_module_forward_hook(double)
    try:
        with pytest.raises(ConfigError, match="hook for all modules, double"):
            resolve_model(llama())
    finally:
        handle.remove()


@pytest.mark.parametrize(
    "use",
    [
        lambda m: m.generate(torch.tensor([[1, 2]]), max_new_tokens=2, output_hidden_states=True),
        lambda m: m(torch.tensor([[1, 2]]), output_attentions=True),
        lambda m: m.train(),
        lambda m: m.gradient_checkpointing_enable(),
        lambda m: m.enable_input_require_grads(),
        lambda m: m.set_attn_implementation("sdpa"),
        lambda m: setattr(m, "forward", torch.compile(m.forward)),
        lambda m: m.resize_token_embeddings(64),
        lambda m: m.compile(),
        lambda m: accelerate.dispatch_model(m, {"": "cpu"}, force_hooks=True),
        lambda m: setattr(m, "is_quantized", False),
        lambda m: setattr(m.generation_config, "max_new_tokens", 3),
    ],
    ids=[
        *("generate", "attentions", "train", "checkpointing", "grads", "sdpa", "compiled"),
        *("resize", "in place", "dispatched", "dequantised", "generation config"),
    ],
)
def test_what_leaves_the_tokens_as_they_are_is_accepted(use: Callable[[Any], Any]) -> None:
    module, plain = llama(), resolve_model(llama()).source
    use(module)
    assert resolve_model(module).source.path == plain.path


def test_a_compiled_module_is_the_one_inside() -> None:
    module: Any = torch.compile(llama())
    assert resolve_model(module).source == resolve_model(llama()).source


def test_resized_embeddings_travel_with_their_config() -> None:
    module = llama()
    module.resize_token_embeddings(80)
    resolved = resolve_model(module)
    loaded = AutoModelForCausalLM.from_pretrained(resolved.source.path)
    assert torch.equal(loaded.lm_head.weight, module.lm_head.weight)


@pytest.mark.parametrize("owner", ["LlamaMLP", "the module"])
def test_code_that_was_exchanged_in_this_process_alone_is_refused(
    owner: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if owner == "LlamaMLP":
        monkeypatch.setattr(modeling_llama.LlamaMLP, "forward", lambda self, x: x)
        name = r"LlamaMLP\.forward"
    else:
        monkeypatch.setattr(modeling_llama, "apply_rotary_pos_emb", lambda q, k, *rest: (q, k))
        name = r"modeling_llama\.apply_rotary_pos_emb"
    with pytest.raises(ConfigError, match=rf"{name} was replaced by .*lambda"):
        resolve_model(llama())


class OwnConfig(LlamaConfig):
    model_type = "tests_own_llama"


class Own(LlamaForCausalLM):
    config_class = OwnConfig


def test_a_class_that_is_registered_in_this_process_alone_is_refused() -> None:
    AutoConfig.register("tests_own_llama", OwnConfig, exist_ok=True)
    AutoModelForCausalLM.register(OwnConfig, Own, exist_ok=True)
    with pytest.raises(ConfigError, match="Own of test_module_checks is not in the actors; save"):
        resolve_model(Own(OwnConfig(**FIELDS)))


def test_a_module_in_a_wrapper_for_many_gpus_is_the_one_inside() -> None:
    wrapped = nn.DataParallel(llama())
    assert resolve_model(wrapped).source == resolve_model(llama()).source
    wrapped.register_forward_hook(double)
    with pytest.raises(ConfigError, match="hook double of its wrapper"):
        resolve_model(wrapped)


def test_what_becomes_of_the_modules_configs_later_is_not_the_adapters_business() -> None:
    module = llama()
    module.generation_config.max_new_tokens = 3
    resolved = resolve_model(module)
    module.resize_token_embeddings(80)
    module.generation_config.max_new_tokens = 5
    assert (resolved.config.vocab_size, resolved.generation_config.max_new_tokens) == (64, 3)


def test_a_folder_with_an_adapter_alone_is_refused(tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    with pytest.raises(ConfigError, match=r"not an adapter alone.*PeftModel\.from_pretrained"):
        resolve_model(tmp_path)
