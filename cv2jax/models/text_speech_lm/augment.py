"""Noise on the inputs of the language model in training; not upstream's."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int, Key

from cv2jax.models.text_speech_lm.sequence import SPEECH


def replace_speech(
    tokens: Int[Array, "B T"], kinds: Int[Array, "B T"], key: Key[Array, ""], share: float
) -> Int[Array, "B T"]:
    """The inputs with a share of the speech tokens replaced by speech of elsewhere in their row; targets stay as they are.

    With little speech a model learns whole sentences by heart and goes on from its own history alone; a history that
    cannot be trusted makes it look at the text, and at ease with what a sampler may draw. A place in the row that holds
    no speech replaces nothing, so a little less than the share changes.
    """
    place_key, which_key = jax.random.split(key)
    places = jax.random.randint(place_key, tokens.shape, 0, tokens.shape[1])
    other, other_kind = (jnp.take_along_axis(a, places, axis=1) for a in (tokens, kinds))
    replaced = jax.random.bernoulli(which_key, share, tokens.shape) & (kinds == SPEECH) & (other_kind == SPEECH)
    return jnp.where(replaced, other, tokens)
