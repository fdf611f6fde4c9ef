"""What programs read on the model object that they are given, when that object is an adapter.

`transformers.pipeline`, evaluation harnesses and most programs written for `AutoModelForCausalLM`
ask their model where its inputs belong, which dtype it has and whether it can generate; some move
or freeze it first. What is true of the model in the actors is answered, what changes nothing is
done, and what an adapter cannot do is refused with the way that leads there.
"""

from __future__ import annotations

import dataclasses
import inspect
from typing import TYPE_CHECKING, Any, NoReturn

import torch
from transformers import AutoModelForCausalLM, GenerationMixin, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from litecache.adapter.driver import Driver
from litecache.config import CacheConfig
from litecache.errors import ConfigError, outline

if TYPE_CHECKING:
    from typing_extensions import Self

# By class names the text-generation pipeline tells which models suit it.
MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.setdefault("litecache", "KVCacheAdapter")

# Arguments of transformers' `from_pretrained` about how weights get into memory, or about what the
# engine has of its own: they change no token.
_PASSED_OVER = frozenset(
    {"attn_implementation", "low_cpu_mem_usage", "use_safetensors", "use_cache", "offload_folder"}
)


class ModelSurface(Driver):
    """Attributes and methods of a `PreTrainedModel` in eval mode, without its weights.

    Attributes:
        training: always False.
        main_input_name, input_modalities, output_modalities, framework: as of a language model.
    """

    training = False
    main_input_name = "input_ids"
    input_modalities = "text"
    output_modalities = ("text",)
    framework = "pt"
    # of a result's scores, without the model
    compute_transition_scores = GenerationMixin.compute_transition_scores

    @classmethod
    def from_pretrained(
        cls,
        name: Any,
        *,
        dtype: Any = None,
        torch_dtype: Any = None,
        device_map: Any = None,
        cache_config: CacheConfig | None = None,
        **kwargs: Any,
    ) -> Self:
        """An adapter by the arguments that programs give to `AutoModelForCausalLM`'s.

        Such a program needs one other line:
        `from litecache import KVCacheAdapter as AutoModelForCausalLM`.

        Args:
            name: what the adapter takes as its `model`.
            dtype, torch_dtype: of weights and KV, torch's or its name; None and "auto" = the
                model's.
            device_map: a device, for the whole model; None and "auto" = a GPU if there is one.
            cache_config: further settings.
            **kwargs: the adapter's own; `attn_implementation`, `low_cpu_mem_usage` and their like
                change nothing.

        Raises:
            ConfigError: an argument of transformers' that an adapter does not have.
            LiteCacheError: as when an adapter is made.
        """
        own = inspect.signature(cls.__init__).parameters
        given = {key: value for key, value in kwargs.items() if key not in _PASSED_OVER}
        for key, value in given.items():
            if key not in own:
                valid = (
                    "left out: load a module with it by transformers, and give that to the adapter"
                )
                raise ConfigError(key, outline(value), valid)
        fields: dict[str, Any] = {}
        chosen = torch_dtype if dtype is None else dtype
        if chosen not in (None, "auto"):
            fields["dtype"] = chosen
        place = device_map[""] if isinstance(device_map, dict) and "" in device_map else device_map
        if isinstance(place, dict) or place in ("balanced", "balanced_low_0", "sequential"):
            raise ConfigError("device_map", outline(device_map), "one device, None or 'auto'")
        if place not in (None, "auto"):
            fields["device"] = f"cuda:{place}" if isinstance(place, int) else place
        if fields:
            cache_config = dataclasses.replace(cache_config or CacheConfig(), **fields)
        made: Any = cls
        adapter: Self = made(name, cache_config=cache_config, **given)
        return adapter

    @property
    def device(self) -> torch.device:
        """Where inputs are taken without a copy: the CPU. Those on other devices are taken, too."""
        return torch.device("cpu")

    @property
    def dtype(self) -> torch.dtype:
        """Of the weights in the actors."""
        dtype: torch.dtype = getattr(torch, self.info.dtype)
        return dtype

    @property
    def name_or_path(self) -> str:
        """What the model was loaded by, or the class of the module that was given."""
        return self._source.name

    def can_generate(self) -> bool:
        """Yes."""
        return True

    def num_parameters(self, only_trainable: bool = False, exclude_embeddings: bool = False) -> int:
        """Number of weights, tied ones once; none of them is trainable here."""
        if only_trainable:
            return 0
        with torch.device("meta"):
            plain = AutoModelForCausalLM.from_config(
                self.config, trust_remote_code=self._source.trust_remote_code
            )
        return int(plain.num_parameters(exclude_embeddings=exclude_embeddings))

    def eval(self) -> Self:
        """Nothing: it always is in eval mode."""
        return self

    def train(self, mode: bool = True) -> Self:
        """Nothing, with `mode=False`.

        Raises:
            ConfigError: the model is to be trained.
        """
        if mode:
            raise ConfigError("mode", mode, "False: train the module itself, then make an adapter")
        return self

    def to(self, *args: Any, **kwargs: Any) -> Self:
        """Nothing: inputs are taken from any device, and outputs come back on theirs.

        Raises:
            ConfigError: another dtype is asked for.
        """
        for value in (*args, *kwargs.values()):
            dtype = value.dtype if isinstance(value, torch.Tensor) else value
            if isinstance(dtype, torch.dtype) and dtype is not self.dtype:
                name = str(dtype).removeprefix("torch.")
                valid = f"{self.dtype}, or CacheConfig(dtype={name!r}) when the adapter is made"
                raise ConfigError("dtype", dtype, valid)
        return self

    def cpu(self) -> Self:
        """Nothing, like `to`."""
        return self

    def cuda(self, device: Any = None) -> Self:
        """Nothing, like `to`."""
        return self

    def half(self) -> Self:
        """As `to(torch.float16)`."""
        return self.to(torch.float16)

    def bfloat16(self) -> Self:
        """As `to(torch.bfloat16)`."""
        return self.to(torch.bfloat16)

    def float(self) -> Self:
        """As `to(torch.float32)`."""
        return self.to(torch.float32)

    def requires_grad_(self, requires_grad: bool = True) -> Self:
        """Nothing, with `requires_grad=False`.

        Raises:
            ConfigError: gradients are asked for.
        """
        if requires_grad:
            raise ConfigError("requires_grad", requires_grad, "False: there are no gradients here")
        return self

    def tie_weights(self, *args: Any, **kwargs: Any) -> None:
        """Nothing: weights are tied where they were."""

    def resize_token_embeddings(
        self, new_num_tokens: int | None = None, *args: Any, **kwargs: Any
    ) -> None:
        """Nothing, where the vocabulary has that size already.

        Raises:
            ConfigError: it has another.
        """
        if new_num_tokens not in (None, self.info.vocab_size):
            valid = f"{self.info.vocab_size}: resize the module, and make an adapter of that"
            raise ConfigError("new_num_tokens", new_num_tokens, valid)

    def __getattr__(self, name: str) -> NoReturn:
        """Say of a model's attributes why they are not here."""
        why = ""
        if not name.startswith("__") and hasattr(PreTrainedModel, name):
            why = ": the weights are in the actors, and a module with them is not in this process"
        raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}{why}")
