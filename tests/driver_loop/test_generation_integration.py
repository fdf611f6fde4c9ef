"""What transformers promises of whole calls of `generate`, over the proxy.

Its integration tests, and those of streamers, stopping criteria, processors, drafts and token
healing, hold for pretrained models; the same promises here on a random one, beside stock generate.
`hf_tests.py` says which test of transformers' each stands for.
"""

from __future__ import annotations

import copy
import logging
import queue
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from features import ALL, SAMPLED, RowsEnd, after, synthid
from letter_tokenizer import letter_tokenizer
from scene import Scene, tiny_scene
from stock_forward import StockForward
from tiny_models import VOCAB, assert_same, ragged, tiny_model
from transformers import (
    GenerationConfig,
    MaxLengthCriteria,
    MinLengthLogitsProcessor,
    TextIteratorStreamer,
    TextStreamer,
    WatermarkDetector,
    WatermarkingConfig,
)

from litecache.adapter.driver_loop import generate_in_driver
from litecache.adapter.proxy import ModelProxy
from litecache.errors import ConfigError

BATCH = ragged(12, 5, 9)
ONE = ragged(11, seed=3)
ENDLESS = {"eos_token_id": None, "pad_token_id": 0}


@pytest.fixture
def model() -> Iterator[Any]:
    """A model whose settings a test may change."""
    model = tiny_model()
    before = model.generation_config
    model.generation_config = copy.deepcopy(before)
    yield model
    model.generation_config = before


@pytest.fixture
def scene() -> Scene:
    return tiny_scene()


def with_defaults(call: dict[str, Any]) -> dict[str, Any]:
    """A row, and eight tokens unless the call says otherwise; None = whatever the model says."""
    call = {**ONE, "max_new_tokens": 8, **call}
    if call["max_new_tokens"] is None:
        del call["max_new_tokens"]
    return call


def ours(model: Any, given: GenerationConfig | None = None, **call: Any) -> Any:
    proxy = ModelProxy(model.config, model.generation_config, StockForward(model))
    call = with_defaults(call)
    options = {n: call.pop(n) for n in ("streamer", "tokenizer") if n in call}
    torch.manual_seed(4)
    return generate_in_driver(proxy, call.pop("input_ids"), given, call, **options)


def stock(model: Any, given: GenerationConfig | None = None, **call: Any) -> Any:
    torch.manual_seed(4)
    return model.generate(generation_config=given, **with_defaults(call))


@contextmanager
def words_of_transformers() -> Iterator[list[str]]:
    """What it logs, each once more even where it was said before."""
    from transformers.utils import logging as theirs

    theirs.warning_once.cache_clear()
    said: list[str] = []

    class Handler(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            said.append(record.getMessage())

    handler, logger = Handler(), logging.getLogger("transformers")
    logger.addHandler(handler)
    try:
        yield said
    finally:
        logger.removeHandler(handler)


def test_a_config_of_the_caller_comes_before_the_models_defaults(model: Any) -> None:
    model.generation_config.max_length = model.generation_config.min_length = 50
    given = GenerationConfig(max_length=20, min_length=0, do_sample=False, eos_token_id=96)
    out = ours(model, given, max_new_tokens=None)
    assert out.shape[1] <= 20
    assert torch.equal(out, stock(model, given, max_new_tokens=None))


def test_special_tokens_fall_back_on_the_models(model: Any) -> None:
    call = {"input_ids": None, "attention_mask": None}
    for token in (None, 50):
        given = GenerationConfig(bos_token_id=token)
        assert int(ours(model, given, **call)[0, 0]) == (token or 1)
        assert given.bos_token_id == token
    model.generation_config.bos_token_id = 60
    assert int(ours(model, GenerationConfig(), **call)[0, 0]) == 60
    model.generation_config.bos_token_id = model.config.bos_token_id = None
    with pytest.raises(ConfigError, match="bos_token_id"):
        ours(model, **call)
    model.config.bos_token_id = 1


def test_the_models_own_settings_are_its_defaults(model: Any) -> None:
    model.generation_config.num_beams, model.generation_config.max_new_tokens = 2, 5
    out = ours(model, max_new_tokens=None)
    assert out.shape[1] == 16
    assert torch.equal(out, stock(model, max_new_tokens=None))
    assert not torch.equal(out, stock(model, num_beams=1, max_new_tokens=None))


def test_the_default_length_is_twenty_tokens_more(model: Any) -> None:
    assert ours(model, max_new_tokens=None, **ENDLESS).shape[1] == 31
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert ours(model, max_new_tokens=None, max_length=20, **ENDLESS).shape[1] == 20


def test_settings_beside_a_config_are_warned_of_in_transformers_words(model: Any) -> None:
    with words_of_transformers() as said:
        ours(model, GenerationConfig(num_beams=2), do_sample=False)
    assert any("Passing `generation_config` together with" in each for each in said)


def test_rules_given_twice_are_warned_of_in_transformers_words(model: Any) -> None:
    twice = {
        "stopping criteria of type": {"stopping_criteria": [MaxLengthCriteria(max_length=14)]},
        "logits processor of type": {
            "logits_processor": [MinLengthLogitsProcessor(14, eos_token_id=2)],
            "min_length": 14,
        },
    }
    for words, call in twice.items():
        with words_of_transformers() as said:
            out = ours(model, **call)
        assert any(words in each and "also created in" in each for each in said)
        assert torch.equal(out, stock(model, **call))


def test_a_criterion_and_the_length_end_a_row_whichever_comes_first(model: Any) -> None:
    for most, width in ((20, 15), (13, 13)):
        call = {"stopping_criteria": [after(15)], "max_length": most, "max_new_tokens": None}
        assert ours(model, **call, **ENDLESS).shape == (1, width)


def test_criteria_end_rows_one_by_one_and_the_rest_is_padded(model: Any) -> None:
    call = {**BATCH, "stopping_criteria": [RowsEnd(14)], "eos_token_id": 96, "pad_token_id": 0}
    out = ours(model, **call)
    assert [int((row[12:] != 0).sum()) for row in out] == [2, 3, 4]
    assert torch.equal(out, stock(model, **call))


def test_stop_strings_end_each_row_also_across_tokens(model: Any, scene: Scene) -> None:
    free, tokenizer = ours(model, **BATCH, **ENDLESS), scene.tokenizer
    texts = [tokenizer.decode(row[12:]) for row in free]
    stops = [texts[0][1:5], texts[1][3:6]]
    rest = {**BATCH, "tokenizer": tokenizer, "eos_token_id": 96, "pad_token_id": 0}
    for settings in ({}, {"num_beams": 2}, {"do_sample": True}):
        call = {**rest, **settings, "stop_strings": stops}
        assert torch.equal(ours(model, **call), stock(model, **call))
    first = ours(model, **rest, stop_strings=stops)[0, 12:]
    text = tokenizer.decode(first[first != 0])
    assert stops[0] in text
    assert stops[0] not in tokenizer.decode(first[first != 0][:-1])


def test_one_end_token_or_several_end_a_row(model: Any) -> None:
    free = ours(model, **ENDLESS)
    for ends in (int(free[0, 13]), [int(free[0, 13]), 96], torch.tensor([96, int(free[0, 13])])):
        for call in ({}, {"do_sample": True, "top_p": 0.7, "top_k": 10, "temperature": 0.7}):
            call = {**call, "eos_token_id": ends, "pad_token_id": 0}
            assert torch.equal(ours(model, **call), stock(model, **call))
        assert ours(model, eos_token_id=ends, pad_token_id=0).shape[1] == 14


def test_scores_are_logits_unless_a_rule_changed_them(model: Any) -> None:
    plain = ours(model, **ALL)
    assert_same(plain.scores, plain.logits)
    for call in ({"do_sample": True, "temperature": 0.5}, {"bad_words_ids": [[0], [3], [4]]}):
        out = ours(model, **ALL, **call)
        pairs = zip(out.scores, out.logits, strict=True)
        assert all(not torch.equal(score, logit) for score, logit in pairs)
        assert torch.isfinite(torch.stack(out.logits)).all()


def test_the_first_logits_are_those_of_a_forward(model: Any) -> None:
    with torch.no_grad():
        expected = model(**ONE).logits[:, -1]
    out = ours(model, **ALL, do_sample=True, max_new_tokens=1)
    torch.testing.assert_close(out.logits[0], expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"num_beams": 4, "num_return_sequences": 2, "length_penalty": 0.0},
        {
            "num_beams": 4,
            "num_return_sequences": 3,
            "length_penalty": 0.0,
            "forced_eos_token_id": 9,
        },
    ],
    ids=["greedy", "beams", "beams that end"],
)
def test_scores_of_transitions_add_up(model: Any, settings: dict[str, Any]) -> None:
    call = {**BATCH, **ENDLESS, **settings}
    found = []
    for run in (ours, stock):
        out = run(model, **call, return_dict_in_generate=True, output_scores=True)
        beams = (out.beam_indices,) if "num_beams" in settings else (None,)
        scores = model.compute_transition_scores(
            out.sequences, out.scores, *beams, normalize_logits="num_beams" not in settings
        )
        found.append(scores)
        if "num_beams" in settings:
            torch.testing.assert_close(scores.sum(1), out.sequences_scores, atol=1e-4, rtol=1e-4)
    assert_same(*found)


def test_beams_of_a_row_are_those_that_it_has_alone(model: Any) -> None:
    call = {"num_beams": 5, "length_penalty": 2.0, "eos_token_id": [*range(3, 20)]}
    both = {name: torch.cat([tensor, tensor.flip(1)]) for name, tensor in ONE.items()}
    alone, beside = ours(model, **call), ours(model, **both, **call)
    assert torch.equal(beside[0, : alone.shape[1]], alone[0])
    assert torch.equal(beside, stock(model, **both, **call))


def test_input_ids_go_by_place_or_by_name_and_not_by_both(model: Any) -> None:
    proxy = ModelProxy(model.config, model.generation_config, StockForward(model))
    by_name = proxy.generate(input_ids=ONE["input_ids"], max_length=15)
    assert torch.equal(proxy.generate(ONE["input_ids"], max_length=15), by_name)
    with pytest.raises(ValueError, match="inputs"):
        proxy.generate(ONE["input_ids"], input_ids=ONE["input_ids"])


@pytest.mark.parametrize("name", ["do_samples", "foo"])
def test_an_argument_that_nobody_takes_is_named(model: Any, name: str) -> None:
    with pytest.raises(ConfigError, match=name):
        ours(model, **{name: True})


def test_token_types_are_refused_unless_they_are_zeros(model: Any) -> None:
    with pytest.raises(ConfigError, match="token_type_ids"):
        ours(model, token_type_ids=torch.ones_like(ONE["input_ids"]))


def test_lengths_of_drafted_outputs_are_kept(model: Any, scene: Scene) -> None:
    ends = [*range(3, VOCAB)]
    draft = {"assistant_model": scene.assistant, "eos_token_id": ends, "pad_token_id": 0}
    out = ours(model, **draft, min_new_tokens=10, max_new_tokens=20)
    assert 21 <= out.shape[1] <= 31
    assert ours(model, **draft, min_new_tokens=10, max_new_tokens=None).shape[1] >= 21
    assert ours(model, assistant_model=scene.assistant, max_new_tokens=7).shape[1] <= 18
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ours(model, **draft, min_new_tokens=10, max_length=25, max_new_tokens=None)


def test_an_assistant_beside_beams_has_nothing_to_do(model: Any, scene: Scene) -> None:
    call = {"assistant_model": scene.assistant, "num_beams": 3}
    assert torch.equal(ours(model, **call), stock(model, **call))


@pytest.mark.parametrize(("schedule", "then"), [("heuristic", 7), ("heuristic_transient", 5)])
def test_the_number_of_drafts_follows_its_schedule(model: Any, schedule: str, then: int) -> None:
    found = []
    for run in (stock, ours):
        assistant = copy.deepcopy(tiny_model())
        assistant.generation_config.num_assistant_tokens = 5
        assistant.generation_config.num_assistant_tokens_schedule = schedule
        assistant.generation_config.assistant_confidence_threshold = 0.0
        run(model, assistant_model=assistant, max_new_tokens=6, **ENDLESS)
        found.append(assistant.generation_config.num_assistant_tokens)
    assert found == [then, then]


def test_an_assistant_with_a_tokenizer_of_its_own_drafts(model: Any, scene: Scene) -> None:
    # not while sampling: two calls of stock generate with one seed differ there
    call = {
        **scene.cut,
        "assistant_model": tiny_model("gpt2", vocab=VOCAB + 20),
        "tokenizer": scene.tokenizer,
        "assistant_tokenizer": letter_tokenizer(VOCAB + 20),
        **ENDLESS,
    }
    assert torch.equal(ours(model, **call), stock(model, **call))
    assert torch.equal(ours(model, **call), ours(model, **scene.cut, **ENDLESS))


def test_a_watermark_is_found_by_its_detector(model: Any) -> None:
    marks = {"bias": 9.0, "seeding_scheme": "selfhash", "greenlist_ratio": 0.25}
    marks |= {"hashing_key": 15485863, "context_width": 1}
    call = {"max_new_tokens": 24, "repetition_penalty": 1.5, **ENDLESS}
    detector = WatermarkDetector(model.config, "cpu", marks)
    marked = ours(model, **call, watermarking_config=marks)
    assert torch.equal(ours(model, **call, watermarking_config=WatermarkingConfig(**marks)), marked)
    assert detector(marked[:, 11:]).tolist() == [True]
    assert detector(ours(model, **call)[:, 11:]).tolist() == [False]


@pytest.mark.slow
def test_a_synthid_watermark_raises_its_mean(model: Any) -> None:
    config = synthid(debug_mode=True)
    processor = config.construct_processor(VOCAB, "cpu")
    call = {**ragged(*[6] * 24), "max_new_tokens": 12, "use_cache": False}
    call |= {**SAMPLED, **ENDLESS}
    means = []
    for marks in ({"watermarking_config": config}, {}):
        out = ours(model, **call, **marks)
        means.append(float(processor.compute_g_values(out[:, 6:]).float().mean()))
    assert means[0] > means[1] + 0.02


def test_guidance_with_a_negative_prompt_follows_its_formula(model: Any) -> None:
    negative = ragged(4, seed=5)["input_ids"]
    plain = ours(model, **ALL, max_new_tokens=1).logits[0].log_softmax(-1)
    without = ours(model, **ALL, input_ids=negative, attention_mask=None, max_new_tokens=1)
    against = without.logits[0].log_softmax(-1)
    out = ours(model, **ALL, guidance_scale=1.5, negative_prompt_ids=negative, max_new_tokens=1)
    expected = against + 1.5 * (plain - against)
    torch.testing.assert_close(out.scores[0], expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("text", ["abcdea", "a", "abcdf", ""])
def test_healed_prompts_are_those_of_stock(model: Any, scene: Scene, text: str) -> None:
    ids = scene.tokenizer(text, return_tensors="pt")["input_ids"]
    proxy = ModelProxy(model.config, model.generation_config, StockForward(model))
    if not text:
        ids = torch.zeros((1, 0), dtype=torch.int64)
    healed = proxy.heal_tokens(ids.clone(), scene.tokenizer)
    assert torch.equal(healed, model.heal_tokens(ids.clone(), scene.tokenizer))


def write_loop(folder: Path) -> str:
    """A folder with a loop in it, as `custom_generate` takes it."""
    (folder / "custom_generate").mkdir()
    (folder / "custom_generate" / "generate.py").write_text(
        "from .helper import ANSWER\ndef generate(model, *args, **kwargs):\n    return ANSWER\n"
    )
    (folder / "custom_generate" / "helper.py").write_text("ANSWER = 'done'\n")
    return str(folder)


def test_a_loop_from_a_folder_runs_if_its_code_is_trusted(model: Any, tmp_path: Path) -> None:
    folder = write_loop(tmp_path)
    assert ours(model, custom_generate=folder, trust_remote_code=True) == "done"
    with pytest.raises(ConfigError, match="trust_remote_code"):
        ours(model, custom_generate=folder, trust_remote_code=False)


def test_a_loop_from_a_folder_is_checked_for_what_it_needs(model: Any, tmp_path: Path) -> None:
    folder = write_loop(tmp_path)
    (tmp_path / "custom_generate" / "requirements.txt").write_text("no-such-package>=9\n")
    with pytest.raises(ConfigError, match="Missing requirements"):
        ours(model, custom_generate=folder, trust_remote_code=True)


def test_a_callable_loop_gets_prepared_criteria(model: Any) -> None:
    def loop(model: Any, input_ids: torch.Tensor, stopping_criteria: Any, **kwargs: Any) -> str:
        assert stopping_criteria[0].max_length == input_ids.shape[1] + 3
        return "called"

    assert ours(model, custom_generate=loop, max_new_tokens=3) == "called"


@pytest.mark.parametrize(
    "settings",
    [
        {"dola_layers": "low"},
        {"penalty_alpha": 0.6, "top_k": 4},
        {"num_beams": 2, "num_beam_groups": 2, "diversity_penalty": 2.0},
        {"num_beams": 2, "force_words_ids": [[7, 8]]},
    ],
    ids=["DoLa", "contrastive", "groups of beams", "constrained beams"],
)
def test_loops_that_lie_on_the_hub_need_trust(model: Any, settings: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="trust_remote_code=True"):
        ours(model, **settings)


def text_of(model: Any, scene: Scene, new_only: bool = False) -> str:
    out = ours(model, **scene.cut, **ENDLESS)
    skipped = scene.cut["input_ids"].shape[1] if new_only else 0
    text: str = scene.tokenizer.decode(out[0, skipped:])
    return text


@pytest.mark.parametrize("skipped", [False, True])
def test_a_text_streamer_prints_the_text(
    model: Any, scene: Scene, capsys: pytest.CaptureFixture[str], skipped: bool
) -> None:
    expected = text_of(model, scene, skipped)
    capsys.readouterr()
    streamer = TextStreamer(scene.tokenizer, skip_prompt=skipped)
    ours(model, **scene.cut, **ENDLESS, streamer=streamer)
    assert capsys.readouterr().out == expected + "\n"


def test_a_text_streamer_decodes_as_it_is_told(
    model: Any, scene: Scene, capsys: pytest.CaptureFixture[str]
) -> None:
    ids = torch.cat([torch.zeros((1, 2), dtype=torch.int64), scene.cut["input_ids"]], dim=1)
    tokenizer = copy.deepcopy(scene.tokenizer)
    tokenizer.add_special_tokens({"pad_token": "<0>"})
    streamer = TextStreamer(tokenizer, skip_special_tokens=True)
    call = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "max_new_tokens": 2}
    out = ours(model, **call, streamer=streamer, **ENDLESS)
    text = tokenizer.decode(out[0], skip_special_tokens=True)
    assert capsys.readouterr().out == text + "\n"
    assert "<0>" not in text


def test_an_iterator_of_texts_gives_the_text(model: Any, scene: Scene) -> None:
    expected = text_of(model, scene)
    streamer = TextIteratorStreamer(scene.tokenizer)
    call = {**scene.cut, **ENDLESS, "streamer": streamer}
    thread = threading.Thread(target=ours, args=(model,), kwargs=call)
    thread.start()
    assert "".join(streamer) == expected
    thread.join()


def test_an_iterator_of_texts_times_out_while_a_forward_takes_long(
    model: Any, scene: Scene
) -> None:
    go = threading.Event()

    class Waiting(StockForward):
        def __call__(self, *args: Any) -> Any:
            go.wait()
            return super().__call__(*args)

    streamer = TextIteratorStreamer(scene.tokenizer, skip_prompt=True, timeout=0.01)
    proxy = ModelProxy(model.config, model.generation_config, Waiting(model))
    call = {**scene.cut, "max_new_tokens": 2}
    args = (proxy, call.pop("input_ids"), None, call)
    thread = threading.Thread(target=generate_in_driver, args=args, kwargs={"streamer": streamer})
    thread.start()
    with pytest.raises(queue.Empty):
        next(streamer)
    go.set()
    thread.join()
