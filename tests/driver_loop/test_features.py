"""Each thing that transformers' `generate` can do, over a proxy, against stock `generate`."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from features import FEATURES
from stock_forward import StockForward
from tiny_models import assert_same, tiny_model

from litecache.adapter.driver_loop import generate_in_driver
from litecache.adapter.proxy import ModelProxy


@pytest.fixture(scope="module")
def forward() -> StockForward:
    return StockForward(tiny_model())


def stock(inputs: dict[str, torch.Tensor], **settings: Any) -> tuple[Any, torch.Tensor]:
    """What stock generate gives from a seed, and torch's random state after it."""
    torch.manual_seed(17)
    return tiny_model().generate(
        **inputs, **{"max_new_tokens": 9, **settings}
    ), torch.get_rng_state()


def ours(forward: Any, inputs: dict[str, torch.Tensor], **settings: Any) -> Any:
    model = tiny_model()
    proxy = ModelProxy(model.config, model.generation_config, forward)
    given = settings.pop("generation_config", None)
    others = {**inputs, "max_new_tokens": 9, **settings}
    return generate_in_driver(proxy, others.pop("input_ids"), given, others)


@pytest.mark.parametrize("name", FEATURES)
def test_a_feature_gives_what_stock_generate_gives(forward: StockForward, name: str) -> None:
    inputs, settings, effective = FEATURES[name]
    expected, random_state = stock(inputs, **settings())
    torch.manual_seed(17)
    assert_same(ours(forward, inputs, **settings()), expected)
    assert torch.equal(torch.get_rng_state(), random_state)
    if effective is not None:
        without = {key: value for key, value in settings().items() if key not in effective}
        plain, _ = stock(inputs, **without)
        assert not equal_results(plain, expected), "this value changes nothing"


def equal_results(one: Any, other: Any) -> bool:
    try:
        assert_same(one, other)
    except AssertionError:
        return False
    return True
