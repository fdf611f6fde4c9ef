"""What transformers' `generate` can do: a call for each thing, whose value changes the output.

docs/generate.md has a row for each (`generate_doc.py` writes them).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from scene import Scene
from transformers import (
    GenerationConfig,
    GenerationMixin,
    LogitsProcessor,
    LogitsProcessorList,
    StoppingCriteria,
    StoppingCriteriaList,
    SynthIDTextWatermarkingConfig,
    WatermarkingConfig,
)

Settings = dict[str, Any]
ALL: Settings = {"return_dict_in_generate": True, "output_scores": True, "output_logits": True}
SAMPLED: Settings = {"do_sample": True, "top_k": 0}
BEAMS: Settings = {"num_beams": 3}
UNUSED = 90
"""A token of no input."""


class Feature(NamedTuple):
    """A call of `generate`.

    Attributes:
        group: the heading in the docs.
        asks: the argument or class, as the docs name it.
        settings: of the call, for a scene.
        changes: what of it changes the output: a call without differs. Empty = it changes how the
            output is computed.
        inputs: of the scene.
    """

    group: str
    asks: str
    settings: Callable[[Scene], Settings]
    changes: tuple[str, ...]
    inputs: str = "batch"

    def without(self, scene: Scene) -> Settings:
        """The settings less those that change the output."""
        return {k: v for k, v in self.settings(scene).items() if k not in self.changes}


def ends(scene: Scene) -> Settings:
    """Rows end at different steps."""
    return {"eos_token_id": scene.ends, "pad_token_id": 0}


def falling(ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
    """A processor: the later tokens of the vocabulary become less likely with the length."""
    return scores - torch.linspace(0, 1, scores.shape[1]) * ids.shape[1] / 2


class Alternating(LogitsProcessor):  # type: ignore[misc]  # transformers is untyped
    """A processor with a state: no token of the parity of the step before."""

    def __init__(self) -> None:
        self.parity = 0

    def __call__(self, ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        self.parity = 1 - self.parity
        scores = scores.clone()
        scores[:, self.parity :: 2] = -math.inf
        return scores


def after(columns: int) -> Callable[..., torch.Tensor]:
    """A criterion: stops all rows of so many columns."""
    return lambda ids, scores, **_: torch.full((len(ids),), ids.shape[1] >= columns)


class RowsEnd(StoppingCriteria):  # type: ignore[misc]
    """A criterion: every row ends at another length."""

    def __init__(self, columns: int) -> None:
        self.columns = columns

    def __call__(self, ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        return torch.arange(len(ids)) + self.columns <= ids.shape[1]


def second_best(model: Any, input_ids: torch.Tensor, **kwargs: Any) -> torch.Tensor:
    """A loop of the user's own, by the interface of `custom_generate`: every second best token."""
    length = kwargs["generation_config"].max_length
    cache = None
    while input_ids.shape[1] < length:
        new = input_ids if cache is None else input_ids[:, -1:]
        output = model(new, past_key_values=cache, use_cache=True, logits_to_keep=1)
        cache = output.past_key_values
        second = output.logits[:, -1].topk(2).indices[:, 1:]
        input_ids = torch.cat([input_ids, second], dim=1)
    return input_ids


def synthid(**fields: Any) -> SynthIDTextWatermarkingConfig:
    """A watermark of few keys."""
    return SynthIDTextWatermarkingConfig(
        keys=[654, 400, 836], ngram_len=3, sampling_table_size=64, context_history_size=16, **fields
    )


def drafting(scene: Scene, **fields: Any) -> Any:
    """The scene's assistant with settings of its own."""
    for name, value in fields.items():
        setattr(scene.assistant.generation_config, name, value)
    return scene.assistant


LENGTH, SAMPLING, SCORES = "Length and end", "Sampling", "Rules for scores"
SEARCH, DRAFTS, GUIDE = "Beams", "Drafts", "Guidance and constraints"
PYTHON, MARKS, OUT = "Python of the caller's", "Watermarks", "Outputs and inputs"
HOW = "How it is computed"

FEATURES: dict[str, Feature] = {
    "max_new_tokens": Feature(
        LENGTH, "`max_new_tokens`", lambda s: {"max_new_tokens": 3}, ("max_new_tokens",)
    ),
    "max_length": Feature(
        LENGTH,
        "`max_length`, the padded width included",
        lambda s: {"max_length": s.width + 2, "max_new_tokens": None},
        ("max_length", "max_new_tokens"),
    ),
    "eos_token_id": Feature(
        LENGTH,
        "`eos_token_id`, one",
        lambda s: {"eos_token_id": s.free[0][2], "pad_token_id": 0},
        ("eos_token_id",),
    ),
    "eos_token_id, several": Feature(
        LENGTH, "`eos_token_id`, a list", lambda s: {**ends(s), **ALL}, ("eos_token_id",)
    ),
    "eos_token_id, sampling": Feature(
        LENGTH,
        "`eos_token_id` while sampling",
        lambda s: {**ends(s), **SAMPLED, "temperature": 0.8},
        ("eos_token_id",),
    ),
    "pad_token_id": Feature(
        LENGTH,
        "`pad_token_id`: fills the rows that have ended",
        lambda s: {**ends(s), "pad_token_id": 5},
        ("pad_token_id",),
    ),
    "min_new_tokens": Feature(
        LENGTH,
        "`min_new_tokens`",
        lambda s: {**ends(s), "min_new_tokens": s.new_tokens - 1},
        ("min_new_tokens",),
    ),
    "min_length": Feature(
        LENGTH,
        "`min_length`, the padded width included",
        lambda s: {**ends(s), "min_length": s.width + s.new_tokens - 1},
        ("min_length",),
    ),
    "exponential_decay_length_penalty": Feature(
        LENGTH,
        "`exponential_decay_length_penalty`",
        lambda s: {
            "eos_token_id": 9,
            "pad_token_id": 0,
            "exponential_decay_length_penalty": (1, 40.0),
        },
        ("exponential_decay_length_penalty",),
    ),
    "forced_eos_token_id": Feature(
        LENGTH,
        "`forced_eos_token_id`",
        lambda s: {"forced_eos_token_id": 9},
        ("forced_eos_token_id",),
    ),
    "forced_bos_token_id": Feature(
        LENGTH,
        "`forced_bos_token_id`, behind a prompt of one token",
        lambda s: {"forced_bos_token_id": 9},
        ("forced_bos_token_id",),
        "word",
    ),
    "max_time": Feature(LENGTH, "`max_time`", lambda s: {"max_time": 1e-9}, ("max_time",)),
    "stop_strings": Feature(
        LENGTH,
        "`stop_strings` with `tokenizer`",
        lambda s: {
            "stop_strings": [
                s.tokenizer.decode([s.free[0][1]]),
                s.tokenizer.decode(s.free[1][1:3]),
            ],
            "pad_token_id": 0,
        },
        ("stop_strings",),
    ),
    "stop_strings, beams": Feature(
        LENGTH,
        "`stop_strings` of beams",
        lambda s: {"stop_strings": s.tokenizer.decode([s.free[0][1]]), "pad_token_id": 0, **BEAMS},
        ("stop_strings",),
    ),
    "do_sample": Feature(
        SAMPLING,
        "`do_sample`, `temperature`",
        lambda s: {**SAMPLED, "temperature": 1.3, **ALL},
        ("do_sample", "temperature", "top_k"),
    ),
    "temperature": Feature(
        SAMPLING, "`temperature`", lambda s: {**SAMPLED, "temperature": 3.0}, ("temperature",)
    ),
    "top_k": Feature(
        SAMPLING,
        "`top_k`",
        lambda s: {"do_sample": True, "temperature": 2.0, "top_k": 3, **ALL},
        ("top_k",),
    ),
    "top_p": Feature(SAMPLING, "`top_p`", lambda s: {**SAMPLED, "top_p": 0.3, **ALL}, ("top_p",)),
    "min_p": Feature(SAMPLING, "`min_p`", lambda s: {**SAMPLED, "min_p": 0.2, **ALL}, ("min_p",)),
    "top_h": Feature(SAMPLING, "`top_h`", lambda s: {**SAMPLED, "top_h": 0.3, **ALL}, ("top_h",)),
    "typical_p": Feature(
        SAMPLING, "`typical_p`", lambda s: {**SAMPLED, "typical_p": 0.3, **ALL}, ("typical_p",)
    ),
    "epsilon_cutoff": Feature(
        SAMPLING,
        "`epsilon_cutoff`",
        lambda s: {**SAMPLED, "epsilon_cutoff": 0.03, **ALL},
        ("epsilon_cutoff",),
    ),
    "eta_cutoff": Feature(
        SAMPLING, "`eta_cutoff`", lambda s: {**SAMPLED, "eta_cutoff": 0.05, **ALL}, ("eta_cutoff",)
    ),
    "num_return_sequences": Feature(
        SAMPLING,
        "`num_return_sequences` while sampling",
        lambda s: {**SAMPLED, "num_return_sequences": 3, **ALL},
        ("num_return_sequences",),
    ),
    "repetition_penalty": Feature(
        SCORES,
        "`repetition_penalty`",
        lambda s: {"repetition_penalty": 1.9, **ALL},
        ("repetition_penalty",),
    ),
    "encoder_repetition_penalty": Feature(
        SCORES,
        "`encoder_repetition_penalty`: of the prompt's tokens",
        lambda s: {"encoder_repetition_penalty": 3.0},
        ("encoder_repetition_penalty",),
    ),
    "no_repeat_ngram_size": Feature(
        SCORES,
        "`no_repeat_ngram_size`",
        lambda s: {"no_repeat_ngram_size": 1, **ALL},
        ("no_repeat_ngram_size",),
    ),
    "encoder_no_repeat_ngram_size": Feature(
        SCORES,
        "`encoder_no_repeat_ngram_size`: of the prompt's n-grams",
        lambda s: {"encoder_no_repeat_ngram_size": 1, **ALL},
        ("encoder_no_repeat_ngram_size",),
    ),
    "bad_words_ids": Feature(
        SCORES,
        "`bad_words_ids` of one token",
        lambda s: {"bad_words_ids": [[token] for token in s.likely]},
        ("bad_words_ids",),
    ),
    "bad_words_ids, of several tokens": Feature(
        SCORES,
        "`bad_words_ids` of several tokens",
        lambda s: {"bad_words_ids": [row[:2] for row in s.free]},
        ("bad_words_ids",),
    ),
    "sequence_bias": Feature(
        SCORES,
        "`sequence_bias`, a dict",
        lambda s: {"sequence_bias": {(token,): -9.0 for token in s.likely}, **ALL},
        ("sequence_bias",),
    ),
    "sequence_bias, of several tokens": Feature(
        SCORES,
        "`sequence_bias`, a list; of several tokens",
        lambda s: {"sequence_bias": [[row[:2], -20.0] for row in s.free]},
        ("sequence_bias",),
    ),
    "suppress_tokens": Feature(
        SCORES,
        "`suppress_tokens`",
        lambda s: {"suppress_tokens": s.likely},
        ("suppress_tokens",),
    ),
    "begin_suppress_tokens": Feature(
        SCORES,
        "`begin_suppress_tokens`",
        lambda s: {"begin_suppress_tokens": [row[0] for row in s.free]},
        ("begin_suppress_tokens",),
    ),
    "renormalize_logits": Feature(
        SCORES,
        "`renormalize_logits`",
        lambda s: {"renormalize_logits": True, **ALL},
        ("renormalize_logits",),
    ),
    "remove_invalid_values": Feature(
        SCORES,
        "`remove_invalid_values`",
        lambda s: {"sequence_bias": [[[7], math.inf]], "remove_invalid_values": True, **ALL},
        ("remove_invalid_values",),
    ),
    "num_beams": Feature(SEARCH, "`num_beams`", lambda s: {**BEAMS, **ALL}, ("num_beams",)),
    "num_beams, all of them": Feature(
        SEARCH,
        "`num_return_sequences` of beams",
        lambda s: {**BEAMS, "num_return_sequences": 3, **ALL},
        ("num_return_sequences",),
    ),
    "num_beams, sampling": Feature(
        SEARCH,
        "`do_sample` of beams",
        lambda s: {**BEAMS, **SAMPLED, "temperature": 2.0, **ALL},
        ("do_sample", "temperature", "top_k"),
    ),
    "early_stopping": Feature(
        SEARCH,
        "`early_stopping=True`",
        lambda s: {
            **BEAMS,
            **ends(s),
            "early_stopping": True,
            "length_penalty": 2.0,
            "num_return_sequences": 3,
            **ALL,
        },
        ("early_stopping",),
    ),
    "early_stopping, never": Feature(
        SEARCH,
        '`early_stopping="never"`',
        lambda s: {
            **BEAMS,
            "eos_token_id": s.many_ends,
            "pad_token_id": 0,
            "max_new_tokens": s.new_tokens + 2,
            "early_stopping": "never",
            "length_penalty": 3.0,
            "num_return_sequences": 3,
            **ALL,
        },
        ("early_stopping",),
    ),
    "length_penalty": Feature(
        SEARCH,
        "`length_penalty`",
        lambda s: {**BEAMS, **ends(s), "length_penalty": -3.0, **ALL},
        ("length_penalty",),
    ),
    "repetition_penalty, beams": Feature(
        SEARCH,
        "`repetition_penalty` of beams",
        lambda s: {**BEAMS, "repetition_penalty": 1.9, **ALL},
        ("repetition_penalty",),
    ),
    "prompt_lookup_num_tokens": Feature(
        DRAFTS,
        "`prompt_lookup_num_tokens`, sampling",
        lambda s: {"prompt_lookup_num_tokens": 4, **SAMPLED, "temperature": 1.5, **ALL},
        ("prompt_lookup_num_tokens",),
        "echo",
    ),
    "max_matching_ngram_size": Feature(
        DRAFTS,
        "`max_matching_ngram_size`",
        lambda s: {
            "prompt_lookup_num_tokens": 3,
            "max_matching_ngram_size": 1,
            **SAMPLED,
            "temperature": 1.5,
        },
        ("prompt_lookup_num_tokens", "max_matching_ngram_size"),
        "echo",
    ),
    "prompt_lookup_num_tokens, greedy": Feature(
        DRAFTS,
        "`prompt_lookup_num_tokens`, greedy",
        lambda s: {"prompt_lookup_num_tokens": 4, **ALL},
        (),
        "echo",
    ),
    "assistant_model": Feature(
        DRAFTS,
        "`assistant_model`, sampling",
        lambda s: {"assistant_model": drafting(s), **SAMPLED, "temperature": 1.5, **ALL},
        ("assistant_model",),
        "one",
    ),
    "assistant_model, greedy": Feature(
        DRAFTS,
        "`assistant_model`, greedy",
        lambda s: {"assistant_model": drafting(s), **ALL},
        (),
        "one",
    ),
    "assistant_model, as good as the model": Feature(
        DRAFTS,
        "`assistant_model` that is always right",
        lambda s: {"assistant_model": s.model, "num_assistant_tokens": 3},
        (),
        "one",
    ),
    "num_assistant_tokens": Feature(
        DRAFTS,
        "`num_assistant_tokens` and its schedule, of the assistant's own settings",
        lambda s: {
            "assistant_model": drafting(
                s, num_assistant_tokens=2, num_assistant_tokens_schedule="constant"
            ),
            "assistant_confidence_threshold": 0.0,
            **SAMPLED,
            "temperature": 1.5,
        },
        ("assistant_model",),
        "one",
    ),
    "guidance_scale": Feature(
        GUIDE, "`guidance_scale`", lambda s: {"guidance_scale": 2.5, **ALL}, ("guidance_scale",)
    ),
    "guidance_scale, without a cache": Feature(
        GUIDE,
        "`guidance_scale` with `use_cache=False`",
        lambda s: {"guidance_scale": 2.5, "use_cache": False},
        ("guidance_scale",),
    ),
    "guidance_scale, beams": Feature(
        GUIDE,
        "`guidance_scale` of beams",
        lambda s: {"guidance_scale": 2.5, **BEAMS, **ALL},
        ("guidance_scale",),
    ),
    "negative_prompt_ids": Feature(
        GUIDE,
        "`negative_prompt_ids`",
        lambda s: {
            "guidance_scale": 2.5,
            "negative_prompt_ids": s.negative["input_ids"],
            **ALL,
        },
        ("negative_prompt_ids",),
    ),
    "negative_prompt_attention_mask": Feature(
        GUIDE,
        "`negative_prompt_attention_mask`",
        lambda s: {
            "guidance_scale": 2.5,
            "negative_prompt_ids": s.negative["input_ids"],
            "negative_prompt_attention_mask": s.negative["attention_mask"],
            **ALL,
        },
        ("negative_prompt_attention_mask",),
    ),
    "prefix_allowed_tokens_fn": Feature(
        GUIDE,
        "`prefix_allowed_tokens_fn`",
        lambda s: {
            "prefix_allowed_tokens_fn": lambda row, ids: range(9 * row + 3, 9 * row + 20),
            **ALL,
        },
        ("prefix_allowed_tokens_fn",),
    ),
    "prefix_allowed_tokens_fn, beams": Feature(
        GUIDE,
        "`prefix_allowed_tokens_fn` of beams",
        lambda s: {
            "prefix_allowed_tokens_fn": lambda row, ids: range(9 * row + 3, 9 * row + 20),
            **BEAMS,
            **ALL,
        },
        ("prefix_allowed_tokens_fn",),
    ),
    "logits_processor": Feature(
        PYTHON,
        "`logits_processor`, a function",
        lambda s: {"logits_processor": LogitsProcessorList([falling]), **ALL},
        ("logits_processor",),
    ),
    "logits_processor, with a state": Feature(
        PYTHON,
        "`LogitsProcessor` with a state",
        lambda s: {"logits_processor": [Alternating()], **ALL},
        ("logits_processor",),
    ),
    "logits_processor, beams": Feature(
        PYTHON,
        "`logits_processor` of beams",
        lambda s: {"logits_processor": [Alternating()], **BEAMS},
        ("logits_processor",),
    ),
    "logits_processor, sampling": Feature(
        PYTHON,
        "`LogitsProcessor` while sampling",
        lambda s: {"logits_processor": [Alternating()], **SAMPLED},
        ("logits_processor",),
    ),
    "stopping_criteria": Feature(
        PYTHON,
        "`stopping_criteria`, a function",
        lambda s: {"stopping_criteria": StoppingCriteriaList([after(s.width + 3)]), **ALL},
        ("stopping_criteria",),
    ),
    "stopping_criteria, row by row": Feature(
        PYTHON,
        "`StoppingCriteria` that ends rows one by one",
        lambda s: {
            "stopping_criteria": [RowsEnd(s.width + 1)],
            "eos_token_id": 9,
            "pad_token_id": 0,
        },
        ("stopping_criteria",),
    ),
    "stopping_criteria, beams": Feature(
        PYTHON,
        "`stopping_criteria` of beams",
        lambda s: {"stopping_criteria": StoppingCriteriaList([after(s.width + 3)]), **BEAMS, **ALL},
        ("stopping_criteria",),
    ),
    "custom_generate": Feature(
        PYTHON,
        "`custom_generate`, a function",
        lambda s: {"custom_generate": second_best},
        ("custom_generate",),
        "one",
    ),
    "custom_generate, a loop of transformers": Feature(
        PYTHON,
        "`custom_generate`, a loop of transformers",
        lambda s: {"custom_generate": GenerationMixin._beam_search, **BEAMS},
        ("custom_generate", "num_beams"),
    ),
    "watermarking_config": Feature(
        MARKS,
        "`WatermarkingConfig`",
        lambda s: {"watermarking_config": WatermarkingConfig(bias=6.0), **ALL},
        ("watermarking_config",),
    ),
    "watermarking_config, a dict": Feature(
        MARKS,
        "`watermarking_config`, a dict; `selfhash`",
        lambda s: {
            "watermarking_config": {
                "bias": 6.0,
                "seeding_scheme": "selfhash",
                "greenlist_ratio": 0.25,
                "hashing_key": 15485863,
                "context_width": 1,
            },
            **SAMPLED,
        },
        ("watermarking_config",),
    ),
    "watermarking_config, SynthID": Feature(
        MARKS,
        "`SynthIDTextWatermarkingConfig`",
        lambda s: {"watermarking_config": synthid(), **SAMPLED, "temperature": 1.5, **ALL},
        ("watermarking_config",),
    ),
    "return_dict_in_generate": Feature(
        OUT,
        "`return_dict_in_generate`",
        lambda s: {"return_dict_in_generate": True},
        ("return_dict_in_generate",),
    ),
    "output_scores": Feature(
        OUT,
        "`output_scores`",
        lambda s: {"return_dict_in_generate": True, "output_scores": True},
        ("output_scores",),
    ),
    "output_logits": Feature(
        OUT,
        "`output_logits`",
        lambda s: {"return_dict_in_generate": True, "output_logits": True},
        ("output_logits",),
    ),
    "use_cache": Feature(
        OUT,
        "`use_cache=False`: no `past_key_values` in the output",
        lambda s: {"use_cache": False, **ALL},
        ("use_cache",),
    ),
    "attention_mask": Feature(
        OUT,
        "`attention_mask`: padding is no part of a row",
        lambda s: {"attention_mask": s.batch["attention_mask"], "pad_token_id": UNUSED, **ALL},
        ("attention_mask",),
        "bare",
    ),
    "attention_mask, from pad_token_id": Feature(
        OUT,
        "no `attention_mask`: `pad_token_id` is padding",
        lambda s: {
            "input_ids": s.batch["input_ids"].where(s.batch["attention_mask"] != 0, UNUSED),
            "pad_token_id": UNUSED,
            **ALL,
        },
        ("pad_token_id",),
        "bare",
    ),
    "bos_token_id": Feature(
        OUT,
        "no `input_ids`: `bos_token_id` begins",
        lambda s: {"input_ids": None, "attention_mask": None, "bos_token_id": 9},
        ("bos_token_id",),
    ),
    "generation_config": Feature(
        OUT,
        "`generation_config`",
        lambda s: {"generation_config": GenerationConfig(num_beams=2, repetition_penalty=1.5)},
        ("generation_config",),
    ),
    "token_healing": Feature(
        OUT,
        "`token_healing` with `tokenizer`",
        lambda s: {"token_healing": True, "pad_token_id": 0},
        ("token_healing",),
        "cut",
    ),
    "position_ids": Feature(
        HOW,
        "`position_ids` that follow from the mask; others are refused",
        lambda s: {"position_ids": (s.batch["attention_mask"].cumsum(1) - 1).clamp(min=0), **ALL},
        (),
    ),
    "prefill_chunk_size": Feature(
        HOW, "`prefill_chunk_size`", lambda s: {"prefill_chunk_size": 5, **ALL}, ()
    ),
    "use_cache, beams": Feature(
        HOW, "`use_cache=False` of beams", lambda s: {"use_cache": False, **BEAMS}, ()
    ),
    "cache_implementation": Feature(
        HOW,
        '`cache_implementation`, any but `"quantized"`',
        lambda s: {"cache_implementation": "static"},
        (),
    ),
}
