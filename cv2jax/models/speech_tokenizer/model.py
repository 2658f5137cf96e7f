"""The supervised speech tokenizer: Encoder1, quantizer, up-projection, Encoder2 and a text decoder (paper 2.2, spec 1.9).

Only Encoder1 and the quantizer's down-projection are needed to tokenize (`encode`); the rest exists to teach them.
"""

import typing

import flax
import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Key, PyTree

from cv2jax.models.speech_tokenizer import vq
from cv2jax.models.speech_tokenizer.asr import TextDecoder, teacher_forcing
from cv2jax.models.speech_tokenizer.config import SpeechTokenizerConfig
from cv2jax.models.speech_tokenizer.encoder import EncoderStack, SpeechEncoder
from cv2jax.models.speech_tokenizer.fsq import FiniteScalarQuantizer, ids_to_digits
from cv2jax.nn.layers import Linear
from cv2jax.nn.masks import length_mask

PITCH_UNIT_HZ = 100.0  # the pitch head and its loss count in 100 Hz, so that the head starts at the size of its target
ENCODING_PARTS = ("encoder", "quantizer")  # the top-level parameter subtrees that `encode` needs


@typing.no_type_check  # a pytree node also holds shapes or shardings, which are no arrays
@flax.struct.dataclass
class SpeechEncoding:
    """What tokenizing gives: positions past `num_speech_tokens` are 0 in `speech_tokens` and meaningless elsewhere."""

    hidden: Float[Array, "B L D"]  # Encoder1's output, before the quantizer
    z: Float[Array, "B L Q"] | None  # the FSQ projection before tanh, fp32; None for vq and none
    codes: Float[Array, "B L E"]  # what the up-projection sees: digits (fsq), code vectors (vq), hidden (none)
    speech_tokens: Int[Array, "B L"]  # int32 ids at 25 Hz; all 0 for `none`
    num_speech_tokens: Int[Array, " B"]  # ceil(num_frames / 4)
    commitment: Float[Array, ""]  # mean squared distance to the codebook (vq), else 0
    model_state: PyTree  # the quantizer's state after this batch: `VqState` for vq, else {}


@typing.no_type_check  # a pytree node also holds shapes or shardings, which are no arrays
@flax.struct.dataclass
class SpeechTokenizerOutput:
    """The training forward's results; P = T + 1 positions hold the text's targets and eos."""

    hidden: Float[Array, "B L D"]  # as in SpeechEncoding
    z: Float[Array, "B L Q"] | None  # as in SpeechEncoding
    speech_tokens: Int[Array, "B L"]  # as in SpeechEncoding
    num_speech_tokens: Int[Array, " B"]  # as in SpeechEncoding
    decoder_logits: Float[Array, "B P V"]  # fp32, teacher-forced: position p predicts target p of `teacher_forcing`
    ctc_logits: Float[Array, "B L V"] | None  # fp32, from Encoder2; None unless ctc_weight > 0
    pitch: Float[Array, "B L"] | None  # F0 in Hz at 25 Hz, from Encoder2; None unless pitch_weight > 0
    commitment: Float[Array, ""]  # as in SpeechEncoding
    model_state: PyTree  # as in SpeechEncoding


class SpeechTokenizer(nn.Module):
    """The whole model, with the parameters encoder, quantizer, project_up, encoder2, decoder, ctc_head, pitch_head.

    The quantizers differ in nothing else: each is followed by one linear layer to width D (from digits, code vectors or
    the hidden vectors themselves).
    """

    config: SpeechTokenizerConfig

    def setup(self) -> None:
        c = self.config
        blocks: dict[str, typing.Any] = {
            "width": c.width,
            "num_heads": c.num_heads,
            "mlp_ratio": c.mlp_ratio,
            "dropout": c.dropout,
            "remat": c.remat,
            "scan": c.scan_layers,
            "dtype": c.dtype,
        }
        speech = blocks | {"fsmn_kernel": c.fsmn_kernel, "rope_theta": c.rope_theta}
        self.encoder = SpeechEncoder(num_mels=c.num_mels, num_layers=c.num_layers, **speech)
        if c.quantizer == "fsq":
            self.quantizer = FiniteScalarQuantizer(c.width, c.fsq_dim)
        code_dim = c.fsq_dim if c.quantizer == "fsq" else c.width
        up_axes = (None if c.quantizer == "fsq" else "embed", "mlp" if c.quantizer == "fsq" else None)
        self.project_up = Linear((code_dim, c.width), up_axes, dtype=c.dtype)
        self.encoder2 = EncoderStack(num_layers=c.encoder2_layers, final_norm=True, **speech)
        self.decoder = TextDecoder(
            vocabulary_size=c.vocabulary_size,
            max_text_tokens=c.max_text_tokens,
            num_layers=c.decoder_layers,
            **blocks,
        )
        if c.ctc_weight > 0:
            self.ctc_head = Linear((c.width, c.vocabulary_size), ("embed", "vocab"))  # fp32, as every loss
        if c.pitch_weight > 0:
            self.pitch_head = Linear((c.width, 1), ("embed", None))

    def __call__(
        self,
        mel: Float[Array, "B M F"],
        num_frames: Int[Array, " B"],
        text_tokens: Int[Array, "B T"],
        num_text_tokens: Int[Array, " B"],
        model_state: PyTree,
        *,
        deterministic: bool,
        row_mask: Bool[Array, " B"] | None = None,
    ) -> SpeechTokenizerOutput:
        """Runs everything with the text teacher-forced.

        Args:
          mel: Whisper log-mel at 100 Hz, already augmented. num_frames: valid frames of each row.
          text_tokens: character ids without sos/eos, T ≤ max_text_tokens. num_text_tokens: 0 where there is no text.
          model_state: of `init_model_state`; updated in the output when not deterministic.
          deterministic: no dropout, no update; otherwise pass rngs={"dropout": key}.
          row_mask: False for rows that only fill the batch; they touch no state.
        """
        encoding = self.encode(mel, num_frames, model_state, deterministic=deterministic, row_mask=row_mask)
        memory, mask = self._understand(encoding, deterministic)
        inputs, _, _ = teacher_forcing(text_tokens, num_text_tokens)
        logits, _ = self.decoder(inputs, memory, mask, deterministic=deterministic)
        ctc_logits, pitch = None, None
        if self.config.ctc_weight > 0:
            ctc_logits = self.ctc_head(memory)
        if self.config.pitch_weight > 0:
            pitch = PITCH_UNIT_HZ * jax.nn.relu(self.pitch_head(memory)[..., 0])
        return SpeechTokenizerOutput(
            hidden=encoding.hidden,
            z=encoding.z,
            speech_tokens=encoding.speech_tokens,
            num_speech_tokens=encoding.num_speech_tokens,
            decoder_logits=logits,
            ctc_logits=ctc_logits,
            pitch=pitch,
            commitment=encoding.commitment,
            model_state=encoding.model_state,
        )

    def encode(
        self,
        mel: Float[Array, "B M F"],
        num_frames: Int[Array, " B"],
        model_state: PyTree,
        *,
        deterministic: bool = True,
        row_mask: Bool[Array, " B"] | None = None,
    ) -> SpeechEncoding:
        """Encoder1 and quantizer only: needs just the ENCODING_PARTS of the parameters."""
        c = self.config
        hidden, num_tokens = self.encoder(mel, num_frames, deterministic=deterministic)
        mask = length_mask(num_tokens, hidden.shape[1])
        z, commitment = None, jnp.zeros((), jnp.float32)
        if c.quantizer == "fsq":
            z, codes, ids = self.quantizer(hidden)
        elif c.quantizer == "vq":
            counted = mask if row_mask is None else mask & row_mask[:, None]
            codes, ids, commitment, model_state = self._quantize_vq(hidden, counted, model_state, deterministic)
        else:
            codes, ids = hidden, jnp.zeros(hidden.shape[:2], jnp.int32)
        return SpeechEncoding(
            hidden=hidden,
            z=z,
            codes=codes,
            speech_tokens=jnp.where(mask, ids, 0),
            num_speech_tokens=num_tokens,
            commitment=commitment,
            model_state=model_state,
        )

    def understand(
        self, mel: Float[Array, "B M F"], num_frames: Int[Array, " B"], model_state: PyTree
    ) -> tuple[SpeechEncoding, Float[Array, "B L D"], Bool[Array, "B L"]]:
        """The encoding, what the decoder attends to (Encoder2's output) and its valid positions, without dropout."""
        encoding = self.encode(mel, num_frames, model_state)
        return encoding, *self._understand(encoding, True)

    def understand_tokens(
        self, speech_tokens: Int[Array, "B L"], num_speech_tokens: Int[Array, " B"], model_state: PyTree
    ) -> tuple[Float[Array, "B L D"], Bool[Array, "B L"]]:
        """What the decoder attends to, from speech tokens instead of speech; ValueError without a quantizer."""
        c = self.config
        if c.quantizer == "none":
            raise ValueError("without a quantizer there are no tokens to understand")
        is_fsq = c.quantizer == "fsq"
        codes = ids_to_digits(speech_tokens, c.fsq_dim) if is_fsq else model_state.codebook[speech_tokens]
        mask = length_mask(num_speech_tokens, speech_tokens.shape[1])
        return self.encoder2(self.project_up(codes), mask, deterministic=True), mask

    def decode_step(
        self,
        tokens: Int[Array, "B 1"],
        memory: Float[Array, "B L D"],
        mask: Bool[Array, "B L"],
        cache: PyTree,
        position: Int[Array, ""],
    ) -> tuple[Float[Array, "B V"], PyTree]:
        """One decoder step with a cache from `init_cache`; returns (logits of the next token, cache)."""
        logits, cache = self.decoder(tokens, memory, mask, deterministic=True, cache=cache, position=position)
        return logits[:, 0], cache

    def init_cache(self, batch_size: int) -> PyTree:
        """Empty decoder caches, a plain pytree."""
        return self.decoder.init_cache(batch_size)

    def ctc(self, memory: Float[Array, "B L D"]) -> Float[Array, "B L V"]:
        """CTC logits of an Encoder2 output."""
        return self.ctc_head(memory)

    def _understand(
        self, encoding: SpeechEncoding, deterministic: bool
    ) -> tuple[Float[Array, "B L D"], Bool[Array, "B L"]]:
        mask = length_mask(encoding.num_speech_tokens, encoding.hidden.shape[1])
        return self.encoder2(self.project_up(encoding.codes), mask, deterministic=deterministic), mask

    def _quantize_vq(
        self, hidden: Float[Array, "B L D"], mask: Bool[Array, "B L"], state: vq.VqState, deterministic: bool
    ) -> tuple[Float[Array, "B L D"], Int[Array, "B L"], Float[Array, ""], vq.VqState]:
        c, vectors = self.config, vq.normalize(hidden)
        if deterministic:
            return *vq.quantize(vectors, mask, state.codebook), state
        fixed = jax.lax.stop_gradient(vectors)
        init_key, restart_key = jax.random.split(self.make_rng("dropout"))
        state = vq.init_from_data(state, fixed, mask, init_key)
        codes, ids, commitment = vq.quantize(vectors, mask, state.codebook)
        state = vq.update_vq_state(
            state, fixed, ids, mask, restart_key, decay=c.vq_decay, restart_below=c.vq_restart_below
        )
        return codes, ids, commitment, state


def init_params(config: SpeechTokenizerConfig, key: Key[Array, ""]) -> PyTree:
    """fp32 parameters boxed with logical axes; trace it with `jax.eval_shape` for shapes only."""
    mel = jnp.zeros((1, config.num_mels, 8), jnp.float32)
    one, text = jnp.full((1,), 8, jnp.int32), jnp.zeros((1, 1), jnp.int32)
    state = nn.unbox(init_model_state(config, key))
    return SpeechTokenizer(config).init(key, mel, one, text, one * 0, state, deterministic=True)["params"]


def init_model_state(config: SpeechTokenizerConfig, key: Key[Array, ""]) -> PyTree:
    """The state that training carries beside the parameters: a boxed `VqState` for vq, else an empty dict."""
    return vq.init_vq_state(config.codebook_size, config.width, key) if config.quantizer == "vq" else {}


def encode(
    config: SpeechTokenizerConfig,
    params: PyTree,
    mel: Float[Array, "B M F"],
    num_frames: Int[Array, " B"],
    model_state: PyTree = None,
) -> tuple[Int[Array, "B L"], Int[Array, " B"]]:
    """Speech tokens [B, ceil(F/4)] (0 past the end) and their numbers; `params` may hold only the ENCODING_PARTS."""
    variables = {"params": {part: params[part] for part in ENCODING_PARTS if part in params}}
    state = {} if model_state is None else model_state
    applied = SpeechTokenizer(config).apply(variables, mel, num_frames, state, method="encode")
    encoding = typing.cast(SpeechEncoding, applied)
    return encoding.speech_tokens, encoding.num_speech_tokens
