"""The probe catches models and attention functions that are wrong over paged KV."""

from __future__ import annotations

import pytest
import torch
from plan_driver import FAMILIES, tiny_model

from litecache.engine.kv_layout import KVLayout
from litecache.engine.loading import probe
from litecache.errors import ModelNotSupportedError
from litecache.kernels import reference


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_right_models_pass_with_a_tiny_error(family):
    loaded = tiny_model(family)
    assert probe.verify(loaded.model, probe.PAGED, loaded.specs, 16) < 1e-5
    assert loaded.model.config._attn_implementation == "litecache"


@pytest.mark.parametrize(
    "fault",
    [
        {"scale": 0.5},
        {"window": None},
        {"softcap": None},
        {"window": 15},
    ],
)
def test_a_wrong_attention_is_caught(monkeypatch, fault):
    loaded = tiny_model("gemma2")

    right = reference.ReferencePlan.attend

    def faulty(plan, layer):
        wrong = layer._replace(**fault)
        return right(reference.plan_attention(plan.metadata, wrong.geometry), wrong)

    monkeypatch.setattr(reference.ReferencePlan, "attend", faulty)
    with pytest.raises(ModelNotSupportedError, match=r"gemma2.*paged KV differ"):
        probe.verify(loaded.model, probe.PAGED, loaded.specs, 16)


def test_state_outside_the_pool_is_caught():
    loaded = tiny_model("llama")
    # A layer that mixes neighbours, as a convolution over the sequence does.
    loaded.model.model.layers[1].mlp.register_forward_hook(
        lambda module, args, out: out + args[0].roll(1, dims=1)
    )
    with pytest.raises(ModelNotSupportedError, match="paged KV differ"):
        probe.verify(loaded.model, probe.PAGED, loaded.specs, 16)


def test_a_layer_that_attends_twice_is_caught():
    model = tiny_model("llama").model
    layer = model.model.layers[1]
    layer.register_forward_pre_hook(
        lambda module, args, kwargs: layer.self_attn(args[0], **kwargs) and None, with_kwargs=True
    )
    with pytest.raises(ModelNotSupportedError, match=r"layers \[1\] call attention more than once"):
        probe.record_specs(model, "float32")


def test_a_layer_without_attention_is_caught():
    model = tiny_model("llama").model
    model.model.layers[2] = _Identity()
    with pytest.raises(ModelNotSupportedError, match=r"layers \[0, 1\] of 3"):
        probe.record_specs(model, "float32")


class _Identity(torch.nn.Module):
    def forward(self, hidden, **kwargs):
        return hidden


def test_recorded_specs_make_one_group_per_window():
    layout = KVLayout.from_specs(tiny_model("gemma2").specs, 16)
    assert [group.layers for group in layout.groups] == [(0, 2), (1,)]
