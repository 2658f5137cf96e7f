"""The functions of each stage as programs: of (parameters, state, inputs), all dicts of arrays, in the sizes of a bundle.

The sizes are few, so that a bundle is written and loaded quickly, and serve requests up to a stated length.
"""

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from cv2jax.audio.fbank import FBANK_RATE_HZ, kaldi_fbank
from cv2jax.audio.mel import MEL_RATE_HZ, WHISPER_RATE_HZ, log_mel_whisper, mel_spectrogram
from cv2jax.config import UserError
from cv2jax.models.flow_matching.model import FlowMatching
from cv2jax.models.flow_matching.noise import frame_noise
from cv2jax.models.flow_matching.step import Hop
from cv2jax.models.flow_matching.step import init_state as init_flow_state
from cv2jax.models.flow_matching.step import step as flow_step
from cv2jax.models.hift_vocoder.model import HiftState, HiftVocoder, hold_back
from cv2jax.models.hift_vocoder.stream import init_state as init_vocoder_state
from cv2jax.models.speaker_encoder.model import embed
from cv2jax.models.speech_tokenizer.model import encode, init_model_state
from cv2jax.models.text_speech_lm import decode
from cv2jax.nn.attention import BLOCK
from cv2jax.nn.chunks import NO_CHUNK, ChunkMask
from cv2jax.synthesis.bundle import MEL, NOISE, PROMPT_MEL, SPEAKER, SPEECH, TOKENS, WAVE
from cv2jax.synthesis.bundle_programs import Leaf, Table
from cv2jax.synthesis.sampling import RequestSampler
from cv2jax.synthesis.stages import FRAMES_PER_TOKEN, LOOKAHEAD, TOKENS_PER_SECOND
from cv2jax.tasks.bundle_parts import flatten, unflatten

Shape = jax.ShapeDtypeStruct
Function = Callable[[Any, dict[str, Any], dict[str, Any]], tuple[dict[str, Any], dict[str, Any]]]
_FIRST_ROOM, _HOP_TOKENS = 200, 25  # tokens, as MelStreams has them where nothing is fixed
_RESET = ("num_cached", "recent", "num_generated", "status")  # of the language model's state
_LONGEST_RECORDING = (6, 15, 30)  # seconds that encoders hear


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sizes:
    """For which shapes a bundle has programs.

    Attributes:
      slot_counts: requests that the language model serves at once. cache_lengths: positions of its caches; prefill_sizes:
        tokens that it is fed; num_steps: draws of a dispatch at most.
      hop_sizes: tokens of the flow's steps; rooms: tokens of its caches, prompt included. wave_sizes: frames of the vocoder's.
      recordings: seconds that the encoders hear.
    """

    slot_counts: tuple[int, ...]
    cache_lengths: tuple[int, ...]
    prefill_sizes: tuple[int, ...]
    hop_sizes: tuple[int, ...]
    rooms: tuple[int, ...]
    wave_sizes: tuple[int, ...]
    num_steps: int = 32
    recordings: tuple[int, ...] = _LONGEST_RECORDING


def make_sizes(mask: ChunkMask, *, slots: int = 4, seconds: float = 60.0, flush_frames: int = 20) -> Sizes:
    """The sizes for `slots` requests at once of up to so many seconds a piece, the voice's recording included.

    Raises UserError for numbers that no bundle can have, and for a mask without chunks.
    """
    if mask.chunk >= NO_CHUNK:
        raise UserError(
            "the flow was trained without chunks, and a bundle only streams; train one with chunks in model.mask_chunks, or"
            " speak from the model directory: cv2jax synthesize --offline"
        )
    if slots < 1:
        raise UserError(f"--slots {slots}: give 1 or more")
    if not 1 <= seconds <= 600:
        raise UserError(f"--seconds {seconds:g}: give 1 to 600, the recording of the voice included")
    tokens, base = int(seconds * TOKENS_PER_SECOND), -(-_HOP_TOKENS // mask.chunk) * mask.chunk
    rooms, lengths = [_FIRST_ROOM], [512]
    while rooms[-1] < tokens:
        rooms.append(2 * rooms[-1])
    while lengths[-1] < tokens + tokens // 4:  # with their text: a text token is 4 speech tokens or more
        lengths.append(2 * lengths[-1])
    return Sizes(
        slot_counts=tuple(sorted({1, slots})),
        cache_lengths=tuple(lengths),
        prefill_sizes=(8, 32, 128),
        hop_sizes=(base, 2 * base, 4 * base),
        rooms=tuple(rooms),
        wave_sizes=tuple(sorted({flush_frames, 2 * base, 4 * base})),
    )


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Program:
    """A function to be exported.

    Attributes:
      name: FUNCTION.BUCKET. state: the bucket's name. inputs: shapes by name. uses_up_state: its memory is the next one's.
      by_platform: whether it is another function on a CPU than on accelerators.
    """

    stage: str
    name: str
    function: Function
    inputs: dict[str, Shape]
    state: str = ""
    uses_up_state: bool = False
    by_platform: bool = False


def _ints(*shape: int) -> Shape:
    return Shape(shape, np.int32)


def _floats(*shape: int) -> Shape:
    return Shape(shape, np.float32)


def _keys(num_rows: int) -> Shape:
    data = jax.eval_shape(lambda: jax.random.key_data(jax.random.key(0)))
    return Shape((num_rows, *data.shape), data.dtype)


def make_table(state: Any) -> Table:
    """The table of a state at its start, which is 0 or -1 everywhere in an array.

    Raises ValueError for a state that starts otherwise.
    """
    leaves = []
    for path, leaf in flatten(state).items():
        last = path.rpartition("/")[2]
        fill = -1 if last in ("positions", "recent") else 0
        leaves.append(
            Leaf(
                name=path,
                shape=tuple(leaf.shape),
                dtype=str(leaf.dtype),
                fill=fill,
                resets=path in _RESET,
                may_stay=last in ("keys", "values"),
            )
        )
    return tuple(sorted(leaves))


class _Tree:
    """A state's own tree, and the dict of its leaves by name."""

    def __init__(self, shapes: Any) -> None:
        self._names, self._structure = list(flatten(shapes)), jax.tree.structure(shapes)
        self.shapes = {name: Shape(leaf.shape, leaf.dtype) for name, leaf in flatten(shapes).items()}

    def pack(self, state: Any) -> dict[str, Any]:
        return dict(zip(self._names, jax.tree.leaves(state), strict=True))

    def unpack(self, arrays: dict[str, Any]) -> Any:
        return jax.tree.unflatten(self._structure, [arrays[name] for name in self._names])


Made = tuple[list[Program], dict[str, Any]]  # programs, and by bucket the state at its start, as shapes


def speech_programs(config: Any, sampler: RequestSampler, sizes: Sizes) -> Made:
    """Prefill and decode of the language model for every number of slots and length of caches."""
    programs, states = [], {}
    for num_slots in sizes.slot_counts:
        for length in sizes.cache_lengths:
            shapes = jax.eval_shape(lambda b=num_slots, s=length: decode.init_state(config, b, s, sampler.win_size))
            tree, bucket = _Tree(shapes), f"b{num_slots}.s{length}"
            states[bucket] = shapes

            def prefill(params: Any, state: Any, inputs: Any, tree: _Tree = tree) -> Any:
                fed = (inputs["tokens"], inputs["kinds"], inputs["num_tokens"])
                return tree.pack(decode.prefill(config, unflatten(params), tree.unpack(state), *fed)), {}

            def draw(params: Any, state: Any, inputs: Any, tree: _Tree = tree) -> Any:
                options = {name: inputs[name] for name in ("temperature", "top_p", "top_k")}
                fields = {name: inputs[name] for name in ("min_length", "max_length", "budget", "may_end")}
                key = jax.random.wrap_key_data(inputs["key"])
                controls = decode.Controls(key=key, options=options, **fields)
                made, drawn = decode.decode(
                    config, sampler, unflatten(params), tree.unpack(state), controls, num_steps=sizes.num_steps
                )
                return tree.pack(made), {name: getattr(drawn, name) for name in drawn.__dataclass_fields__}

            common: dict[str, Any] = {"stage": SPEECH, "state": bucket, "uses_up_state": True}
            row = _ints(num_slots)
            for size in sizes.prefill_sizes:
                block = _ints(num_slots, size)
                inputs = {"tokens": block, "kinds": block, "num_tokens": row}
                name = f"prefill.{bucket}.t{size}"
                programs.append(
                    Program(name=name, function=prefill, inputs=inputs, by_platform=size >= BLOCK, **common)
                )
            number = _floats(num_slots)
            inputs = {"key": _keys(num_slots), "temperature": number, "top_p": number, "top_k": row}
            inputs |= {"min_length": row, "max_length": row, "budget": row, "may_end": Shape((num_slots,), np.bool_)}
            programs.append(Program(name=f"decode.{bucket}", function=draw, inputs=inputs, **common))
    return programs, states


def mel_programs(config: Any, sizes: Sizes) -> Made:
    """Steps of the flow for every size of hop and room."""
    programs, states, model = [], {}, FlowMatching(config)
    for room in sizes.rooms:
        shapes = jax.eval_shape(lambda room=room: init_flow_state(config, 1, room))
        tree = _Tree(shapes)
        states[f"r{room}"] = shapes

        def run(params: Any, state: Any, inputs: Any, tree: _Tree = tree) -> Any:
            mel, made = flow_step(model, unflatten(params), tree.unpack(state), Hop(**inputs))
            return tree.pack(made), {"mel": mel}

        for size in sizes.hop_sizes:
            block = _floats(1, FRAMES_PER_TOKEN * size, config.num_mels)
            inputs = {name: _ints(1) for name in ("num_tokens", "num_lookahead", "chunk", "left", "prompt")}
            inputs |= {"speech_tokens": _ints(1, size + LOOKAHEAD), "noise": block, "prompt_mel": block}
            inputs |= {"speaker_embedding": _floats(1, config.speaker_dim)}
            programs.append(
                Program(
                    stage=MEL,
                    name=f"step.r{room}.l{size}",
                    function=run,
                    inputs=inputs,
                    state=f"r{room}",
                    uses_up_state=True,
                    by_platform=True,
                )
            )
    return programs, states


def noise_programs(config: Any, sizes: Sizes) -> Made:
    """Where the flow starts, for every size of hop; there are no parameters."""

    def run(params: Any, state: Any, inputs: Any) -> Any:
        del params, state
        voice, request = (jax.random.wrap_key_data(inputs[name]) for name in ("voice_keys", "request_keys"))
        return {}, {"noise": frame_noise(voice, request, inputs["frames"], inputs["num_prompt"], config.num_mels)}

    inputs = {"voice_keys": _keys(1), "request_keys": _keys(1), "num_prompt": _ints(1)}
    frames = [FRAMES_PER_TOKEN * size for size in sizes.hop_sizes]
    make = lambda n: Program(stage=NOISE, name=f"f{n}", function=run, inputs=inputs | {"frames": _ints(1, n)})  # noqa: E731
    return [make(number) for number in frames], {}


def wave_programs(config: Any, sizes: Sizes) -> Made:
    """Steps of the vocoder; the state is not used up, since a guess behind the end may be thrown away."""
    as_dict = lambda state: {"num_frames": state.num_frames, "tails": state.tails}  # noqa: E731
    shapes = jax.eval_shape(lambda: as_dict(init_vocoder_state(config, 1)))
    tree, vocoder = _Tree(shapes), HiftVocoder(config)

    def run(params: Any, state: Any, inputs: Any) -> Any:
        arguments = (inputs["mel"], jax.random.wrap_key_data(inputs["key"]), HiftState(**tree.unpack(state)))
        arguments = (*arguments, inputs["num_valid"], inputs["total"])
        output, made = vocoder.apply({"params": unflatten(params)}, *arguments, method="step")  # type: ignore[misc]
        return tree.pack(as_dict(made)), {"waveform": output.waveform}

    inputs = {"key": _keys(1), "num_valid": _ints(1), "total": _ints(1)}
    return [
        Program(
            stage=WAVE,
            name=f"step.f{size}",
            function=run,
            inputs=inputs | {"mel": _floats(1, size, config.num_mels)},
            state="one",
        )
        for size in sizes.wave_sizes
    ], {"one": shapes}


def flush_frames(config: Any) -> int:
    """Frames behind the last one that make known what the vocoder holds back."""
    return -(-hold_back(config) // config.mel_hop)


def tokenizer_programs(config: Any, sizes: Sizes) -> Made:
    """Recordings at 16 kHz to speech tokens, the log-mel included."""

    def run(params: Any, state: Any, inputs: Any) -> Any:
        del state
        tree = unflatten(params)
        model_state = tokenizer_state(config, tree)
        mel, num_frames = log_mel_whisper(inputs["waveform"], inputs["num_samples"])
        mel, num_frames = jnp.asarray(mel), jnp.asarray(num_frames)
        tokens, number = encode(config, tree["params"], mel, num_frames, model_state)
        return {}, {"speech_tokens": tokens, "num_speech_tokens": number}

    return list(_recording_programs(TOKENS, run, sizes, WHISPER_RATE_HZ)), {}


def tokenizer_state(config: Any, tree: Any) -> Any:
    """What encoding takes beside parameters; only training looks at averages."""
    if "codebook" not in tree:
        return {}
    state = jax.eval_shape(lambda: nn.unbox(init_model_state(config, jax.random.key(0))))
    return jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), state).replace(codebook=tree["codebook"])


def speaker_programs(config: Any, sizes: Sizes) -> Made:
    """Recordings at 16 kHz to speaker embeddings, the fbank included."""

    def run(params: Any, state: Any, inputs: Any) -> Any:
        del state
        tree = unflatten(params)
        features, num_frames = kaldi_fbank(inputs["waveform"], inputs["num_samples"], subtract_mean=True)
        arrays = jnp.asarray(features), jnp.asarray(num_frames)
        return {}, {"speaker_embedding": embed(config, {"encoder": tree["encoder"]}, {"norms": tree["norms"]}, *arrays)}

    return list(_recording_programs(SPEAKER, run, sizes, FBANK_RATE_HZ)), {}


def prompt_mel_programs(sizes: Sizes) -> Made:
    """Recordings at 24 kHz to the flow's mel, for enrolment; there are no parameters."""

    def run(params: Any, state: Any, inputs: Any) -> Any:
        del params, state
        mel, num_frames = mel_spectrogram(inputs["waveform"], inputs["num_samples"])
        return {}, {"mel": jnp.swapaxes(mel, 1, 2), "num_frames": num_frames}

    return list(_recording_programs(PROMPT_MEL, run, sizes, MEL_RATE_HZ)), {}


def _recording_programs(stage: str, run: Function, sizes: Sizes, rate_hz: int) -> Iterator[Program]:
    for seconds in sizes.recordings:
        inputs = {"waveform": _floats(1, seconds * rate_hz), "num_samples": _ints(1)}
        yield Program(stage=stage, name=f"w{seconds}", function=run, inputs=inputs, by_platform=True)
