"""The table of the S3 tokenizer's state dict: Encoder1 and the projection of FSQ (spec/frontends.md 1.4)."""

from cv2jax.convert.rules import Rule

_LINEAR, _CONV = "o i -> i o", "o i k -> k i o"


def speech_tokenizer_rules() -> tuple[Rule, ...]:
    """Every tensor of the state dict and its place in the ENCODING_PARTS of `SpeechTokenizer`, quantizer `fsq`."""
    block, mine = "encoder.blocks.{layer}.", "encoder/stack/blocks[{layer}]/"
    attention = f"{mine}attention/"
    rules: list[Rule] = []
    for name in ("conv1", "conv2"):
        rules += _affine(f"encoder.{name}", f"encoder/{name}", _CONV)
    for name in ("query", "key", "value"):
        kernel, bias = _affine(f"{block}attn.{name}", attention + name, "(h c) d -> d h c", "(h c) -> h c")
        rules += [kernel] if name == "key" else [kernel, bias]  # as Whisper's, keys have no bias
    rules += _affine(f"{block}attn.out", f"{attention}out", "d (h c) -> h c d")
    memory = f"{block}attn.fsmn_block.weight"
    rules.append(Rule(foreign=memory, ours=f"{attention}fsmn/kernel", axes="(h c) 1 k -> k h c"))
    for theirs, ours in (("attn_ln", "attention_norm"), ("mlp_ln", "mlp_norm")):
        rules.append(Rule(foreign=f"{block}{theirs}.weight", ours=f"{mine}{ours}/scale"))
        rules.append(Rule(foreign=f"{block}{theirs}.bias", ours=f"{mine}{ours}/bias"))
    rules += _affine(f"{block}mlp.0", f"{mine}mlp/up", _LINEAR)
    rules += _affine(f"{block}mlp.2", f"{mine}mlp/down", _LINEAR)
    return (*rules, *_affine("quantizer._codebook.project_down", "quantizer/project_down", _LINEAR))


def _affine(theirs: str, ours: str, axes: str, bias_axes: str = "") -> tuple[Rule, Rule]:
    kernel = Rule(foreign=f"{theirs}.weight", ours=f"{ours}/kernel", axes=axes)
    return kernel, Rule(foreign=f"{theirs}.bias", ours=f"{ours}/bias", axes=bias_axes)
