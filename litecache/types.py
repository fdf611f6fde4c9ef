"""Messages between the driver, the actors and the engine.

Plain frozen data with a version, importable without torch or ray. A `Request` travels from the
driver to the engine, `TokenDelta`s travel back in one `PollReply` per poll.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass, field
from typing import NamedTuple

from litecache.token_ids import TokenIds

MESSAGE_VERSION = 10

CACHE_USES = ("default", "no-store", "read-only")
"""What becomes of the blocks that a request computes: see `Request.cache`."""

RETENTIONS = ("normal", "low", "high")
"""How long they are worth keeping, in the lower tiers: low ones leave first."""


class Tier(str, enum.Enum):
    """Where a reused token's KV was found."""

    GPU = "gpu"
    RAM = "ram"
    DISK = "disk"
    REMOTE = "remote"


class FinishReason(str, enum.Enum):
    """Why a request ended."""

    STOP = "stop"
    LENGTH = "length"
    ABORT = "abort"
    ERROR = "error"


@dataclass(frozen=True, kw_only=True)
class LogitRules:
    """What changes a sequence's logits before a token is drawn, by its own tokens.

    Meaning and order are those of transformers' processors: biases, repetition penalty, n-grams,
    then what is struck out. Presence and frequency penalties follow the repetition penalty.

    Attributes:
        sequence_bias: (token ids, bias) pairs: the bias is added to the last token of the ids
            where the tokens before it have just been seen; -inf forbids it.
        bad_words_ids: sequences that are never completed.
        suppress_tokens: never drawn.
        begin_suppress_tokens: not drawn as the first new token.
        repetition_penalty: divides positive and multiplies negative logits of all tokens of
            prompt and output; 1 = off.
        presence_penalty: is taken from the logits of the tokens of the output; 0 = off.
        frequency_penalty: the same, times the number of occurrences; 0 = off.
        no_repeat_ngram_size: no run of so many tokens occurs twice in prompt and output; 0 = off.
        columns: the prompt as runs of tokens are looked for in it, padding included; () = as it is.
        padding: so many of the first columns are not even looked at by the repetition penalty.
    """

    sequence_bias: tuple[tuple[tuple[int, ...], float], ...] = ()
    bad_words_ids: tuple[tuple[int, ...], ...] = ()
    suppress_tokens: tuple[int, ...] = ()
    begin_suppress_tokens: tuple[int, ...] = ()
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    no_repeat_ngram_size: int = 0
    columns: tuple[int, ...] = ()
    padding: int = 0

    @property
    def any_runs(self) -> bool:
        """Whether a token may depend on the order of those before it."""
        sequences = (*self.bad_words_ids, *(ids for ids, _ in self.sequence_bias))
        return bool(self.no_repeat_ngram_size) or any(len(ids) > 1 for ids in sequences)

    @property
    def any_rules(self) -> bool:
        """Whether logits are changed in any step but the first."""
        return bool(
            self.sequence_bias
            or self.bad_words_ids
            or self.suppress_tokens
            or self.repetition_penalty != 1
            or self.presence_penalty
            or self.frequency_penalty
            or self.no_repeat_ngram_size
        )


@dataclass(frozen=True)
class SamplingParams(LogitRules):
    """How tokens are drawn.

    Attributes:
        max_new_tokens: at most this many tokens are generated.
        min_new_tokens: end-of-sequence tokens cannot be drawn before this many.
        temperature: 0 means greedy.
        top_k: draw from the k likeliest; 0 = off.
        top_p: draw from the smallest set of at least this probability; 1 = off.
        min_p: drop tokens below this share of the likeliest one's probability; 0 = off.
        seed: of the counter-based generator; each random number depends on
            (seed, sample_index, position, purpose) alone.
        sample_index: which of several samples of one call this is.
        eos_token_ids: drawing one of these ends the request; the token is part of the output.
        logprobs: report each token's log-probability and those of so many of the likeliest, as
            the model gives them, before rules, temperature and filters; None = off.
    """

    max_new_tokens: int
    min_new_tokens: int = 0
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    seed: int = 0
    sample_index: int = 0
    eos_token_ids: tuple[int, ...] = ()
    logprobs: int | None = None


@dataclass(frozen=True)
class Request:
    """One sequence to continue.

    Attributes:
        request_id: unique in the group.
        client_id: whose polls receive the tokens.
        prompt: token ids (any sequence of integers), and after a failure also the tokens generated
            so far.
        sampling: how tokens are drawn.
        num_resumed_tokens: how many tokens at the end of `prompt` were generated before; they
            count towards `max_new_tokens` and shift the generator's positions by nothing.
        cache_salt: blocks are shared only within one salt.
        cache: all of them find what others have left. "default": what it computes is shared in the
            pool and saved to the lower tiers. "read-only": shared in the pool, but neither that nor
            what it finds there is saved on its account; a "default" request that finds it there
            saves it. "no-store": nobody else ever finds what it computes, in the pool or below.
        expires_s: Unix second from which on the lower tiers hold nothing that was saved for this
            request; 0 = only their own `ttl_s` counts.
        retention: one of `RETENTIONS`, of the same blocks.
        priority: lower runs first; one level is worth ten seconds of waiting.
        max_time_s: ends the request with what it has after so many seconds; None = no limit.
        logits: it draws nothing (`max_new_tokens` is 0): the logits of so many of its last
            positions are handed out, or with `sampling.logprobs` the log-probabilities of the
            tokens that follow them. They are computed, whatever is cached; what lies in front of
            them is reused. 0 = it draws.
        mask: it is guided: each of its tokens is one that its driver allows. This is the bitmap of
            those that may be the next one, see `mask_bytes`; the others come as `Guidance`. None =
            any token may come.
    """

    request_id: str
    client_id: str
    prompt: TokenIds
    sampling: SamplingParams
    num_resumed_tokens: int = 0
    cache_salt: str = ""
    cache: str = "default"
    expires_s: int = 0
    retention: str = "normal"
    priority: int = 0
    max_time_s: float | None = None
    logits: int = 0
    mask: bytes | None = None
    version: int = MESSAGE_VERSION

    def __post_init__(self) -> None:
        object.__setattr__(self, "prompt", TokenIds(self.prompt))


def mask_bytes(vocab_size: int) -> int:
    """Of a bitmap of tokens: int32 `[ceil(vocab_size / 32)]`, little-endian, a bit a token, the
    lowest one first; 1 = it may be drawn."""
    return 4 * -(-vocab_size // 32)


class Guidance(NamedTuple):
    """What a driver says of a guided request that has drawn a token and waits.

    Attributes:
        request_id: whose.
        num_tokens: of prompt and output as the driver knows them; for any other number of tokens
            than the request has it is void.
        token_ids: tokens that follow without being drawn; no delta tells them.
        mask: of those that may be drawn behind them, as `Request.mask`; empty: the request ends.
    """

    request_id: str
    num_tokens: int
    token_ids: tuple[int, ...]
    mask: bytes


class TokenLogprobs(NamedTuple):
    """Natural logarithms of probabilities at one position.

    Attributes:
        logprob: of the token that was drawn; of a prompt's position the token that follows it, at
            the last one the likeliest.
        top: (token id, its log-probability) of the likeliest, best first.
    """

    logprob: float
    top: tuple[tuple[int, float], ...]


class TokenDelta(NamedTuple):
    """What one step or several produced for one request.

    A tuple, because one is made for every token: a frozen dataclass takes five times as long.

    Attributes:
        request_id: whose tokens.
        token_ids: new tokens, in order; may be empty when only `finish_reason` is news.
        finish_reason: None while the request goes on.
        error: the message, when `finish_reason` is ERROR.
        error_type: name of the LiteCacheError subclass to raise for it.
        reused_tokens: prompt tokens by tier that were not computed; sent with the first token.
        ttft_s: seconds from submission to the first token inside the engine; sent with it.
        logprobs: per token, where the request asked for them.
        found_tokens: prompt tokens by tier where their KV was found; those beyond `reused_tokens`
            were computed by plan, since that was sooner. Sent with the first token.
        logits: `[Request.logits, vocab]`, rows one after the other in the model's dtype or in
            float32, as the model gives them; sent at the end.
        awaits_guidance: the request is guided and sits out until its driver has answered.
    """

    request_id: str
    token_ids: tuple[int, ...] = ()
    finish_reason: FinishReason | None = None
    error: str | None = None
    error_type: str | None = None
    reused_tokens: dict[str, int] | None = None
    ttft_s: float | None = None
    logprobs: tuple[TokenLogprobs, ...] = ()
    found_tokens: dict[str, int] | None = None
    logits: bytes | None = None
    awaits_guidance: bool = False


@dataclass(frozen=True)
class PollReply:
    """All deltas of one client after its last acknowledged one.

    Attributes:
        first_seq: sequence number of `deltas[0]`.
        deltas: in order, nothing twice.
        epoch: changes when the actor restarted; then all requests must be submitted again.
    """

    first_seq: int
    deltas: tuple[TokenDelta, ...] = field(default=())
    epoch: str = ""
    version: int = MESSAGE_VERSION
