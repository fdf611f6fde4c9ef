"""A model with inputs and tokens of its own, which the features of `generate` are tried on."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import torch
from letter_tokenizer import letter_tokenizer
from tiny_models import VOCAB, ragged, tiny_model
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

Inputs = dict[str, torch.Tensor]


@dataclass(frozen=True, eq=False)
class Scene:
    """What features are tried on.

    Attributes:
        model: stock, in float32.
        assistant: a smaller one that is often wrong.
        tokenizer: of both.
        batch: three rows of unequal length, padded on the left.
        one: a row.
        echo: a row that repeats itself.
        word: two rows of one token.
        cut: a row that ends within a word.
        negative: three rows of unequal length.
        new_tokens: of every call that does not say.
    """

    model: PreTrainedModel
    assistant: PreTrainedModel
    tokenizer: Any
    batch: Inputs
    one: Inputs
    echo: Inputs
    word: Inputs
    cut: Inputs
    negative: Inputs
    new_tokens: int

    @property
    def bare(self) -> Inputs:
        """The batch without its mask."""
        return {"input_ids": self.batch["input_ids"]}

    @property
    def width(self) -> int:
        """Of the batch."""
        return self.batch["input_ids"].shape[1]

    @functools.cached_property
    def _free(self) -> tuple[torch.Tensor, torch.Tensor]:
        """The batch's new tokens, greedy, `[3, new]`, and the three likeliest in each place."""
        out: Any = self.model.generate(
            **self.batch,
            max_new_tokens=self.new_tokens,
            do_sample=False,
            eos_token_id=None,
            pad_token_id=0,
            output_logits=True,
            return_dict_in_generate=True,
        )
        ranked = torch.stack(out.logits, dim=1).topk(3).indices
        return out.sequences[:, self.width :], ranked

    @property
    def free(self) -> list[list[int]]:
        """The batch's new tokens, greedy and without end."""
        return self._free[0].tolist()

    @property
    def likely(self) -> list[int]:
        """Tokens that a greedy call takes."""
        return sorted({token for row in self.free for token in row})

    @property
    def ends(self) -> list[int]:
        """Tokens that end the rows at different steps, and beams early."""
        going_on = {self.free[0][0], *self.free[1][:2], *self.free[2]}
        others = self._free[1][:, 1:, 1:].flatten().tolist()
        return sorted({*others, self.free[0][1], self.free[1][2]} - going_on)

    @property
    def many_ends(self) -> list[int]:
        """Tokens that end several beams of each row early."""
        firsts = {row[0] for row in self.free}
        return sorted({*self._free[1][:, 1:].flatten().tolist()} - firsts)


@functools.cache
def tiny_scene() -> Scene:
    """A random Llama of two layers."""
    one = ragged(11, seed=3)
    tokenizer = letter_tokenizer(VOCAB)
    tokenizer.pad_token = tokenizer.bos_token = "<0>"
    return Scene(
        tiny_model(),
        tiny_model(layers=1),
        tokenizer,
        batch=ragged(12, 5, 9),
        one=one,
        echo={name: tensor.repeat(1, 3) for name, tensor in one.items()},
        word=ragged(1, 1),
        cut=dict(tokenizer("abcdea", return_tensors="pt", return_token_type_ids=False)),
        negative=ragged(6, 3, 5, seed=8),
        new_tokens=9,
    )


def first_layers(folder: str, layers: int) -> PreTrainedModel:
    """So many layers of the model in a folder, with its embeddings."""
    config = AutoConfig.from_pretrained(folder)
    config = type(config).from_dict({**config.to_dict(), "num_hidden_layers": layers})
    return AutoModelForCausalLM.from_pretrained(folder, config=config, dtype=torch.float32).eval()


def smollm2_scene(folder: str) -> Scene:
    """SmolLM2 in a folder, or its first layers, of which the first ones are an assistant."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    assistant = first_layers(folder, 3)
    tokenizer = AutoTokenizer.from_pretrained(folder, padding_side="left")

    def rows(*texts: str) -> Inputs:
        found = tokenizer(list(texts), return_tensors="pt", padding=True)
        return {name: found[name] for name in ("input_ids", "attention_mask")}

    return Scene(
        model,
        assistant,
        tokenizer,
        batch=rows("The capital of France is", "Two and two are", "one, two, one, two, one,"),
        one=rows("The quick brown fox jumps over"),
        echo=rows("a b c d e f g a b c d e f g a b c"),
        word=rows("The", "One"),
        cut=rows("The quick brown fox jum"),
        negative=rows("Berlin is a city in", "Nothing", "three, four"),
        new_tokens=4,
    )
