"""SmolLM2-135M in float32 through the adapter: tokens equal to stock transformers, in every tier.

Prompts of 1 to 1,100 tokens (1,500 with `scripts/test.sh --long`), cut from this project's own
texts, so that no two begin with the same token: nothing is reused before it was asked for. The
reference runs each alone and unpadded; the adapter gets them batched and padded. The counter of
reused tokens proves which tier served.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from litecache.adapter.kv_cache_adapter import KVCacheAdapter
from litecache.config import CacheConfig

# Whatever is found is loaded, however fast this machine computes it.
os.environ["LITECACHE_LOADS"] = "all"
ROOT = Path(__file__).resolve().parents[2]
NEW_TOKENS = 17  # past the end of a block, wherever a prompt ends
SHORT = (1, 2, 7, 15, 16, 17, 32, 40)
LONG = (
    (3, 5, 10, 20, 31, 33, 47, 48),
    (63, 64, 65, 80, 100, 127, 128, 129),
    (200, 255, 256, 300, 511, 1100),
)
if os.environ.get("LITECACHE_TEST_PROFILE") == "long":
    LONG = (*LONG[:2], (200, 255, 256, 300, 400, 511, 750, 1500))
THREADS = 2


@pytest.fixture(scope="module")
def model(smollm2_dir: Path) -> Iterator[Any]:
    threads_before = torch.get_num_threads()
    torch.set_num_threads(THREADS)
    model = AutoModelForCausalLM.from_pretrained(smollm2_dir, dtype=torch.float32)
    model.generation_config.eos_token_id = None
    yield model
    torch.set_num_threads(threads_before)


@pytest.fixture(scope="module")
def text_tokens(smollm2_dir: Path) -> list[int]:
    tokenizer = AutoTokenizer.from_pretrained(smollm2_dir)
    sources = ("examples/document.txt", "README.md", "pyproject.toml", "litecache/hashing.py")
    tokens: list[int] = []
    for name in sources:
        tokens += tokenizer((ROOT / name).read_text())["input_ids"]
    chat = [{"role": "user", "content": "Why is the sky blue?"}]
    return tokens + tokenizer(tokenizer.apply_chat_template(chat, tokenize=False))["input_ids"]


@pytest.fixture(scope="module")
def llm(
    smollm2_dir: Path, ray_local: None, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[KVCacheAdapter]:
    config = CacheConfig(
        num_blocks=640,
        device="cpu",
        dtype="float32",
        ram_bytes="600MB",
        storage_dir=str(tmp_path_factory.mktemp("smollm2")),
        storage_bytes="2GB",
        max_batch_tokens=512,
    )
    with KVCacheAdapter(str(smollm2_dir), cache_config=config, num_threads=THREADS) as adapter:
        yield adapter


def prompts_of(lengths: tuple[int, ...], tokens: list[int], number: int) -> list[list[int]]:
    """Cuts that begin with tokens of their own; `number` tells those of different tests apart."""
    places: dict[int, int] = {}
    for place, token in enumerate(tokens[:-1501]):
        places.setdefault(token, place)
    starts = list(places.values())[8 * number :: 32]
    return [tokens[start : start + n] for start, n in zip(starts, lengths, strict=False)]


def reference(model: Any, prompt: list[int]) -> list[int]:
    ids = torch.tensor([prompt])
    out = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=NEW_TOKENS,
        do_sample=False,
        pad_token_id=0,
    )
    return out[0, len(prompt) :].tolist()


def padded(prompts: list[list[int]], side: str) -> dict[str, torch.Tensor]:
    width = max(map(len, prompts))
    ids = torch.zeros((len(prompts), width), dtype=torch.int64)
    mask = torch.zeros_like(ids)
    for row, prompt in enumerate(prompts):
        span = slice(width - len(prompt), width) if side == "left" else slice(0, len(prompt))
        ids[row, span], mask[row, span] = torch.tensor(prompt), 1
    return {"input_ids": ids, "attention_mask": mask}


class Case:
    """A batch of prompts with what stock transformers says to each, asked tier by tier."""

    def __init__(self, llm: KVCacheAdapter, model: Any, prompts: list[list[int]]) -> None:
        self.llm, self.prompts = llm, prompts
        self.wanted = [reference(model, prompt) for prompt in prompts]
        self.blocks = sum(len(prompt) // 16 * 16 for prompt in prompts)

    def ask(self, side: str) -> list[dict[str, int]]:
        """Generate, compare, and tell per row what was reused."""
        out = self.llm.generate(
            **padded(self.prompts, side),
            max_new_tokens=NEW_TOKENS,
            eos_token_id=None,
            pad_token_id=0,
            do_sample=False,
            return_dict_in_generate=True,
        )
        width = max(map(len, self.prompts))
        assert [row[width:].tolist() for row in out.sequences] == self.wanted
        reused: list[dict[str, int]] = list(out.litecache.reused_tokens)
        return reused

    def from_every_tier(self) -> None:
        assert not any(self.ask("left")), "the cache was not cold"
        self.expect("gpu", "right")
        self.llm.clear("gpu")
        self.expect("ram", "left")
        self.llm.clear("gpu")
        self.llm.clear("ram")
        self.expect("disk", "right")

    def expect(self, tier: str, side: str) -> None:
        reused = sum(counts.get(tier, 0) for counts in self.ask(side))
        assert reused >= self.blocks, f"{reused} of {self.blocks} tokens came from {tier}"


@pytest.fixture(scope="module")
def short(llm: KVCacheAdapter, model: Any, text_tokens: list[int]) -> Case:
    return Case(llm, model, prompts_of(SHORT, text_tokens, 0))


@pytest.mark.slow
@pytest.mark.timeout(300, func_only=True)
def test_eight_short_prompts_cold_and_from_every_tier(short: Case) -> None:
    short.from_every_tier()


@pytest.mark.slow
@pytest.mark.timeout(900, func_only=True)
@pytest.mark.parametrize("number", range(len(LONG)))
def test_longer_prompts_cold_and_from_every_tier(
    llm: KVCacheAdapter, model: Any, text_tokens: list[int], number: int
) -> None:
    Case(llm, model, prompts_of(LONG[number], text_tokens, number + 1)).from_every_tier()


@pytest.mark.slow
@pytest.mark.timeout(300, func_only=True)
def test_the_turns_of_a_chat_say_what_stock_says_and_find_the_turns_before_them(
    llm: KVCacheAdapter, model: Any
) -> None:
    eos = llm.generation_config.eos_token_id
    session = llm.session("You answer in one sentence.", max_new_tokens=24, eos_token_id=eos)
    known: tuple[int, ...] = ()
    for words in ("Why is the sky blue?", "And at night?", "Thank you."):
        pieces = list(session.fork().send(words, stream=True))
        reply = session.send(words)
        assert "".join(pieces) == reply.text != ""
        tokens = session._state.transcript.tokens
        asked = tokens[: reply.usage.prompt_tokens]
        if not known:
            chat = llm.tokenizer.apply_chat_template(
                session.messages[:-1], add_generation_prompt=True
            )
            assert list(asked) == chat["input_ids"]
        assert asked[: len(known)] == known
        assert sum(reply.usage.cached_tokens.values()) >= (len(known) - 1) // 16 * 16
        ids = torch.tensor([asked])
        wanted = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=24,
            do_sample=False,
            pad_token_id=0,
            eos_token_id=eos,
        )
        assert wanted[0].tolist() == list(tokens)
        assert llm.tokenizer.decode(tokens) == llm.tokenizer.apply_chat_template(
            session.messages, tokenize=False
        ).removesuffix("<|im_end|>\n" if reply.finish_reason == "length" else "\n")
        known = tokens
