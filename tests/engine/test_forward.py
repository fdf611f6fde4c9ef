"""Logits that a request asks for are the model's, whatever was cached before."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from engine_harness import Harness, family_source
from plan_driver import VOCAB, random_prompt, stock_model

from litecache.engine.scheduling import plan_builder
from litecache.errors import ConfigError
from litecache.types import Request, SamplingParams

FAMILIES = ["llama", "gemma2", "gpt2"]


def stock_logits(family: str, prompt: tuple[int, ...]) -> torch.Tensor:
    model = stock_model(family, 0, "cpu")
    with torch.inference_mode():
        return model(torch.tensor([prompt]), use_cache=False).logits[0]


def assert_stock(family: str, prompt: tuple[int, ...], logits: torch.Tensor) -> None:
    expected = stock_logits(family, prompt)[-len(logits) :]
    torch.testing.assert_close(logits, expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_are_stocks_cold_and_warm_for_any_number_of_positions(
    family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(plan_builder, "MAX_STEP_LOGITS", 16)
    prompts = [random_prompt(length, seed) for seed, length in enumerate((1, 16, 33, 90))]
    with Harness(family_source(family), max_batch_tokens=32) as harness:
        for wanted in ([len(prompt) for prompt in prompts], [1] * 4, [1, 16, 20, 33]):
            for prompt, logits in zip(prompts, harness.forward(prompts, wanted), strict=True):
                assert_stock(family, prompt, logits)
        harness.check()


@pytest.mark.parametrize("family", FAMILIES)
def test_rows_that_go_on_from_a_forward_compute_their_last_token_alone(family: str) -> None:
    prompt = random_prompt(37, 1)
    with Harness(family_source(family)) as harness:
        harness.forward([prompt], [1])
        for _ in range(20):
            rows = [(*prompt, token) for token in (3, 4, 5)]
            for row, logits in zip(rows, harness.forward(rows, [1] * 3), strict=True):
                assert_stock(family, row, logits)
            assert [sum(reused.values()) for reused in harness.reused] == [len(prompt)] * 3
            prompt = rows[1]
        harness.check()


def test_logits_after_tokens_of_a_generation_and_in_a_salt_of_their_own() -> None:
    prompt = random_prompt(40, 2)
    with Harness(family_source("llama")) as harness:
        (tokens,) = harness.run([prompt], 20)
        row = (*prompt, *tokens)
        (logits,) = harness.forward([row], [21])
        assert logits[:-1].argmax(-1).tolist() == tokens
        assert sum(harness.reused[0].values()) == 32 + 7
        harness.forward([row], [1], salt="other")
        assert not harness.reused[0]


@pytest.mark.parametrize("top", [0, 3])
def test_logprobs_of_a_prompts_tokens_are_those_of_its_logits(top: int) -> None:
    prompt = random_prompt(50, 3)
    with Harness(family_source("llama"), max_batch_tokens=16) as harness:
        sampling = SamplingParams(0, logprobs=top)
        harness.serve([Request("", "c", prompt, sampling, logits=30)])
        scores = stock_logits("llama", prompt)[-30:].log_softmax(-1)
        following = [*prompt[-29:], int(scores[-1].argmax())]
        told = harness.logprobs[0]
        assert [len(each.top) for each in told] == [top] * 30
        found = np.array([each.logprob for each in told])
        assert found == pytest.approx(scores[range(30), following].numpy(), abs=1e-4)
        for each, row in zip(told, scores, strict=True):
            assert [token for token, _ in each.top] == row.topk(top).indices.tolist()


def test_forwards_from_the_tiers_and_beside_decodes_are_right(tmp_path) -> None:
    prompt, other = random_prompt(70, 4), random_prompt(20, 5)
    with Harness(family_source("llama"), folders=[tmp_path]) as harness:
        harness.forward([prompt], [1])
        harness.empty("gpu", "ram")
        (logits,) = harness.forward([prompt], [5])
        assert harness.reused[0] == {"disk": 64}
        assert_stock("llama", prompt, logits)
        requests = [
            Request("", "c", other, SamplingParams(30)),
            Request("", "c", prompt, SamplingParams(0), logits=70),
        ]
        tokens = harness.serve(requests)[0]
        assert (
            tokens
            == stock_model("llama", 0, "cpu")
            .generate(torch.tensor([other]), max_new_tokens=30, do_sample=False, pad_token_id=0)[
                0, 20:
            ]
            .tolist()
        )
        told = torch.frombuffer(bytearray(harness.logits[1]), dtype=torch.float32).view(70, VOCAB)
        assert_stock("llama", prompt, told)
        harness.check()


@pytest.mark.parametrize(
    ("field", "fields"),
    [
        ("logits", {"logits": 6}),
        ("logits", {"logits": -1}),
        ("logits", {"logits": True}),
        ("max_new_tokens", {"logits": 2, "sampling": SamplingParams(1)}),
        ("num_resumed_tokens", {"logits": 2, "num_resumed_tokens": 1}),
    ],
)
def test_what_no_forward_can_be_is_refused(field: str, fields: dict) -> None:
    with Harness(family_source("llama")) as harness:
        request = Request(
            **{
                "request_id": "r",
                "client_id": "c",
                "prompt": (1, 2, 3, 4, 5),
                "sampling": SamplingParams(0),
                **fields,
            }
        )
        with pytest.raises(ConfigError) as error:
            harness.engine.submit([request])
        assert error.value.field == field
