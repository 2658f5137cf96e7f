"""Speak a text in a voice, to a file or to a pipe while it is made.

MODEL is a bundle (`cv2jax export --to bundle`), or a model directory: text_speech_lm/, flow_matching/ and hift_vocoder/, each
a run or a link to one, and voices/. VOICE is a name there or a file of `cv2jax enroll`. TEXT "-" reads standard input: with
--stream line by line as it comes, each spoken as soon as its words allow and heard to its end before the next is waited for;
else all of it first. So with --stream a line is an utterance: give a sentence or a paragraph on each, and text that is wrapped
without --stream. A long text is split where clauses end.

--out FILE.wav is written whole at the end. --out - writes raw PCM to standard output frame by frame: 16-bit little-endian,
mono, at the model's rate (24 kHz); all messages go to standard error. --stream tells of each frame when it is made. Same seed,
same samples, however they are written. --offline lets the flow see each piece of the text whole, as upstream without
streaming: other samples, none of them before the piece is drawn.

Modes: zero_shot (the voice's recording and its text lead), cross_lingual (no text leads: any language), instruct (--instruct
says how), speaker (a fine-tuned speaker's embedding alone), conversion (--source, a recording of up to 30 s, in this voice;
it is read whole, and heard hop by hop). By default what is given decides.

A request ends "ok"; or "hit_limit" where a piece was cut: by --max_length, by default at 20 speech tokens a text token or
where the model's context is full; "empty" where for the text or a piece of it nothing was drawn; "non_finite"; or "failed".
Of these only "hit_limit" is written to a file, too. All but "ok" make the exit code 3. Times of work are told of voice (its
recording solved), tokenizer (of a source), text, lm, flow and vocoder.

  cv2jax synthesize "Bring the red ball." --model models/mine --voice ann --out ball.wav
  cv2jax synthesize "Bring the red ball." --model models/mine --voice ann --out - | aplay -f S16_LE -r 24000 -c 1
  chat | cv2jax synthesize - --stream --model models/mine --voice ann --out - | aplay -f S16_LE -r 24000 -c 1
"""

import sys
import time

from absl import flags as absl_flags

from cv2jax.config import UserError

EXIT_NOT_WHOLE = 3
USAGE = "TEXT --model MODEL --voice VOICE --out FILE.wav|- [flags]"


def define_flags(flags: absl_flags.FlagValues) -> None:
    """Declares this verb's flags."""
    define = absl_flags
    define.DEFINE_string("model", None, "Model directory or bundle.", flag_values=flags)
    define.DEFINE_string("voice", None, "Name of a voice of the model, or its file.", flag_values=flags)
    define.DEFINE_string("out", None, "File, .wav; or - for raw PCM to standard output.", flag_values=flags)
    define.DEFINE_boolean("stream", False, "Read text as it comes, tell of frames as they are made.", flag_values=flags)
    text = "zero_shot, cross_lingual, instruct, speaker or conversion; by default by what is given."
    define.DEFINE_string("mode", "", text, flag_values=flags)
    define.DEFINE_string("instruct", "", "Instruction: how to speak.", flag_values=flags)
    define.DEFINE_string("speaker", "", "Speaker's name (multi-speaker models).", flag_values=flags)
    define.DEFINE_string("source", "", "Recording to convert into the voice.", flag_values=flags)
    text = "Hear each piece of the text whole, after its last token."
    define.DEFINE_boolean("offline", False, text, flag_values=flags)
    define.DEFINE_integer("seed", 0, "Same seed, same samples.", flag_values=flags)
    define.DEFINE_float("speed", 1.0, "0.5 to 2; 2 is twice as fast.", flag_values=flags)
    define.DEFINE_string("language", "", "Of the text: en, zh, ...; by default detected.", flag_values=flags)
    text = "none, wetext or auto; by default as the corpus was read. Text that arrives is read as it is."
    define.DEFINE_string("normalizer", None, text, flag_values=flags)
    define.DEFINE_float("temperature", 1.0, "0 takes the likeliest token always.", flag_values=flags)
    define.DEFINE_float("top_p", 0.8, "Nucleus; 1 sets no bound.", flag_values=flags)
    define.DEFINE_integer("top_k", 25, "Candidates; 0 sets no bound, a bundle has 1 to 100.", flag_values=flags)
    define.DEFINE_integer("min_length", None, "Speech tokens of a piece at least (25 a second).", flag_values=flags)
    text = "Speech tokens of a piece at most; by default 20 a text token."
    define.DEFINE_integer("max_length", None, text, flag_values=flags)
    define.DEFINE_integer("chunk", None, "Tokens of a chunk; by default as trained.", flag_values=flags)
    text = "Tokens of left context, -1: no bound; by default as trained with that chunk."
    define.DEFINE_integer("left", None, text, flag_values=flags)
    text = "Seconds of work a second of speech, for which hops are planned so that a player never waits."
    define.DEFINE_float("real_time_factor", 0.5, text, flag_values=flags)


def main(args: list[str], flags: absl_flags.FlagValues) -> int | None:
    """Speaks and says how it went."""
    values = flags.flag_values_dict()
    model, out, stream = (values.pop(name) for name in ("model", "out", "stream"))
    for name, value in (("model", model), ("voice", values["voice"]), ("out", out)):
        if not value:
            raise UserError(f"--{name} is missing; see `cv2jax synthesize --help`")
    if len(args) != (0 if values["source"] else 1):
        wanted = "no TEXT beside --source" if values["source"] else 'one TEXT (quoted), or "-"'
        raise UserError(f"expected {wanted}, got {len(args)}")
    from cv2jax.jobs.synthesize import PIPE, SynthesizeOptions, format_result, read_lines, synthesize
    from cv2jax.synthesis.result import Pcm
    from cv2jax.synthesis.sampling import SamplingOptions
    from cv2jax.synthesis.session import Session

    say = sys.stderr if out == PIPE else sys.stdout
    sampling = SamplingOptions(**{name: values.pop(name) for name in ("temperature", "top_p", "top_k")})
    text = args[0] if args else ""
    if text == "-":
        lines = read_lines(sys.stdin.buffer)
        text = lines if stream else "".join(lines)
    begun = time.perf_counter()

    def tell_rate(rate_hz: int) -> None:
        print(f"standard output: raw PCM, 16-bit little-endian, mono, {rate_hz} Hz", file=sys.stderr, flush=True)

    def tell(frame: Pcm, session: Session) -> None:
        last, tokens = frame.first_sample + len(frame.samples) - 1, session.result.num_speech_tokens
        at = time.perf_counter() - begun
        print(f"{at:.3f} s: samples {frame.first_sample} to {last}, {tokens} tokens drawn", file=sys.stderr, flush=True)

    options = SynthesizeOptions(sampling=sampling, **values)
    on_open, on_frame = tell_rate if out == PIPE else None, tell if stream else None
    result = synthesize(model, text, out, options, on_open=on_open, on_frame=on_frame)
    print(format_result(result), file=say)
    return 0 if result.status == "ok" else EXIT_NOT_WHOLE
