"""What transformers' `generate` can do: a call for each thing, whose value changes the output."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from tiny_models import ragged, tiny_model
from transformers import (
    GenerationConfig,
    GenerationMixin,
    LogitsProcessorList,
    StoppingCriteriaList,
    SynthIDTextWatermarkingConfig,
    WatermarkingConfig,
)

BATCH = ragged(12, 5, 9)
ONE = ragged(11, seed=3)
PADDED = ragged(11, 4, seed=3)
ECHO = {name: tensor.repeat(1, 3) for name, tensor in ONE.items()}
ALL = {"return_dict_in_generate": True, "output_scores": True, "output_logits": True}
ENDS = {"eos_token_id": list(range(3, 40)), "pad_token_id": 0}
SAMPLED = {"do_sample": True, "top_k": 0}
BEAMS = {"num_beams": 3}


def falling(ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
    """A processor: the later tokens of the vocabulary become less likely with the length."""
    return scores - torch.arange(scores.shape[1]) * ids.shape[1] / 400


def at_seventeen(ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
    """A criterion: stops all rows of seventeen tokens."""
    return torch.full((len(ids),), ids.shape[1] >= 17)


def best_of_two_steps(model: Any, input_ids: torch.Tensor, **kwargs: Any) -> torch.Tensor:
    """A loop of the user's own, by the interface of `custom_generate`: every second best token."""
    kwargs.pop("logits_processor"), kwargs.pop("stopping_criteria")
    length = kwargs.pop("generation_config").max_length
    for name in ("attention_mask", "position_ids", "past_key_values"):
        kwargs.pop(name, None)
    cache = None
    while input_ids.shape[1] < length:
        new = input_ids if cache is None else input_ids[:, -1:]
        output = model(new, past_key_values=cache, use_cache=True)
        cache = output.past_key_values
        second = output.logits[:, -1].topk(2).indices[:, 1:]
        input_ids = torch.cat([input_ids, second], dim=1)
    return input_ids


# By name: the inputs, the settings, and what of it must change the output (None = it need not).
Feature = tuple[dict[str, torch.Tensor], Callable[[], dict[str, Any]], tuple[str, ...] | None]
FEATURES: dict[str, Feature] = {
    "greedy": (BATCH, lambda: {}, None),
    "scores and logits": (BATCH, lambda: ALL, None),
    "sampling": (BATCH, lambda: {**SAMPLED, "temperature": 1.3, **ALL}, ("do_sample",)),
    "top_k": (BATCH, lambda: {"do_sample": True, "top_k": 4}, ("top_k",)),
    "top_p": (BATCH, lambda: {**SAMPLED, "top_p": 0.3}, ("top_p",)),
    "min_p": (BATCH, lambda: {**SAMPLED, "min_p": 0.2}, ("min_p",)),
    "top_h": (BATCH, lambda: {**SAMPLED, "top_h": 0.3}, ("top_h",)),
    "typical_p": (BATCH, lambda: {**SAMPLED, "typical_p": 0.3}, ("typical_p",)),
    "epsilon_cutoff": (BATCH, lambda: {**SAMPLED, "epsilon_cutoff": 0.03}, ("epsilon_cutoff",)),
    "eta_cutoff": (BATCH, lambda: {**SAMPLED, "eta_cutoff": 0.05}, ("eta_cutoff",)),
    "several samples": (BATCH, lambda: {**SAMPLED, "num_return_sequences": 3, **ALL}, None),
    "end tokens": (BATCH, lambda: ENDS, ("eos_token_id",)),
    "end tokens, sampling": (BATCH, lambda: {**ENDS, **SAMPLED}, ("eos_token_id",)),
    "end tokens, scores": (BATCH, lambda: {**ENDS, **ALL}, ("eos_token_id",)),
    "beams": (BATCH, lambda: {**BEAMS, **ALL}, ("num_beams",)),
    "beams, all of them": (BATCH, lambda: {**BEAMS, "num_return_sequences": 3, **ALL}, None),
    "beam sampling": (BATCH, lambda: {**BEAMS, **SAMPLED, **ALL}, ("num_beams",)),
    "early_stopping": (BATCH, lambda: {**BEAMS, **ENDS, "early_stopping": True, **ALL}, None),
    "never early": (BATCH, lambda: {**BEAMS, **ENDS, "early_stopping": "never"}, None),
    "length_penalty": (BATCH, lambda: {**BEAMS, **ENDS, "length_penalty": -3.0}, ("num_beams",)),
    "prompt lookup": (ECHO, lambda: {"prompt_lookup_num_tokens": 4, **ALL}, None),
    "prompt lookup, n-grams of one": (
        ECHO,
        lambda: {"prompt_lookup_num_tokens": 3, "max_matching_ngram_size": 1, **SAMPLED},
        None,
    ),
    "assistant": (ONE, lambda: {"assistant_model": tiny_model(layers=1), **ALL}, None),
    "assistant, sampling": (
        ONE,
        lambda: {"assistant_model": tiny_model(layers=1), **SAMPLED, **ALL},
        None,
    ),
    "assistant, as good as the model": (ONE, lambda: {"assistant_model": tiny_model()}, None),
    "assistant, padded": (
        {name: tensor[1:] for name, tensor in PADDED.items()},
        lambda: {"assistant_model": tiny_model(layers=1)},
        None,
    ),
    "guidance_scale": (BATCH, lambda: {"guidance_scale": 1.8, **ALL}, ("guidance_scale",)),
    "guidance_scale, no cache": (BATCH, lambda: {"guidance_scale": 1.8, "use_cache": False}, None),
    "negative_prompt_ids": (
        BATCH,
        lambda: {
            "guidance_scale": 1.8,
            "negative_prompt_ids": ragged(6, 6, 6, seed=8)["input_ids"],
            **ALL,
        },
        ("negative_prompt_ids",),
    ),
    "negative_prompt_attention_mask": (
        BATCH,
        lambda: {
            "guidance_scale": 1.8,
            "negative_prompt_ids": ragged(6, 3, 5, seed=8)["input_ids"],
            "negative_prompt_attention_mask": ragged(6, 3, 5, seed=8)["attention_mask"],
            **ALL,
        },
        ("negative_prompt_attention_mask",),
    ),
    "guided beams": (BATCH, lambda: {"guidance_scale": 1.8, **BEAMS}, ("guidance_scale",)),
    "prefix_allowed_tokens_fn": (
        BATCH,
        lambda: {
            "prefix_allowed_tokens_fn": lambda row, ids: range(9 * row + 3, 9 * row + 20),
            **BEAMS,
            **ALL,
        },
        ("prefix_allowed_tokens_fn",),
    ),
    "logits_processor": (
        BATCH,
        lambda: {"logits_processor": LogitsProcessorList([falling]), **ALL},
        ("logits_processor",),
    ),
    "logits_processor, beams": (
        BATCH,
        lambda: {"logits_processor": LogitsProcessorList([falling]), **BEAMS},
        ("logits_processor",),
    ),
    "stopping_criteria": (
        BATCH,
        lambda: {"stopping_criteria": StoppingCriteriaList([at_seventeen]), **ALL},
        ("stopping_criteria",),
    ),
    "watermarking_config": (
        BATCH,
        lambda: {"watermarking_config": WatermarkingConfig(bias=3.0), **SAMPLED},
        ("watermarking_config",),
    ),
    "watermarking_config, SynthID": (
        BATCH,
        lambda: {
            "watermarking_config": SynthIDTextWatermarkingConfig(
                keys=[654, 400, 836], ngram_len=3, sampling_table_size=64, context_history_size=16
            ),
            **SAMPLED,
        },
        ("watermarking_config",),
    ),
    "repetition_penalty": (BATCH, lambda: {"repetition_penalty": 1.9}, ("repetition_penalty",)),
    "encoder_repetition_penalty": (
        BATCH,
        lambda: {"encoder_repetition_penalty": 3.0},
        ("encoder_repetition_penalty",),
    ),
    "no_repeat_ngram_size": (BATCH, lambda: {"no_repeat_ngram_size": 1}, ("no_repeat_ngram_size",)),
    "encoder_no_repeat_ngram_size": (
        BATCH,
        lambda: {"encoder_no_repeat_ngram_size": 1},
        ("encoder_no_repeat_ngram_size",),
    ),
    "bad_words_ids": (
        BATCH,
        lambda: {"bad_words_ids": [[token] for token in range(5, 60)]},
        ("bad_words_ids",),
    ),
    "sequence_bias": (
        BATCH,
        lambda: {"sequence_bias": [[[token], 9.0] for token in (7, 8)]},
        ("sequence_bias",),
    ),
    "suppress_tokens": (BATCH, lambda: {"suppress_tokens": [*range(40)]}, ("suppress_tokens",)),
    "begin_suppress_tokens": (
        BATCH,
        lambda: {"begin_suppress_tokens": [*range(3, 50)]},
        ("begin_suppress_tokens",),
    ),
    "forced_bos_token_id": (
        ragged(1, 1),
        lambda: {"forced_bos_token_id": 9},
        ("forced_bos_token_id",),
    ),
    "forced_eos_token_id": (BATCH, lambda: {"forced_eos_token_id": 9}, ("forced_eos_token_id",)),
    "exponential_decay_length_penalty": (
        BATCH,
        lambda: {**ENDS, "min_new_tokens": 3, "exponential_decay_length_penalty": (3, 4.0)},
        ("exponential_decay_length_penalty",),
    ),
    "min_new_tokens": (BATCH, lambda: {**ENDS, "min_new_tokens": 6}, ("min_new_tokens",)),
    "min_length": (BATCH, lambda: {**ENDS, "min_length": 16}, ("min_length",)),
    "renormalize_logits": (
        BATCH,
        lambda: {"renormalize_logits": True, **ALL},
        ("renormalize_logits",),
    ),
    "remove_invalid_values": (
        BATCH,
        lambda: {"sequence_bias": [[[7], math.inf]], "remove_invalid_values": True, **ALL},
        ("remove_invalid_values",),
    ),
    "use_cache=False": (BATCH, lambda: {"use_cache": False, **ALL}, None),
    "use_cache=False, beams": (BATCH, lambda: {"use_cache": False, **BEAMS}, None),
    "prefill_chunk_size": (BATCH, lambda: {"prefill_chunk_size": 5, **ALL}, None),
    "cache_implementation": (BATCH, lambda: {"cache_implementation": "static"}, None),
    "custom_generate": (ONE, lambda: {"custom_generate": best_of_two_steps}, ("custom_generate",)),
    "custom_generate, a loop of transformers": (
        BATCH,
        lambda: {"custom_generate": GenerationMixin._beam_search, **BEAMS},
        None,
    ),
    "a config of the caller": (
        BATCH,
        lambda: {"generation_config": GenerationConfig(num_beams=2, length_penalty=0.5)},
        ("generation_config",),
    ),
}
