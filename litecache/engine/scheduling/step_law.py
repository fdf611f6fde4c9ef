"""What a step costs, fitted to the steps that were taken. Pure.

A step of `t` prefill tokens behind `c` cached ones, beside `d` decodes, takes
`base + token * t + pair * t * (c + t / 2) + read * c + decode * d` seconds, times what steps of its
size were seen to take of that.
"""

from __future__ import annotations

import math
from collections import deque

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]

READ_SHARE = 5e-3
"""Prior of `read` over `token`: a chunk of few tokens still reads all keys in front of it."""
PAIR_SHARE = 4e-5
"""Prior of `pair` over `token`: attention's share in the cost of a Llama-like model."""
_KEPT = np.array([[mask >> term & 1 for term in range(5)] for mask in range(32)], dtype=float)
"""Every choice of a law's five terms."""


class StepLaw:
    """Seconds of a step, fitted to the last steps of every size class.

    Attributes:
        law: base, token, pair, read, decode.
        count: steps noted.

    A class (tokens by quarters of powers of two, context and decodes by powers) counts with the
    median of its last five steps, so that a step that compiled or was interrupted has no weight,
    and classes not seen for long fade. The fit is of relative errors, pulled slightly towards the
    priors' proportions. What steps of a size differ from it by is kept beside it: products of
    matrices take whole waves of a GPU, so that 1,088 tokens may cost nearly as much as 2,112.
    """

    def __init__(self, token_s: float, step_s: float) -> None:
        shares = (1.0, PAIR_SHARE, READ_SHARE)
        self._prior = np.array([step_s, *(token_s * share for share in shares), step_s / 100])
        self.law: tuple[float, ...] = tuple(self._prior.tolist())
        self._classes: dict[tuple[int, int, int], tuple[deque[tuple[float, ...]], int]] = {}
        # logarithms of sizes, and of what steps of these sizes take over what the law says
        self._sizes, self._shape = np.zeros(1), np.zeros(1)
        self.count = 0

    def note(self, tokens: int, context: int, decodes: int, seconds: float) -> None:
        """A step has taken so long."""
        if tokens <= 0 or not 0 < seconds < math.inf:
            return
        self.count += 1
        quarter = tokens >> max(0, tokens.bit_length() - 3) << 8 | tokens.bit_length()
        size = (quarter, context.bit_length(), decodes.bit_length())
        steps = self._classes.get(size, (deque(maxlen=5), 0))[0]
        pairs = tokens * (context + tokens / 2)
        steps.append((seconds, 1.0, tokens, pairs, context, decodes))
        self._classes[size] = (steps, self.count)
        if self.count < 32 or self.count % 8 == 0:
            self.law = tuple(self._fit().tolist())

    def seconds(self, tokens: int, context: int, decodes: int) -> float:
        """Of one step."""
        base, token, pair, read, decode = self.law
        alone_s = base + read * context + decode * decodes
        alone_s += tokens * (token + pair * (context + tokens / 2))
        return alone_s * float(self.shape(tokens))

    def shape(self, tokens: npt.ArrayLike) -> Floats:
        """What steps of so many tokens take, over what the law says."""
        sizes = np.log(np.maximum(tokens, 1))
        return np.asarray(np.exp(np.interp(sizes, self._sizes, self._shape)))

    def chunks(self, tokens: Floats, chunk: int) -> Floats:
        """`shape` of so many tokens, computed in chunks of this size."""
        rest = tokens % chunk
        whole = (tokens - rest) * self.shape(chunk)
        return np.where(tokens > 0, (whole + rest * self.shape(rest)) / np.maximum(tokens, 1), 1.0)

    def _fit(self) -> Floats:
        rows, weights, quarters = [], [], []
        for (quarter, _, _), (steps, last) in self._classes.items():
            quarters.append(quarter)
            # One or two steps: the faster, since whatever disturbs a step makes it slower.
            rows.append(sorted(steps)[(len(steps) - 1) // 2])
            weights.append(0.5 ** ((self.count - last) / 64))
        table = np.array(rows)
        features = table[:, 1:] * self._prior / table[:, :1]
        weight = np.array(weights)[:, None]
        # In units of the priors' proportions, brought to this machine's speed.
        scale = 1 / float(np.median(features.sum(axis=1)))
        features *= scale
        normal = features.T @ (weight * features) + 2e-4 * np.eye(5)
        wanted = (weight * features).sum(axis=0) + 2e-4
        law = nonnegative_law(normal, wanted)
        self._note_shape(np.array(quarters), table[:, 2], features @ law, weight[:, 0])
        fitted: Floats = law * scale * self._prior
        return fitted

    def _note_shape(
        self, quarters: npt.NDArray[np.int64], tokens: Floats, told: Floats, weight: Floats
    ) -> None:
        """Keep how each size differs from the law, which told so much of what it took."""
        place = np.unique(quarters, return_inverse=True)[1]
        # a tenth of a class says that it is as the law has it
        total = np.bincount(place, weight) + 0.1
        shape = np.bincount(place, weight * -np.log(np.clip(told, 0.5, 2.0))) / total
        sizes = np.bincount(place, np.log(tokens)) / np.bincount(place)
        order = np.argsort(sizes)
        self._sizes, self._shape = sizes[order], shape[order]


def nonnegative_law(normal: Floats, wanted: Floats) -> Floats:
    """The x `[5]` without a negative term for which `x @ normal @ x - 2 * wanted @ x` is least.

    Terms that would be negative are left out; which ones, all 32 choices tell.
    """
    kept = _KEPT[:, :, None] * _KEPT[:, None, :] * normal + (1 - _KEPT[:, :, None]) * np.eye(5)
    laws = np.linalg.solve(kept, (_KEPT * wanted)[:, :, None])[:, :, 0]
    errors = np.einsum("ni,ij,nj->n", laws, normal, laws) - 2 * laws @ wanted
    best: Floats = laws[int(np.argmin(np.where((laws >= 0).all(axis=1), errors, math.inf)))]
    return best
