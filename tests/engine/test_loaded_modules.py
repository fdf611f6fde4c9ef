"""A module as a user has it gives in the engine the tokens of its own `generate`, or is refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from engine_harness import Harness
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from litecache.adapter.sources import resolve_model
from litecache.config import CacheConfig
from litecache.engine.loading.model_checks import check_limits
from litecache.errors import ConfigError

peft = pytest.importorskip("peft")

SEEING = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "output_channels": 8}
SEEING |= {"num_attention_heads": 2, "num_key_value_heads": 2, "mlp_dim": 16, "head_dim": 8}
SEEING |= {"image_size": 28, "patch_size": 14, "window_size": 2, "global_attn_indexes": []}
PROMPTS = [[5, 17, 3, 60, 8, 41, 33, 2, 9], [60, 61, 62, 5, 5, 7]]
FIELDS: dict[str, Any] = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 128,
    "initializer_range": 0.3,
    "bos_token_id": 1,
    "eos_token_id": None,
    "pad_token_id": 0,
}


def llama(**fields: Any) -> Any:
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**{**FIELDS, **fields})).eval()


def lora(**fields: Any) -> Any:
    chosen = {"r": 4, "lora_alpha": 16, "lora_dropout": 0.5, "target_modules": ["q_proj", "v_proj"]}
    return peft.LoraConfig(task_type="CAUSAL_LM", **{**chosen, **fields})


def trained(model: Any) -> Any:
    """Adapters start without an effect: as if they had learnt something."""
    generator = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        if parameter.requires_grad:
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.data += 0.2 * noise.to(parameter.dtype)
    return model


def with_adapter(config: Any = None, **fields: Any) -> Any:
    return trained(peft.get_peft_model(llama(**fields), config or lora()))


def two_adapters(*active: str, merged: bool = False, enabled: bool = True) -> Any:
    model = with_adapter()
    model.add_adapter("second", lora(target_modules=["k_proj", "q_proj"]))
    model.set_adapter("second")
    trained(model).base_model.set_adapter(list(active))
    if merged:
        model.merge_adapter()
    if not enabled:
        model.base_model.disable_adapter_layers()
    return model


def in_transformers() -> Any:
    model = llama()
    model.add_adapter(lora(), "one")
    return trained(model)


def resized(tokens: int, **fields: Any) -> Any:
    model = llama(**fields)
    torch.manual_seed(2)
    model.resize_token_embeddings(tokens, pad_to_multiple_of=8, mean_resizing=False)
    return model


RIGHT: dict[str, Callable[[], Any]] = {
    "in train mode": lambda: llama(attention_dropout=0.5).train(),
    "resized up": lambda: resized(101),
    "resized down, tied": lambda: resized(70, tie_word_embeddings=True),
    "adapter": with_adapter,
    "adapter of tied embeddings": lambda: with_adapter(
        lora(target_modules=["embed_tokens"]), tie_word_embeddings=True
    ),
    "modules to save": lambda: with_adapter(lora(modules_to_save=["lm_head"], use_dora=True)),
    "second of two adapters": lambda: two_adapters("second"),
    "both of two adapters": lambda: two_adapters("default", "second"),
    "merged in place": lambda: two_adapters("second", merged=True),
    "adapters disabled": lambda: two_adapters("second", enabled=False),
    "adapter of transformers": in_transformers,
}


def own_tokens(model: Any, prompt: list[int]) -> list[int]:
    ids = torch.tensor([prompt])
    settings = {"max_new_tokens": 16, "do_sample": False, "attention_mask": torch.ones_like(ids)}
    return model.eval().generate(input_ids=ids, **settings)[0, len(prompt) :].tolist()


@pytest.mark.parametrize("kind", RIGHT)
def test_a_module_gives_its_own_tokens_and_stays_as_it_is(kind: str) -> None:
    model = RIGHT[kind]()
    training = [part.training for part in model.modules()]
    state = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    generator = torch.get_rng_state()
    source = resolve_model(model).source
    assert [part.training for part in model.modules()] == training
    assert torch.equal(torch.get_rng_state(), generator)
    after = model.state_dict()
    assert list(after) == list(state)
    assert all(torch.equal(after[key], tensor) for key, tensor in state.items())
    with Harness(source) as engine:
        found = [engine.run(PROMPTS, max_new_tokens=16) for _ in range(2)]
    expected = [own_tokens(model, prompt) for prompt in PROMPTS]
    assert found == [expected, expected]


EXPERTS = {"intermediate_size_mlp": 48, "num_local_experts": 2, "attention_chunk_size": 16}
SLIDING = {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 16}
NESTED: dict[str, dict[str, Any]] = {
    "fuyu": {},
    "gemma3": SLIDING,
    "gemma4": SLIDING,
    "got_ocr2": {},
    "llama4": {"layer_types": ["chunked_attention", "full_attention"], **EXPERTS},
}


def test_a_field_that_each_layer_has_for_itself_is_compared_with_no_setting() -> None:
    own = {"head_dim": 8, "num_global_key_value_heads": 1, "attention_k_eq_v": True}
    text = CONFIG_MAPPING["gemma4_text"](**{**FIELDS, **SLIDING, **own})
    assert check_limits(text, CacheConfig(head_dim=8, num_heads=4)) == 128
    with pytest.raises(ConfigError, match="num_heads=5"):
        check_limits(text, CacheConfig(num_heads=5))


@pytest.mark.parametrize(
    "kind", [pytest.param(k, marks=[] if k == "gemma3" else pytest.mark.slow) for k in NESTED]
)
def test_the_decoder_of_a_model_that_also_sees_gives_its_own_tokens(kind: str) -> None:
    text = {**FIELDS, "num_key_value_heads": 2, "head_dim": 8, **NESTED[kind]}
    others = {"vision_config": None, "audio_config": None} if kind == "gemma4" else {}
    config = CONFIG_MAPPING[kind](text_config=text, **others)
    vision = getattr(config, "vision_config", None)
    for name, value in SEEING.items():
        if hasattr(vision, name):
            setattr(vision, name, value)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval()
    prompt = PROMPTS[0] * 3
    with Harness(resolve_model(model).source) as engine:
        assert engine.engine.info.max_model_len == 128
        assert engine.run([prompt] * 2, max_new_tokens=16) == [own_tokens(model, prompt)] * 2


def test_adapters_and_their_base_are_models_of_their_own() -> None:
    kinds = ("adapter", "second of two adapters", "both of two adapters", "modules to save")
    paths = [resolve_model(RIGHT[kind]()).source.path for kind in kinds]
    assert len({*paths, resolve_model(llama()).source.path}) == 5
    without = resolve_model(RIGHT["adapters disabled"]()).source
    assert without == resolve_model(llama()).source


def test_blocks_of_a_module_are_not_found_for_it_with_other_weights(tmp_path: Path) -> None:
    model, prompt = llama(), list(range(3, 40))
    first = resolve_model(model).source
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight[3, 3] += 1e-3
    second = resolve_model(model).source
    reused = []
    for source in (first, second, first):
        with Harness(source, folders=[tmp_path]) as engine:
            engine.run([prompt], max_new_tokens=1)
            reused.append(sum(engine.reused[0].values()))
            engine.engine.flush()
    assert reused == [0, 0, 32]


def lost_bias() -> Any:
    return with_adapter(lora(lora_bias=True))


def hooked() -> Any:
    model = with_adapter()
    model.base_model.model.lm_head.register_forward_hook(lambda part, args, out: out * 2)
    return model


def replaced() -> Any:
    model = with_adapter()
    real = model.forward
    model.forward = lambda *args, **kwargs: real(*args, **kwargs)
    return model


REFUSED: dict[str, tuple[Callable[[], Any], str]] = {
    "a bias that the layer has not": (lost_bias, "merge_and_unload.*base layer has no bias"),
    "virtual tokens": (
        lambda: with_adapter(peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)),
        "PromptTuningConfig gives the model other inputs",
    ),
    "other attention": (
        lambda: with_adapter(
            peft.AdaptionPromptConfig(task_type="CAUSAL_LM", adapter_len=2, adapter_layers=1)
        ),
        "AdaptedAttention",
    ),
    "by tokens of the prompt": (
        lambda: with_adapter(lora(alora_invocation_tokens=[5, 6], lora_dropout=0)),
        "does not support merging",
    ),
    "hook": (hooked, "hook hooked.* of lm_head would be lost"),
    "forward": (replaced, "forward of the model was replaced"),
    "layers twice": (
        lambda: with_adapter(lora(layer_replication=[[0, 2], [1, 2]])),
        r"layers\.2\.\S+ is model\.layers\.1\.\S+, to which its config does not tie it",
    ),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_adapters_that_change_more_than_weights_are_refused(kind: str) -> None:
    make, reason = REFUSED[kind]
    with pytest.raises(ConfigError, match=f"model=.*{reason}"):
        resolve_model(make())


OWN_CODE = """
from transformers import LlamaConfig, LlamaForCausalLM

class OwnConfig(LlamaConfig):
    model_type = "tests_contrary_llama"

class OwnModel(LlamaForCausalLM):
    config_class = OwnConfig

    def forward(self, *args, **kwargs):
        output = super().forward(*args, **kwargs)
        output.logits = -output.logits
        return output
"""


def test_a_model_with_code_of_its_own_gives_its_own_tokens_by_folder_and_as_a_module(
    tmp_path: Path,
) -> None:
    llama().save_pretrained(tmp_path)
    (tmp_path / "own.py").write_text(OWN_CODE)
    config = json.loads((tmp_path / "config.json").read_text())
    auto = {"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.OwnModel"}
    config |= {"model_type": "tests_contrary_llama", "auto_map": auto}
    (tmp_path / "config.json").write_text(json.dumps(config))
    model = AutoModelForCausalLM.from_pretrained(tmp_path, trust_remote_code=True)
    expected = [own_tokens(model, prompt) for prompt in PROMPTS]
    assert expected != [own_tokens(llama(), prompt) for prompt in PROMPTS]
    for given in (tmp_path, model):
        with pytest.raises(ConfigError, match="trust_remote_code=True"):
            resolve_model(given)
        with Harness(resolve_model(given, trust_remote_code=True).source) as engine:
            assert engine.run(PROMPTS, max_new_tokens=16) == expected
