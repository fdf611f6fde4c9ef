"""Rules and log-probabilities once more on a GPU, against transformers on the same GPU."""

from __future__ import annotations

import plan_driver
import pytest
from test_logit_rules import (  # noqa: F401 - the same tests, with this module's device
    free,
    test_greedy_tokens_equal_stock_generate_in_a_pool_that_preempts,
    test_logprobs_are_the_models_own_before_rules_and_temperature,
    test_rows_with_and_without_rules_share_a_batch_and_a_row_is_reused,
    test_sampling_with_rules_draws_what_transformers_keeps,
)

pytestmark = pytest.mark.gpu


@pytest.fixture(scope="module", autouse=True)
def _on_gpu():
    plan_driver.DEVICE = "cuda"
    yield
    plan_driver.DEVICE = "cpu"
