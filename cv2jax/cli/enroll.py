"""Make a voice of a recording: one file that zero-shot, cross-lingual, instruct and conversion take.

AUDIO is a few seconds of one speaker (3 to 10 are best, 30 at most). MODEL is a model directory: one run a stage, named by
its task, or links to runs; this verb needs its speech_tokenizer/ and speaker_encoder/. A bundle
made of one will do too. --text is what the recording says: zero-shot needs it, exactly; cross-lingual, instruct and conversion
do not.

The clip is checked first: length, silence, noise, clipping, words cut off at either end, level, rate, and whether the text
can be of it. What will not do is refused (exit code 2), the rest is told and kept in the voice. --trim cuts silence before
and behind the speech, never speech, so that little of the prompt has to be solved again with each request: prompts that are
whole chunks and the look-ahead long are best, and it says which lengths are.

--embedding_from names more recordings of the speaker: the embedding is the mean of all. --speaker_embedding takes it from a
file of `cv2jax embed`; without AUDIO the voice is that alone, for models fine-tuned to speakers.

  cv2jax enroll ann.wav --model models/mine --text "It was a bright cold day." --out models/mine/voices/ann.safetensors
  cv2jax enroll --speaker_embedding embeddings.npz:ann --out ann.safetensors
"""

from absl import flags as absl_flags

from cv2jax.config import UserError

USAGE = "[AUDIO] --model MODEL --out VOICE.safetensors [--text WORDS] [flags]"


def define_flags(flags: absl_flags.FlagValues) -> None:
    """Declares this verb's flags."""
    define = absl_flags
    define.DEFINE_string("model", None, "Model directory or bundle.", flag_values=flags)
    define.DEFINE_string("out", None, "File for the voice, .safetensors.", flag_values=flags)
    define.DEFINE_string("text", None, "What the recording says.", flag_values=flags)
    define.DEFINE_string("language", "", "Language of the recording: en, cmn, ja, ko, ...", flag_values=flags)
    define.DEFINE_string("name", "", "Name of the voice; by default that of its file.", flag_values=flags)
    define.DEFINE_integer("seed", 0, "Of the noise that the recording's frames start from.", flag_values=flags)
    text = "Another recording of the speaker; may be repeated."
    define.DEFINE_multi_string("embedding_from", [], text, flag_values=flags)
    text = "FILE.npz:ID, a speaker or utterance of `cv2jax embed`."
    define.DEFINE_string("speaker_embedding", "", text, flag_values=flags)
    text = "Tokens of a chunk of the mask that will stream; by default one that the flow was trained for."
    define.DEFINE_integer("chunk", None, text, flag_values=flags)
    define.DEFINE_boolean("trim", True, "Cut silence at the ends.", flag_values=flags)


def main(args: list[str], flags: absl_flags.FlagValues) -> int | None:
    """Runs the job and prints what the voice is."""
    if len(args) > 1:
        raise UserError(f"expected one AUDIO, got {len(args)}; more recordings of the speaker go to --embedding_from")
    values = flags.flag_values_dict()
    model, out = values.pop("model"), values.pop("out")
    if out is None:
        raise UserError("--out is missing: give the file for the voice, .safetensors")
    values["embedding_from"] = tuple(values["embedding_from"])
    from cv2jax.jobs.enroll import EnrollOptions, describe_chunks, enroll

    result = enroll(model, args[0] if args else None, out, EnrollOptions(**values))
    voice = result.voice
    if not args:
        print(
            f"{out}: '{voice.name}', an embedding of {len(voice.speaker_embedding)}; encoder {voice.speaker_encoder[:16]}"
        )
        return 0
    tokens = len(voice.speech_tokens)
    cut = f", {result.cut_start:.2f} s and {result.cut_end:.2f} s of silence cut off its ends" * bool(
        result.cut_start or result.cut_end
    )
    like = ", ".join(f"{cosine:.2f}" for cosine in result.similarities)
    print(
        f"{out}: '{voice.name}', {tokens / 25:.2f} s, {tokens} tokens{cut}; {len(result.findings)} warnings; tokenizer"
        f" {voice.speech_tokenizer[:16]}, encoder {voice.speaker_encoder[:16]}"
    )
    if like:
        print(f"like the recording, of 1: {like}")
    if chunks := describe_chunks(result):
        print(chunks)
    return 0
