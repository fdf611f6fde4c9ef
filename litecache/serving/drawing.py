"""From a request's fields to the adapter's arguments, and to rows that draw.

Defaults are the model's own `generation_config`, where it has one, then OpenAI's: temperature 1,
and no filter.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

from litecache.adapter.generation import token_ids
from litecache.serving.answers import Answer
from litecache.serving.forms import FormSpec
from litecache.serving.keys import Tenant
from litecache.serving.reader import Reader
from litecache.serving.schemas import Drawing, refused
from litecache.serving.service import ModelService

_GREEDY_BELOW = 1e-5


def draw_settings(
    body: Drawing, defaults: Any, max_tokens: int, logprobs: int | None
) -> dict[str, Any]:
    """Arguments of `KVCacheAdapter.submit` that say how tokens are drawn.

    Args:
        body: the request.
        defaults: the model's `generation_config`.
        max_tokens: of each answer.
        logprobs: also of so many of the likeliest tokens; None = of none.
    """

    def chosen(name: str, neutral: float) -> Any:
        given = getattr(body, name)
        value = given if given is not None else getattr(defaults, name, None)
        return neutral if value is None else value

    temperature = chosen("temperature", 1.0)
    settings: dict[str, Any] = {
        "max_new_tokens": max_tokens,
        "do_sample": temperature >= _GREEDY_BELOW,
        "logprobs": logprobs,
        "stop_token_ids": body.stop_token_ids or None,
        "presence_penalty": body.presence_penalty,
        "frequency_penalty": body.frequency_penalty,
        "repetition_penalty": body.repetition_penalty,
        "min_new_tokens": body.min_tokens,
    }
    if settings["do_sample"]:
        filters = {"top_k": max(0, chosen("top_k", 0)), "top_p": chosen("top_p", 1.0)}
        settings |= {"temperature": temperature, **filters, "min_p": chosen("min_p", 0.0)}
    if body.logit_bias:
        settings["logit_bias"] = {int(token): bias for token, bias in body.logit_bias.items()}
    settings = {name: value for name, value in settings.items() if value is not None}
    if body.ignore_eos:
        settings["eos_token_id"] = []
    return settings


def seed_of(body: Drawing) -> int | None:
    """As the engine takes it."""
    return None if body.seed is None else body.seed & (2**63 - 1)


def ends_of(settings: Mapping[str, Any], defaults: Any) -> Collection[int]:
    """Tokens that end an answer and are no part of its text."""
    given = "eos_token_id" in settings
    fields = settings if given else {"eos_token_id": getattr(defaults, "eos_token_id", None)}
    return frozenset((*token_ids("eos_token_id", fields), *settings.get("stop_token_ids", ())))


async def open_reader(
    service: ModelService,
    tenant: Tenant,
    body: Drawing,
    prompts: Sequence[Sequence[int]],
    *,
    max_tokens: int,
    logprobs: int | None,
    skip_special_tokens: bool,
    form: FormSpec | None = None,
) -> Reader:
    """Wait for a turn, then start all answers of a request.

    Args:
        service: of the model.
        tenant: who asks.
        body: the request.
        prompts: token ids.
        max_tokens: of each answer.
        logprobs: as in `draw_settings`.
        skip_special_tokens: leave them out of the text.
        form: of all answers; None = the request's own, if it has one.

    Raises:
        ApiError: the queue is full, or a field is wrong.
        LiteCacheError: a field is wrong, or the engine is not there.
    """
    llm = service.llm
    if tenant.salt and (body.priority or 0) < 0:
        # or a key would take what is another one's share
        raise refused("priority", "0 or more: a key cannot put itself before others")
    settings = draw_settings(body, llm.generation_config, max_tokens, logprobs)
    samples, size = body.samples, body.samples * len(prompts)
    silent = ends_of(settings, llm.generation_config)
    use = service.cache_use(body, tenant)
    leave = await service.admission.enter(tenant.name, size)
    end = leave
    try:
        guided: dict[str, Any] = {}
        form = form or body.form
        if form is not None:
            guided["guides"], end_forms = await service.make_forms(form, size, silent)

            def end() -> None:
                leave()
                end_forms()

        rows = await service.draw(
            prompts,
            {
                **settings,
                **use,
                **guided,
                "samples": samples,
                "streaming": bool(body.stream or body.stops),
                "priority": body.priority or 0,
                "seed": seed_of(body),
            },
        )
        answers = [Answer(service.decoder(skip_special_tokens), body.stops, silent) for _ in rows]
        whole = not (body.stream or body.stops)
        return Reader(service, prompts, rows, answers, end, whole=whole)
    except BaseException:
        end()
        raise
