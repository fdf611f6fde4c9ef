"""What the engine loop does not do, refused by name before anything is sent.

Each entry gives the values at which a setting changes nothing; any other value is an error. A
setting that is silently ignored would return tokens that the caller did not ask for.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from litecache.errors import ConfigError, outline

_OFF = (None, False)

# Fields of GenerationConfig -> values at which they have no effect.
NEUTRAL_VALUES: dict[str, tuple[Any, ...]] = {
    "assistant_early_exit": (None,),
    "cache_implementation": (None, "dynamic", "hybrid"),
    "compile_config": (None,),
    "constraints": (None,),
    "diversity_penalty": (None, 0.0),
    "dola_layers": (None,),
    "encoder_no_repeat_ngram_size": (None, 0),
    "encoder_repetition_penalty": (None, 1.0),
    "exponential_decay_length_penalty": (None,),
    "force_words_ids": (None,),
    "forced_bos_token_id": (None,),
    "forced_eos_token_id": (None,),
    "guidance_scale": (None, 1.0),
    "low_memory": _OFF,
    "num_beam_groups": (None, 1),
    "num_beams": (None, 1),
    "output_attentions": _OFF,
    "output_hidden_states": _OFF,
    "output_logits": _OFF,
    "output_scores": _OFF,
    "penalty_alpha": (None, 0.0),
    "prefill_chunk_size": (None,),
    "prompt_lookup_num_tokens": (None,),
    "remove_invalid_values": _OFF,
    "renormalize_logits": _OFF,
    "speculation_type": (None,),
    "token_healing": _OFF,
    "use_cache": (None, True),
    "use_mtp": _OFF,
    "watermarking_config": (None,),
}

# The same, for settings that only matter while sampling.
NEUTRAL_WHEN_SAMPLING: dict[str, tuple[Any, ...]] = {
    "epsilon_cutoff": (None, 0.0),
    "eta_cutoff": (None, 0.0),
    "top_h": (None,),
    "typical_p": (None, 1.0),
}

# Arguments of `generate` beside the GenerationConfig.
_UNSUPPORTED_ARGUMENTS = (
    "assistant_model",
    "assistant_tokenizer",
    "cache_position",
    "continuous_batching_config",
    "custom_generate",
    "encoder_outputs",
    "inputs_embeds",
    "logits_processor",
    "negative_prompt_attention_mask",
    "negative_prompt_ids",
    "past_key_values",
    "position_ids",
    "prefix_allowed_tokens_fn",
    "stopping_criteria",
    "synced_gpus",
    "token_type_ids",
)


def _changes_nothing(value: Any) -> bool:
    """None, False, an empty list, or a tensor of zeros (token types of a plain text)."""
    if value is None or value is False:
        return True
    try:
        if hasattr(value, "any") and hasattr(value, "shape"):
            return not bool(value.any())
        return hasattr(value, "__len__") and len(value) == 0
    except Exception:  # a tensor without numbers, an object of the caller's
        return False


def refuse_settings(settings: Mapping[str, Any], *, sampling: bool) -> None:
    """Refuse fields of a merged generation config that the engine loop does not honour.

    Raises:
        ConfigError: names the first such field, its value and the value to leave it at.
    """
    tables = (NEUTRAL_VALUES, NEUTRAL_WHEN_SAMPLING) if sampling else (NEUTRAL_VALUES,)
    for table in tables:
        for name, neutral in table.items():
            value = settings.get(name)
            if not any(value is n or (_same_kind(value, n) and value == n) for n in neutral):
                shown = " or ".join(repr(n) for n in neutral)
                raise ConfigError(name, value, f"{shown}; LiteCache's engine loop has no other yet")


def _same_kind(value: Any, neutral: Any) -> bool:
    """Whether they may be compared: a tensor may not, and 1 == True is a count for a switch."""
    plain = isinstance(value, (int, float, str))
    return plain and isinstance(value, bool) == isinstance(neutral, bool)


def refuse_arguments(arguments: Mapping[str, Any]) -> None:
    """Refuse arguments of `generate` that are neither settings nor inputs.

    Raises:
        ConfigError: names the first one that would have an effect, or that does not exist.
    """
    for name, value in arguments.items():
        if _changes_nothing(value):
            continue
        if name in _UNSUPPORTED_ARGUMENTS:
            raise ConfigError(
                f"generate({name}=...) is not supported by the engine loop yet: leave it out"
            )
        # it may be a prompt under a wrong name
        valid = "an argument of generate or a field of GenerationConfig"
        raise ConfigError(name, outline(value), valid)
