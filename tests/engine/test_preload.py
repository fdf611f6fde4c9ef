from __future__ import annotations

import subprocess
import sys

import pytest

from litecache.engine.loading.model_source import ModelSource, preload


@pytest.mark.parametrize(
    "source",
    [
        ModelSource(path="/nowhere/at/all"),
        ModelSource(config={"model_type": "no such family"}, weights="random"),
    ],
)
def test_nothing_is_refused_ahead_of_loading(source: ModelSource) -> None:
    preload(source, cuda=False)


def test_loading_finds_its_modules_imported() -> None:
    program = """
import sys
from litecache.engine.loading.model_source import ModelSource, preload
assert "torch" not in sys.modules
source = ModelSource(config={"model_type": "llama", "num_hidden_layers": 1, "hidden_size": 32,
    "intermediate_size": 32, "num_attention_heads": 2, "vocab_size": 64}, weights="random")
preload(source, cuda=False)
before = set(sys.modules)
from litecache.engine.engine import Engine
from litecache.engine.loading.model_loader import read_config
from transformers import AutoModelForCausalLM
AutoModelForCausalLM.from_config(read_config(source))
print(sorted(set(sys.modules) - before))
"""
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "[]"
