"""The runner's promises once more on a GPU: steps replay CUDA graphs, passes run Triton."""

from __future__ import annotations

import plan_driver
import pytest
import torch
from plan_driver import GREEDY, PlanDriver, random_prompt, tiny_model
from test_runner import *  # noqa: F403 - the same tests, with this module's device

from litecache.engine.running.batch import Batch
from litecache.engine.running.passes.fused_layers import TorchOps, TritonOps
from litecache.engine.running.sampler import sample
from litecache.types import SamplingParams

pytestmark = pytest.mark.gpu


@pytest.fixture(scope="module", autouse=True)
def _on_gpu():
    plan_driver.DEVICE = "cuda"
    yield
    plan_driver.DEVICE = "cpu"


@pytest.mark.parametrize("family", ["llama", "qwen3", "mistral"])
def test_bf16_layers_are_fused_and_keep_the_logits(family):
    # A pass that changes the logits is undone on load.
    loaded = tiny_model(family, passes="fused,merged,small", dtype="bfloat16")
    assert loaded.passes == ("fused", "small")


@pytest.mark.parametrize("passes", ["none", "fused,small"])
def test_graphs_draw_what_eager_steps_draw(passes, monkeypatch):
    loaded = tiny_model("qwen3", passes=passes)
    outputs = []
    for graphs in ("1", "0"):
        monkeypatch.setenv("LITECACHE_GRAPHS", graphs)
        driver = PlanDriver(loaded)
        driver.add(0, random_prompt(20, 1), GREEDY)
        driver.add(1, random_prompt(70, 2), SamplingParams(64, temperature=0.8, seed=4))
        driver.add(2, random_prompt(33, 3), SamplingParams(64, temperature=0.8, top_k=9, seed=5))
        tokens = [driver.step({0: 20, 1: 50, 2: 33}).result().tokens]
        tokens.append(driver.step({0: 1, 2: 1, 1: 20}).result().tokens)
        tokens += [driver.step({0: 1, 1: 1, 2: 1}).result().tokens for _ in range(12)]
        assert (driver.runner._graphs is not None) == (graphs == "1")
        outputs.append(tokens)
    assert outputs[0] == outputs[1]


@pytest.mark.parametrize("tokens", [0, 1, 2, 7, 16, 17, 33, 64, 65, 100])
@pytest.mark.parametrize(("width", "out"), [(64, 96), (1000, 520), (1024, 9000)])
def test_triton_ops_equal_torch_ops(tokens, width, out):
    generator = torch.Generator("cuda").manual_seed(tokens)

    def draw(*shape):
        return torch.randn(*shape, generator=generator, device="cuda", dtype=torch.bfloat16)

    x, weight, bias, gate = draw(tokens, width), draw(out, width), draw(out), draw(2 * out, width)
    residual, scale = draw(tokens, out), draw(width)
    fast, plain = TritonOps(torch.device("cuda")), TorchOps()
    pairs = [
        (fast.norm(x, scale, 1e-6), plain.norm(x, scale, 1e-6)),
        (fast.norm(x[None, None], scale, 1e-6), plain.norm(x[None, None], scale, 1e-6)),
        (fast.linear(x, weight, bias), plain.linear(x, weight, bias)),
        (
            fast.linear_add(residual.clone(), x, weight, None),
            plain.linear_add(residual, x, weight, None),
        ),
        (
            fast.linear_add(residual.clone(), x, weight, bias),
            plain.linear_add(residual, x, weight, bias),
        ),
        (fast.gated_linear(x, gate, None), plain.gated_linear(x, gate, None)),
    ]
    for got, expected in pairs:
        assert (got - expected).float().norm() <= 1e-2 * expected.float().norm()


def test_the_kernel_draws_what_torch_draws():
    from litecache.engine.running.passes.triton_sampler import sample_and_remember

    logits = torch.randn(64, 33_333, device="cuda") * 3
    logits[5, 33_332] = float("nan")
    temperature = torch.linspace(0, 2, 64, device="cuda")
    keys = torch.arange(-32, 32, device="cuda") << 40
    last = torch.zeros(80, dtype=torch.int64, device="cuda")
    rows = torch.arange(10, 74, device="cuda")
    struck = torch.full((64, 4), -1, dtype=torch.int32, device="cuda")
    best = logits.argmax(1)
    struck[7:9, 2], struck[7, 0] = best[7:9], 5
    got = sample_and_remember(logits, temperature, keys, rows, struck, last)
    logits[[7, 7, 8], [best[7], 5, best[8]]] = float("-inf")
    batch = Batch({"temperature": temperature, "keys": keys, "top_k": None, "top_p": None})
    expected = sample(logits.clone(), batch)
    # Logarithms differ in the last bit between the two: a tie may fall either way.
    assert (got == expected).sum() >= 63
    assert got[5] == -1
    assert torch.equal(last[10:74], got.clamp(min=0))
