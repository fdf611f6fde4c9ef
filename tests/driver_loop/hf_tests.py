"""Transformers' tests of generation, one by one, and what of this project stands for each.

Read in transformers' repository as of version 5 (tests/generation); nothing of them is copied. Each
is held by a test here (`by`), refused by name (`by` shows the refusal), or apart: about models or
machines that no decoder behind LiteCache is. docs/generate.md lists them (`generate_doc.py`).
"""

from __future__ import annotations

from typing import NamedTuple

PASSES, REFUSED, APART = "passes", "refused", "apart"


class Stand(NamedTuple):
    """How LiteCache stands to a test of transformers'.

    Attributes:
        verdict: PASSES, REFUSED or APART.
        by: the test of this project; with "[...]" one of its cases. Empty where APART.
        why: of a refusal or of being apart.
    """

    verdict: str
    by: str = ""
    why: str = ""


def _passes(by: str, why: str = "") -> Stand:
    return Stand(PASSES, by, why)


def _feature(name: str) -> Stand:
    return Stand(PASSES, f"{FEATURE}[{name}]")


def _refused(by: str, why: str) -> Stand:
    return Stand(REFUSED, by, why)


def _apart(why: str) -> Stand:
    return Stand(APART, "", why)


FEATURE = "test_a_feature_cold_and_with_a_prefix_hit"
_MODES = "test_every_mode_gives_outputs_of_the_promised_types_and_shapes"
_HOW = "test_how_transformers_would_compute_changes_no_output"
_EMBEDS = "test_embeddings_instead_of_tokens_are_refused"
_TRANSITIONS = "test_scores_of_transitions_add_up"
_SPECIAL = "test_special_tokens_fall_back_on_the_models"
_DRAFTS = "test_drafts_of_an_assistant_change_nothing_of_a_greedy_output"
_ENCODERS = "an encoder-decoder or a model of images or sound; decoders alone are served"
_CARDS = "a model or a cache cut over several GPUs by transformers"
_KERNELS = "compares attention kernels of transformers; LiteCache has its own (tests/kernels)"
_FUNCTION = "a function of transformers that no model goes through; it runs unchanged"
_BY_IDS = "KV is found by token ids, and the replicas embed them"
_LAYERS = "; without `output_attentions` and `output_hidden_states`, which are refused"
_PACKED = "several rows in one: each row is one request"

HF_TESTS: dict[str, dict[str, Stand]] = {
    "GenerationTesterMixin": {
        "test_greedy_generate": _passes(f"{_MODES}[greedy]"),
        "test_greedy_generate_dict_outputs": _passes(f"{_MODES}[greedy]", _LAYERS),
        "test_greedy_generate_dict_outputs_use_cache": _passes(f"{_MODES}[greedy]", _LAYERS),
        "test_sample_generate": _passes(f"{_MODES}[sampling]"),
        "test_sample_generate_dict_output": _passes(f"{_MODES}[two samples]", _LAYERS),
        "test_beam_search_generate": _passes(f"{_MODES}[beams]"),
        "test_beam_search_generate_dict_output": _passes(f"{_MODES}[beams]", _LAYERS),
        "test_beam_search_generate_dict_outputs_use_cache": _passes(f"{_MODES}[beams]", _LAYERS),
        "test_model_parallel_beam_search": _apart(_CARDS),
        "test_beam_sample_generate": _passes(f"{_MODES}[beam sampling]"),
        "test_beam_sample_generate_dict_output": _passes(f"{_MODES}[beam sampling]", _LAYERS),
        "test_generate_without_input_ids": _passes(
            "test_without_an_input_the_first_token_of_all_begins"
        ),
        "test_assisted_decoding_matches_greedy_search": _passes(_DRAFTS, _LAYERS),
        "test_prompt_lookup_decoding_matches_greedy_search": _passes(
            "test_drafts_of_the_prompt_change_nothing_of_a_greedy_output", _LAYERS
        ),
        "test_assisted_decoding_sample": _passes(
            "test_sampling_with_an_assistant_gives_full_outputs", _LAYERS
        ),
        "test_prompt_lookup_decoding_stops_at_eos": _passes(
            "test_a_draft_of_the_prompt_does_not_run_over_an_end_token"
        ),
        "test_left_padding_compatibility": _passes("test_padding_on_the_left_changes_no_logits"),
        "test_past_key_values_format": _refused(
            "test_a_returned_cache_counts_rows_and_columns_and_holds_no_keys",
            "keys and values stay in the replicas; the cache has the tokens of each row",
        ),
        "test_generate_from_random_inputs_embeds": _refused(_EMBEDS, _BY_IDS),
        "test_generate_from_inputs_embeds": _refused(_EMBEDS, _BY_IDS),
        "test_generate_from_inputs_embeds_with_static_cache": _refused(_EMBEDS, _BY_IDS),
        "test_generate_continue_from_past_key_values": _passes(
            "test_a_call_of_four_tokens_is_one_of_three_and_one_that_goes_on"
        ),
        "test_generate_continue_from_inputs_embeds": _refused(_EMBEDS, _BY_IDS),
        "test_generate_with_static_cache": _passes(f"{_HOW}[static cache]"),
        "test_generate_with_quant_cache": _refused(
            "test_a_quantised_cache_is_refused", "`CacheConfig.kv_dtype` says how KV is kept"
        ),
        "test_generate_compile_model_forward_fullgraph": _passes(
            f"{_HOW}[compiled]", "taken, and nothing is compiled in the driver"
        ),
        "test_generate_compilation_all_outputs": _refused(
            "test_what_lies_in_the_layers_is_refused", "the layers are in another process"
        ),
        "test_generate_methods_with_logits_to_keep": _passes(
            "test_logits_to_keep_changes_no_tokens"
        ),
        "test_inherits_generation_mixin": _passes(
            "test_the_proxy_is_a_generation_mixin_and_hands_arguments_on"
        ),
        "test_prepare_inputs_for_generation_kwargs_forwards": _passes(
            "test_the_proxy_is_a_generation_mixin_and_hands_arguments_on"
        ),
        "test_eager_matches_sdpa_generate": _apart(_KERNELS),
        "test_eager_matches_fa2_generate": _apart(_KERNELS),
        "test_eager_matches_fa3_generate": _apart(_KERNELS),
        "test_eager_matches_fa4_generate": _apart(_KERNELS),
        "test_flash_attention_2_continue_generate_with_position_ids": _passes(
            "test_a_forward_goes_on_from_positions_that_are_given"
        ),
        "test_eager_padding_matches_padding_free_with_position_ids": _refused(
            "test_rows_packed_into_one_are_refused", _PACKED
        ),
        "test_sdpa_padding_matches_padding_free_with_position_ids": _refused(
            "test_rows_packed_into_one_are_refused", _PACKED
        ),
        "test_flash_attention_2, 3 and 4_padding_matches_padding_free_with_position_ids"
        " and_fa_kwargs (six tests)": _refused("test_rows_packed_into_one_are_refused", _PACKED),
        "test_custom_4d_attention_mask": _refused("test_rows_packed_into_one_are_refused", _PACKED),
        "test_forward_with_logits_to_keep": _passes(
            "test_a_forward_keeps_all_logits_or_those_of_the_last_columns"
        ),
        "test_generate_with_and_without_position_ids": _passes(
            "test_positions_may_be_given_or_left_out"
        ),
    },
    "UtilsFunctionsTest": {
        "test_speculative_sampling": _apart(_FUNCTION),
        "test_speculative_sampling_target_distribution": _apart(_FUNCTION),
    },
    "GenerationIntegrationTests": {
        "test_generation_config_defaults": _passes(
            "test_a_config_of_the_caller_comes_before_the_models_defaults"
        ),
        "test_generate_with_inputs_on_cpu": _passes(
            "test_input_ids_go_by_place_or_by_name_and_not_by_both",
            "the driver computes on the CPU; results come back to the inputs' device",
        ),
        "test_generation_config_deprecation": _passes(
            "test_settings_beside_a_config_are_warned_of_in_transformers_words"
        ),
        "test_inputs_embeds_warn_without_ids_for_token_based_logit_processors": _refused(
            _EMBEDS, _BY_IDS
        ),
        "test_beam_search_early_stop_heuristic": _passes(
            "test_beams_of_a_row_are_those_that_it_has_alone"
        ),
        "test_max_length_if_input_embeds": _refused(_EMBEDS, _BY_IDS),
        "test_min_length_if_input_embeds": _refused(_EMBEDS, _BY_IDS),
        "test_custom_stopping_criteria_overload_error": _passes(
            "test_rules_given_twice_are_warned_of_in_transformers_words"
        ),
        "test_custom_stopping_criteria": _passes(
            "test_a_criterion_and_the_length_end_a_row_whichever_comes_first"
        ),
        "test_stop_sequence_stopping_criteria": _passes(
            "test_one_end_token_or_several_end_a_row",
            "the pipeline's `stop_sequence` is an `eos_token_id`",
        ),
        "test_generate_non_nlp_input_ids_as_kwarg": _apart(_ENCODERS),
        "test_generate_input_values_as_encoder_kwarg": _apart(_ENCODERS),
        "test_generate_inputs_embeds_one_token": _refused(_EMBEDS, _BY_IDS),
        "test_green_red_watermark_generation": _passes("test_a_watermark_is_found_by_its_detector"),
        "test_synthid_text_watermark_generation_mean_expected_bias": _passes(
            "test_a_synthid_watermark_raises_its_mean"
        ),
        "test_TopH_example_integration": _feature("top_h"),
        "test_beam_search_example_integration": _apart(_ENCODERS),
        "test_cfg_mixin": _passes("test_guidance_with_a_negative_prompt_follows_its_formula"),
        "test_per_row_stopping_criteria": _passes(
            "test_criteria_end_rows_one_by_one_and_the_rest_is_padded"
        ),
        "test_batched_decoder_start_id": _apart(_ENCODERS),
        "test_decoder_start_id_from_config": _apart(_ENCODERS),
        "test_logits_processor_not_inplace": _passes(
            "test_scores_are_logits_unless_a_rule_changed_them"
        ),
        "test_eos_token_id_int_and_list_top_k_top_sampling": _passes(
            "test_one_end_token_or_several_end_a_row"
        ),
        "test_model_kwarg_encoder_signature_filtering": _apart(_ENCODERS),
        "test_default_max_length_warning": _passes("test_the_default_length_is_twenty_tokens_more"),
        "test_length_warning_assisted_generation": _passes(
            "test_lengths_of_drafted_outputs_are_kept"
        ),
        "test_generated_length_assisted_generation": _passes(
            "test_lengths_of_drafted_outputs_are_kept"
        ),
        "test_model_kwarg_assisted_decoding_decoder_only": _refused(
            "test_token_types_are_refused_unless_they_are_zeros", "a row has tokens alone"
        ),
        "test_assisted_decoding_num_assistant_tokens_heuristic_schedule": _passes(
            "test_the_number_of_drafts_follows_its_schedule"
        ),
        "test_assisted_decoding_num_assistant_tokens_heuristic_transient_schedule": _passes(
            "test_the_number_of_drafts_follows_its_schedule"
        ),
        "test_validate_assistant": _apart(_ENCODERS),
        "test_compare_unprocessed_logit_scores": _passes(
            "test_the_first_logits_are_those_of_a_forward"
        ),
        "test_return_unprocessed_logit_scores": _passes(
            "test_scores_are_logits_unless_a_rule_changed_them"
        ),
        "test_assisted_decoding_in_different_accelerator": _apart(_CARDS),
        "test_assisted_decoding_model_in_accelerator_assistant_in_cpu": _passes(
            _DRAFTS, "an assistant is a model of the driver's"
        ),
        "test_special_tokens_fall_back_to_model_default": _passes(_SPECIAL),
        "test_speculative_decoding_equals_regular_decoding": _passes(
            "test_an_assistant_with_a_tokenizer_of_its_own_drafts"
        ),
        "test_generate_with_static_cache_multi_accelerator": _apart(_CARDS),
        "test_generate_multi_accelerator_causal_mask": _apart(_CARDS),
        "test_init_static_cache_multi_accelerator": _apart(_CARDS),
        "test_static_cache_honors_cache_config_max_cache_len": _passes(
            f"{_HOW}[its length]", "taken; the pool has its own size"
        ),
        "test_prepare_inputs_for_generation_decoder_llm": _passes(
            "test_the_proxy_is_a_generation_mixin_and_hands_arguments_on",
            "the method is transformers' own; a static cache's mask is not made",
        ),
        "test_prepare_inputs_for_generation_encoder_decoder_llm": _apart(_ENCODERS),
        "test_assisted_generation_early_exit": _refused(
            "test_bad_values_are_refused_by_name_before_transformers_sees_them",
            "the layers are in another process; an assistant or prompt lookup drafts",
        ),
        "test_beam_search_advanced_stopping_criteria": _feature("stop_strings, beams"),
        "test_validate_generation_inputs": _passes("test_an_argument_that_nobody_takes_is_named"),
        "test_custom_logits_processor": _passes(
            "test_rules_given_twice_are_warned_of_in_transformers_words"
        ),
        "test_transition_scores_greedy_search": _passes(f"{_TRANSITIONS}[greedy]"),
        "test_transition_scores_greedy_search_normalized": _passes(f"{_TRANSITIONS}[greedy]"),
        "test_transition_scores_beam_search_encoder_decoder": _apart(_ENCODERS),
        "test_transition_scores_beam_search_encoder_decoder_with_eos": _apart(_ENCODERS),
        "test_transition_scores_beam_search_decoder_only": _passes(f"{_TRANSITIONS}[beams]"),
        "test_transition_scores_early_stopping": _passes(f"{_TRANSITIONS}[beams that end]"),
        "test_encoder_decoder_generate_attention_mask": _apart(_ENCODERS),
        "test_generate_input_ids_as_kwarg": _passes(
            "test_input_ids_go_by_place_or_by_name_and_not_by_both"
        ),
        "test_generate_input_ids_as_encoder_kwarg": _apart(_ENCODERS),
        "test_generate_inputs_and_encoder_kwargs": _passes(
            "test_input_ids_go_by_place_or_by_name_and_not_by_both"
        ),
        "test_generate_too_many_encoder_kwargs": _refused(_EMBEDS, _BY_IDS),
        "test_eos_token_id_int_and_list_greedy_search": _passes(
            "test_one_end_token_or_several_end_a_row"
        ),
        "test_generate_vision2text_conditioning": _apart(_ENCODERS),
        "test_load_generation_config_from_text_subconfig": _apart(_ENCODERS),
        "test_cache_device_map_with_vision_layer_device_map": _apart(_CARDS),
        "test_cpu_offload_doesnt_compile": _apart(_CARDS),
        "test_custom_generate_from_argument_in_generate": _passes(
            "test_a_loop_from_a_folder_runs_if_its_code_is_trusted",
            "from a folder; from the hub it is the same code",
        ),
        "test_custom_generate_from_model_repo_with_custom_generate_code": _apart(
            "a checkpoint's own `generate`: hand its folder over as `custom_generate`"
        ),
        "test_custom_generate_bad_requirements": _passes(
            "test_a_loop_from_a_folder_is_checked_for_what_it_needs"
        ),
        "test_custom_generate_requires_trust_remote_code": _passes(
            "test_a_loop_from_a_folder_runs_if_its_code_is_trusted"
        ),
        "test_custom_generate_local_directory": _passes(
            "test_a_loop_from_a_folder_runs_if_its_code_is_trusted"
        ),
        "test_custom_generate_local_directory_requires_trust_remote_code": _passes(
            "test_a_loop_from_a_folder_runs_if_its_code_is_trusted"
        ),
        "test_custom_generate_callable": _passes("test_a_callable_loop_gets_prepared_criteria"),
        "test_generate_can_restart_from_cache_and_new_tokens_only": _passes(
            "test_a_cache_goes_on_with_the_new_tokens_alone"
        ),
        "test_hub_gen_strategies": _refused(
            "test_loops_that_lie_on_the_hub_need_trust",
            "their code is on the hub since transformers 5: it runs with `trust_remote_code=True`,"
            " and no test here loads it; DoLa and contrastive search need hidden states",
        ),
        "test_model_generation_config_can_override_defaults": _passes(
            "test_the_models_own_settings_are_its_defaults"
        ),
    },
    "TokenHealingTestCase": {
        "test_prompts": _passes("test_healed_prompts_are_those_of_stock"),
        "test_generate_from_inputs_embeds_with_bos_token_id_is_none": _passes(
            _SPECIAL, "without a first token it is an error; embeddings are refused"
        ),
    },
    "TestAssistedCandidateGenerator...": {
        "...DifferentTokenizers, ...UpdateStrategy (eleven tests)": _apart(_FUNCTION),
    },
    "test_candidate_generator.py": {
        "TestAssistantToTargetTranslator, TestAssistantVocabTranslatorCache (eight tests)": _apart(
            _FUNCTION
        ),
        "TestDFlashTokenCandidateGenerator": _refused(
            "test_bad_values_are_refused_by_name_before_transformers_sees_them",
            "drafts from hidden states; the layers are in another process",
        ),
        "TestUniversalSpeculativeDecoding (five tests)": _passes(
            "test_an_assistant_with_a_tokenizer_of_its_own_drafts"
        ),
    },
    "test_logits_process.py": {
        "test_min_length_dist_processor": _feature("min_length"),
        "test_new_min_length_dist_processor": _feature("min_new_tokens"),
        "test_temperature_dist_warper": _feature("temperature"),
        "test_repetition_penalty_dist_process": _feature("repetition_penalty"),
        "test_encoder_repetition_penalty_dist_process": _feature("encoder_repetition_penalty"),
        "test_top_k_dist_warper": _feature("top_k"),
        "test_top_p_dist_warper": _feature("top_p"),
        "test_min_p_dist_warper": _feature("min_p"),
        "test_typical_dist_warper": _feature("typical_p"),
        "test_epsilon_dist_warper": _feature("epsilon_cutoff"),
        "test_eta_dist_warper": _feature("eta_cutoff"),
        "test_no_repeat_ngram_dist_processor": _feature("no_repeat_ngram_size"),
        "test_encoder_no_repeat_ngram_dist_processor": _feature("encoder_no_repeat_ngram_size"),
        "test_no_bad_words_dist_processor": _feature("bad_words_ids, of several tokens"),
        "test_bias_dist_processor": _feature("sequence_bias, of several tokens"),
        "test_processor_list": _feature("logits_processor, with a state"),
        "test_prefix_constrained_logits_processor": _feature("prefix_allowed_tokens_fn"),
        "test_hamming_diversity": _refused(
            "test_loops_that_lie_on_the_hub_need_trust", "its loop is on the hub"
        ),
        "test_forced_bos_token_logits_processor": _feature("forced_bos_token_id"),
        "test_forced_eos_token_logits_processor": _feature("forced_eos_token_id"),
        "test_remove_nan_inf_logits_processor": _feature("remove_invalid_values"),
        "test_exponential_decay_length_penalty": _feature("exponential_decay_length_penalty"),
        "test_normalization": _feature("renormalize_logits"),
        "test_classifier_free_guidance": _feature("negative_prompt_attention_mask"),
        "test_watermarking_processor": _feature("watermarking_config"),
        "test_synthidtext_watermarking_processor... (three tests)": _feature(
            "watermarking_config, SynthID"
        ),
        "test_early_stop_processor..., test_dia_... (of Bark and Dia)": _apart(_ENCODERS),
    },
    "test_stopping_criteria.py": {
        "test_list_criteria": _passes(
            "test_a_criterion_and_the_length_end_a_row_whichever_comes_first"
        ),
        "test_max_length_criteria": _feature("max_length"),
        "test_max_new_tokens_criteria": _feature("max_new_tokens"),
        "test_max_time_criteria": _feature("max_time"),
        "test_eos_token_criteria": _feature("eos_token_id, several"),
        "test_validate_stopping_criteria": _apart(_FUNCTION),
        "test_stop_string_criteria": _feature("stop_strings"),
        "test_stop_string_matching_positions": _apart(_FUNCTION),
        "test_stop_string_embedding_vecs": _apart(_FUNCTION),
        "test_single_letter_stop_string": _passes(
            "test_stop_strings_end_each_row_also_across_tokens"
        ),
        "test_criterias_per_row": _passes("test_stop_strings_end_each_row_also_across_tokens"),
        "test_criterias_per_row_batched": _passes(
            "test_criteria_end_rows_one_by_one_and_the_rest_is_padded"
        ),
    },
    "test_streamers.py": {
        "test_text_streamer_matches_non_streaming": _passes("test_a_text_streamer_prints_the_text"),
        "test_iterator_streamer_matches_non_streaming": _passes(
            "test_an_iterator_of_texts_gives_the_text"
        ),
        "test_text_streamer_skip_prompt": _passes("test_a_text_streamer_prints_the_text"),
        "test_text_streamer_decode_kwargs": _passes("test_a_text_streamer_decodes_as_it_is_told"),
        "test_iterator_streamer_timeout": _passes(
            "test_an_iterator_of_texts_times_out_while_a_forward_takes_long"
        ),
    },
}
