"""Join a manifest's texts and its speech tokens into the token corpus that the language model is trained on.

MANIFEST is the one that was encoded, --speech what `cv2jax encode` (or another tool, in the same format) wrote for it; both
are joined by id, and an utterance without a text or without tokens is left out and counted. Texts are tokenised with the
Qwen2 tokenizer in --text_tokenizer, or with a small byte-level BPE that is trained here on the texts of --train_split: its
vocabulary is chosen, or checked, so that a text token stands for 4 to 12 speech tokens. The tokenizer is copied into the
corpus, loadable by transformers' AutoTokenizer.

Zero-shot synthesis puts the text behind a recording and its transcript. A model that heard single short sentences only does
not go on from one: --continuations lets it hear pairs of a speaker's utterances too.

  cv2jax encode runs/tokenizer corpus/manifest.jsonl --out tokens.jsonl
  cv2jax tokenize corpus/manifest.jsonl --speech tokens.jsonl --out token_corpus
  cv2jax tokenize m.jsonl --speech t.npz --text_tokenizer CosyVoice-BlankEN --prefix speaker --out token_corpus
"""

from absl import flags as absl_flags

from cv2jax.config import UserError

USAGE = "MANIFEST --speech TOKENS.jsonl|TOKENS.npz --out DIR [flags]"


def define_flags(flags: absl_flags.FlagValues) -> None:
    """Declares this verb's flags."""
    define = absl_flags
    define.DEFINE_string("speech", None, "Speech tokens by id: .jsonl or .npz.", flag_values=flags)
    define.DEFINE_string("out", None, "New directory for the token corpus.", flag_values=flags)
    define.DEFINE_string(
        "text_tokenizer", "", "Directory of a Qwen2 tokenizer; by default one is trained.", flag_values=flags
    )
    define.DEFINE_integer("vocabulary_size", 0, "Of the tokenizer that is trained; 0 chooses.", flag_values=flags)
    text = (
        "Never let a text token span two Chinese characters; by default as the tokenizer says, yes for a trained one."
    )
    define.DEFINE_boolean("single_chinese", None, text, flag_values=flags)
    define.DEFINE_string("train_split", "train", "Split whose texts train the text tokenizer.", flag_values=flags)
    text = "What goes in front of each text: none, instruct (where the manifest has one) or speaker."
    define.DEFINE_string("prefix", "none", text, flag_values=flags)
    text = "Read texts as synthesis will: none, wetext or auto; by default texts stay as they are."
    define.DEFINE_string("normalizer", "", text, flag_values=flags)
    text = "Also write each training utterance behind the one before of its speaker, for zero-shot synthesis."
    define.DEFINE_boolean("continuations", False, text, flag_values=flags)
    define.DEFINE_integer("num_codes", 6561, "Size of the speech tokenizer's codebook.", flag_values=flags)


def main(args: list[str], flags: absl_flags.FlagValues) -> int | None:
    """Runs the job and prints what it did."""
    if len(args) != 1:
        raise UserError(f"expected one MANIFEST, got {len(args)} arguments; see `cv2jax tokenize --help`")
    values = flags.flag_values_dict()
    for name, mend in (("speech", "the file that `cv2jax encode` wrote"), ("out", "a new directory")):
        if values[name] is None:
            raise UserError(f"--{name} is missing: give {mend}")
    from cv2jax.jobs.tokenize import tokenize

    out = values["out"]
    result = tokenize(args[0], **values)
    print(
        f"{out}: {result.num_utterances} utterances, {result.num_text_tokens} text and {result.num_speech_tokens}"
        f" speech tokens ({result.ratio:.2f} to one), text vocabulary {result.vocabulary_size}; left out: "
        f"{result.num_without_text} without text, {result.num_without_speech} without speech,"
        f" {result.num_refused} refused"
    )
    if result.num_continuations:
        print(f"and {result.num_continuations} utterances once more, behind the one before of their speaker")
    return 0
