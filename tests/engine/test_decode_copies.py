"""Decodes that keep their gathered KV give the tokens of those that gather it anew."""

from __future__ import annotations

import random

import pytest
import torch
from plan_driver import GREEDY, PlanDriver, random_prompt, stock_generate, tiny_model

from litecache.engine.scheduling.orders import NewRow
from litecache.kernels import decode_copies
from litecache.kernels.decode_copies import DecodeCopies


@pytest.fixture(params=["llama", "gemma2", "mistral", "gpt2"])
def loaded(request):
    return tiny_model(request.param)


def test_a_batch_that_grows_and_shrinks_keeps_the_tokens_of_stock(loaded, monkeypatch):
    monkeypatch.setattr(decode_copies, "HEADROOM_TOKENS", 7)
    rng = random.Random(0)
    prompts = [random_prompt(length, seed) for seed, length in enumerate((5, 12, 12, 17))]
    wanted = [stock_generate(loaded, prompt, 40) for prompt in prompts]
    driver = PlanDriver(loaded)
    got = [[], [], [], []]
    for row, prompt in enumerate(prompts):
        driver.add(row, prompt)
        got[row] += driver.step({row: len(prompt)}).result().tokens
    extended = 0
    original = DecodeCopies.extend

    def extend(self, *arguments):
        nonlocal extended
        found = original(self, *arguments)
        extended += found is not None
        return found

    monkeypatch.setattr(DecodeCopies, "extend", extend)
    while min(map(len, got)) < 40:
        rows = [r for r in rng.sample(range(4), rng.choice((2, 3, 4))) if len(got[r]) < 40]
        for _ in range(rng.randrange(1, 12)):
            rows = [r for r in rows if len(got[r]) < 40]
            if rows:
                # The scheduler's order of running rows is stable.
                tokens = driver.step(dict.fromkeys(sorted(rows), 1)).result().tokens
                for row, token in zip(sorted(rows), tokens, strict=True):
                    got[row].append(token)
    assert got == wanted
    if loaded.model.config.model_type == "gemma2":
        assert not extended  # it caps its scores, and SDPA cannot
    else:
        assert extended > 10


def test_a_request_that_takes_over_row_and_blocks_does_not_meet_the_old_copy():
    loaded = tiny_model("llama")
    first, other, stays = (random_prompt(n, n) for n in (20, 29, 33))
    driver = PlanDriver(loaded)
    for row, prompt in ((0, stays), (1, first), (2, other[:28])):
        driver.add(row, prompt)
        driver.step({row: len(prompt)})
    for _ in range(8):
        driver.step({0: 1, 1: 1})
    assert driver.runner._decode_copies.num_bytes > 0
    assert driver.rows[1].computed == 28
    # As after a full hit whose last block was copied: its KV lies in the blocks of the old owner.
    mine, theirs = driver.rows[1].blocks, driver.rows[2].blocks
    for pool, new, source in zip(driver.pools, mine, theirs, strict=True):
        pool.buffer[new] = pool.buffer[source]
    driver._new.append(NewRow(1, tuple(other), 29, GREEDY))
    driver.rows[1] = type(driver.rows[1])(29, 28, mine)
    token = driver.step({0: 1, 1: 1}).result().tokens[1]
    assert [token] == stock_generate(loaded, other, 1)


def test_copies_stay_within_their_bound_and_are_given_up_when_the_batch_is():
    key = torch.ones(2, 1, 4)
    keys = torch.ones(1, 2, 10, 4)
    bytes_each = 2 * 2 * (9 + 256) * 4 * 4
    copies = DecodeCopies(max_bytes=2 * bytes_each)
    for _ in range(2):
        copies.begin_step()
        for layer in range(3):
            copies.offer(layer, (1, 2), (9, 9), keys, keys)
    assert copies.num_bytes == 2 * bytes_each
    copies.begin_step()
    found = [copies.extend(layer, (1, 2), (10, 10), key, key) for layer in range(3)]
    assert [f is not None for f in found] == [True, True, False]
    copies.begin_step()
    assert copies.extend(0, (1, 2), (12, 12), key, key) is None, "a token was skipped"
    copies.begin_step()
    assert copies.num_bytes == 0
