"""Drawing the next speech token: greedy, nucleus, and the official repetition-aware sampling (spec/official.md 3.5).

Every sampler takes one row of log-probabilities [V] and one key; a decoder of many requests vmaps it with one key a
request and step. A draw then depends on nothing but its own row and key, never on its batch mates. (The keys must be of
a counter-based generator such as threefry, the default: `rbg` draws differently under vmap.)

temperature, top_p and top_k may be traced, so that one compiled step serves requests with different options; then
`num_candidates` is the static bound on top_k. Axes: V vocabulary, K candidates, R recent tokens.
"""

import dataclasses
import math
import numbers
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from cv2jax.config import UserError
from cv2jax.shapes import Bool, Float, Int, Key

NO_TOKEN = -1  # behind the last candidate, and in `recent` before the first token

Scalar = float | Float[Array, ""]
Count = int | Int[Array, ""]
Forbidden = Bool[Array, " V"] | None  # True: this token must not be drawn now
_ROW = {"temperature": numbers.Real, "top_p": numbers.Real, "top_k": numbers.Integral}  # what requests choose


@dataclasses.dataclass(frozen=True, kw_only=True)
class SamplingOptions:
    """How a request draws its tokens; the defaults are CosyVoice 2's."""

    temperature: float = 1.0  # 0: always the likeliest token
    top_p: float = 0.8  # 1: no bound
    top_k: int = 25  # 0: no bound
    win_size: int = 10  # R, the tokens among which a repetition counts; 0: none does
    tau_r: float = 0.1  # a token that would fill more of the window than this share is drawn anew

    def validate(self) -> None:
        """Raises UserError for a value that no distribution follows from."""
        if not 0 <= self.temperature < math.inf:
            raise UserError(f"sampling.temperature={self.temperature}: must be a finite number, 0 (greedy) or more")
        if not 0 < self.top_p <= 1:
            raise UserError(f"sampling.top_p={self.top_p}: must be above 0 and at most 1 (no bound)")
        for name in ("top_k", "win_size"):
            if getattr(self, name) < 0:
                raise UserError(f"sampling.{name}={getattr(self, name)}: must be 0 (none) or more")
        if not self.tau_r > 0:
            raise UserError(f"sampling.tau_r={self.tau_r}: must be positive; win_size=0 allows every repetition")


@dataclasses.dataclass(frozen=True, kw_only=True)
class RequestSampler:
    """`sample_ras` for a decoder whose requests bring their own temperature, top_p and top_k.

    Equal samplers are equal and hash alike: a jit that takes one as a static argument compiles once for them.
    """

    win_size: int = 10  # R, as in SamplingOptions
    tau_r: float = 0.1
    num_candidates: int = 25  # the most that top_k may ask for; 0 is no bound only where they are the whole vocabulary

    def options(self, options: SamplingOptions) -> dict[str, float | int]:
        """A request's row: temperature, top_p, top_k; UserError for invalid options or what this sampler cannot do."""
        options.validate()
        for name in ("win_size", "tau_r"):
            if getattr(options, name) != getattr(self, name):
                raise UserError(
                    f"sampling.{name}={getattr(options, name)}: the decoder was built for {getattr(self, name)};"
                    " requests that are decoded together share it"
                )
        if options.top_k > self.num_candidates:
            raise UserError(
                f"sampling.top_k={options.top_k}: the decoder was built for up to {self.num_candidates} candidates; ask"
                " for fewer or build it with more"
            )
        return {"temperature": float(options.temperature), "top_p": float(options.top_p), "top_k": options.top_k}

    def row(self, options: Mapping[str, Any]) -> dict[str, float | int]:
        """The same of a mapping that may lack some: those are the defaults. UserError for other names and types, too."""
        for name, value in options.items():
            if name not in _ROW:
                raise UserError(f"sampling.{name}: is no option of a request; known are {', '.join(_ROW)}")
            if not isinstance(value, _ROW[name]):
                raise UserError(f"sampling.{name}={value!r}: must be a {'whole ' if name == 'top_k' else ''}number")
        typed: dict[str, Any] = {
            name: int(value) if name == "top_k" else float(value) for name, value in options.items()
        }
        return self.options(SamplingOptions(win_size=self.win_size, tau_r=self.tau_r, **typed))

    def __call__(
        self,
        key: Key[Array, ""],
        logp: Float[Array, " V"],
        recent: Int[Array, " R"],
        forbidden: Bool[Array, " V"],
        options: dict[str, Array],
    ) -> Int[Array, ""]:
        """Draws one token; `options` are the request's row of `options`, as arrays that may be traced."""
        return sample_ras(key, logp, recent, forbidden, tau_r=self.tau_r, num_candidates=self.num_candidates, **options)


def make_request_sampler(options: SamplingOptions, num_candidates: int | None = None) -> RequestSampler:
    """The sampler that serves requests with the win_size and tau_r of these options, which it validates.

    `num_candidates` bounds every request's top_k, by default to that of the options; ValueError where that is 0.
    """
    options.validate()
    bound = num_candidates or options.top_k
    if not bound:
        raise ValueError("top_k=0 sets no bound: give num_candidates, up to the size of the vocabulary")
    return RequestSampler(win_size=options.win_size, tau_r=options.tau_r, num_candidates=bound)


def nucleus_candidates(
    logp: Float[Array, "*B V"], top_p: Scalar, top_k: Count, num_candidates: int | None = None
) -> tuple[Int[Array, "*B K"], Float[Array, "*B K"]]:
    """Token ids, likeliest first, and their probabilities, among which the nucleus draws (utils/common.py:138-167).

    Tokens are taken while those before them sum to less than top_p and are fewer than top_k: the one that crosses top_p
    is included, so there is always one. Of equal probabilities the lower id comes first. top_p = 1 and top_k = 0 set no
    bound. Behind the last candidate the ids are NO_TOKEN and the probabilities, which are not renormalised, 0.
    K = `num_candidates`, by default top_k; needed where top_k is traced. A larger top_k is cut to it.
    """
    size = logp.shape[-1]
    if num_candidates is None:
        if not isinstance(top_k, int):
            raise ValueError("num_candidates must be given where top_k is traced: it is the shape of the result")
        num_candidates = top_k or size
    # top_k keeps the lower index of equals first, as the official stable descending sort does.
    probs, ids = jax.lax.top_k(jax.nn.softmax(logp, axis=-1), min(num_candidates, size))
    before = jnp.concatenate([jnp.zeros_like(probs[..., :1]), jnp.cumsum(probs, axis=-1)[..., :-1]], axis=-1)
    limit = jnp.where(jnp.asarray(top_k) > 0, top_k, size)
    # The sum of everything may round to 1 too early, so 1 is no bound rather than a late one.
    keep = ((before < top_p) | (jnp.asarray(top_p) >= 1)) & (jnp.arange(ids.shape[-1]) < limit)
    return jnp.where(keep, ids, NO_TOKEN), jnp.where(keep, probs, 0)


def greedy(logp: Float[Array, " V"], forbidden: Forbidden = None) -> Int[Array, ""]:
    """The likeliest token that is not forbidden, int32; the lowest of equals."""
    return jnp.argmax(_without(logp, forbidden)).astype(jnp.int32)


def sample(
    key: Key[Array, ""],
    logp: Float[Array, " V"],
    forbidden: Forbidden = None,
    *,
    temperature: Scalar = 1.0,
    top_p: Scalar = 1.0,
    top_k: Count = 0,
    num_candidates: int | None = None,
) -> Int[Array, ""]:
    """Draws one token, int32, from the nucleus of softmax(logp / temperature); temperature 0 is `greedy`."""
    logp = _without(logp, forbidden)
    token = _draw_nucleus(key, _tempered(logp, temperature), top_p, top_k, num_candidates)
    return jnp.where(jnp.asarray(temperature) > 0, token, greedy(logp))


def sample_ras(
    key: Key[Array, ""],
    logp: Float[Array, " V"],
    recent: Int[Array, " R"],
    forbidden: Forbidden = None,
    *,
    tau_r: float = 0.1,
    temperature: Scalar = 1.0,
    top_p: Scalar = 0.8,
    top_k: Count = 25,
    num_candidates: int | None = None,
) -> Int[Array, ""]:
    """Repetition-aware sampling of one token, int32 (utils/common.py:138-167, spec/official.md 3.5).

    Draws as `sample`. If that token occurs at least R · tau_r times among the last R tokens, it is forbidden too and
    one is drawn from all others, without nucleus. `recent` holds what was drawn (no prompt, no fill), padded
    with NO_TOKEN; full of those, it makes this `sample` with another use of the key. Temperature 0 is `greedy`: it may
    repeat.
    """
    key_nucleus, key_full = jax.random.split(key)
    logp = _without(logp, forbidden)
    tempered = _tempered(logp, temperature)
    token = _draw_nucleus(key_nucleus, tempered, top_p, top_k, num_candidates)
    # A count reaches a bound iff it reaches the next integer; the bound is rounded up in float64, as upstream compares.
    repeats = jnp.sum(recent == token) >= max(1, math.ceil(recent.shape[0] * tau_r))
    others = _without(tempered, jnp.arange(logp.shape[0]) == token)
    drawn_anew = jax.random.categorical(key_full, others).astype(jnp.int32)
    # Where all others are forbidden there is nothing to draw from, and the repetition stands.
    token = jnp.where(repeats & (jnp.max(others) > -jnp.inf), drawn_anew, token)
    return jnp.where(jnp.asarray(temperature) > 0, token, greedy(logp))


def _without(logp: Float[Array, " V"], forbidden: Forbidden) -> Float[Array, " V"]:
    return logp if forbidden is None else jnp.where(forbidden, -jnp.inf, logp)


def _tempered(logp: Float[Array, " V"], temperature: Scalar) -> Float[Array, " V"]:
    # At 0 the result is not used, but must not be NaN either.
    return logp.astype(jnp.float32) / jnp.where(jnp.asarray(temperature) > 0, temperature, 1.0)


def _draw_nucleus(
    key: Key[Array, ""], logp: Float[Array, " V"], top_p: Scalar, top_k: Count, num_candidates: int | None
) -> Int[Array, ""]:
    ids, probs = nucleus_candidates(logp, top_p, top_k, num_candidates)
    return ids[jax.random.categorical(key, jnp.log(probs))].astype(jnp.int32)
