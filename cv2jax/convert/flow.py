"""The table of the official `flow.pt`: encoder, projections and velocity network (spec/official.md 8.2)."""

from cv2jax.convert.rules import Rule

_LINEAR, _CONV = "o i -> i o", "o i k -> k i o"


def flow_rules() -> tuple[Rule, ...]:
    """Every tensor of the flow's state dict and its place in the parameters of `FlowMatching`."""
    stages = (
        ("down_blocks.0.", "down/"),
        ("mid_blocks.{stage}.", "mid[{stage}]/"),
        ("up_blocks.0.", "up/"),
    )
    estimator = "decoder.estimator."
    return (
        Rule(foreign="input_embedding.weight", ours="encoder/token_embedding"),
        *_affine("spk_embed_affine_layer", "speaker", _LINEAR),
        *_affine("encoder_proj", "encoder_out", _LINEAR),
        *_encoder_rules(),
        *_affine(f"{estimator}time_mlp.linear_1", "estimator/time/up", _LINEAR),
        *_affine(f"{estimator}time_mlp.linear_2", "estimator/time/down", _LINEAR),
        *(rule for theirs, ours in stages for rule in _stage_rules(estimator + theirs, "estimator/" + ours)),
        *_affine(f"{estimator}down_blocks.0.2", "estimator/down_conv", _CONV),
        *_affine(f"{estimator}up_blocks.0.2", "estimator/up_conv", _CONV),
        *_affine(f"{estimator}final_block.block.0", "estimator/final/conv", _CONV),
        *_norm(f"{estimator}final_block.block.2", "estimator/final/norm"),
        *_affine(f"{estimator}final_proj", "estimator/velocity", "o i 1 -> i o"),
    )


def _affine(theirs: str, ours: str, axes: str, bias_axes: str = "") -> tuple[Rule, Rule]:
    kernel = Rule(foreign=f"{theirs}.weight", ours=f"{ours}/kernel", axes=axes)
    return kernel, Rule(foreign=f"{theirs}.bias", ours=f"{ours}/bias", axes=bias_axes)


def _norm(theirs: str, ours: str) -> tuple[Rule, Rule]:
    scale = Rule(foreign=f"{theirs}.weight", ours=f"{ours}/scale")
    return scale, Rule(foreign=f"{theirs}.bias", ours=f"{ours}/bias")


def _encoder_rules() -> tuple[Rule, ...]:
    rules: list[Rule] = []
    for theirs, ours in (("embed", "token_input"), ("up_embed", "frame_input")):
        rules += _affine(f"encoder.{theirs}.out.0", f"encoder/{ours}/linear", _LINEAR)
        rules += _norm(f"encoder.{theirs}.out.1", f"encoder/{ours}/norm")
    rules += _affine("encoder.pre_lookahead_layer.conv1", "encoder/lookahead/ahead", _CONV)
    rules += _affine("encoder.pre_lookahead_layer.conv2", "encoder/lookahead/behind", _CONV)
    rules += _affine("encoder.up_layer.conv", "encoder/upsample", _CONV)
    rules += _norm("encoder.after_norm", "encoder/final_norm")
    for theirs, ours in (("encoders", "blocks"), ("up_encoders", "frame_blocks")):
        at, block = f"encoder.{theirs}.{{layer}}.", f"encoder/{ours}[{{layer}}]/"
        attention = at + "self_attn."
        for letter, name in (("q", "query"), ("k", "key"), ("v", "value")):
            rules += _affine(
                f"{attention}linear_{letter}", f"{block}attention/{name}", "(h c) d -> d h c", "(h c) -> h c"
            )
        rules += _affine(f"{attention}linear_out", f"{block}attention/out", "d (h c) -> h c d")
        rules += [
            Rule(
                foreign=f"{attention}linear_pos.weight",
                ours=f"{block}attention/position_kernel",
                axes="(h c) d -> d h c",
            ),
            Rule(foreign=f"{attention}pos_bias_u", ours=f"{block}attention/content_bias"),
            Rule(foreign=f"{attention}pos_bias_v", ours=f"{block}attention/position_bias"),
        ]
        rules += _affine(f"{at}feed_forward.w_1", f"{block}up", _LINEAR)
        rules += _affine(f"{at}feed_forward.w_2", f"{block}down", _LINEAR)
        rules += _norm(f"{at}norm_mha", f"{block}attention_norm")
        rules += _norm(f"{at}norm_ff", f"{block}mlp_norm")
    return tuple(rules)


def _stage_rules(theirs: str, ours: str) -> tuple[Rule, ...]:
    resnet, block = f"{theirs}0.", f"{theirs}1.{{block}}."
    mine = f"{ours}blocks[{{block}}]/"
    rules = [*_affine(f"{resnet}mlp.1", f"{ours}time", _LINEAR)]
    for name in ("block1", "block2"):
        rules += _affine(f"{resnet}{name}.block.0", f"{ours}{name}/conv", _CONV)
        rules += _norm(f"{resnet}{name}.block.2", f"{ours}{name}/norm")
    rules += _affine(f"{resnet}res_conv", f"{ours}residual", "o i 1 -> i o")
    rules += _norm(f"{block}norm1", f"{mine}attention_norm")
    rules += _norm(f"{block}norm3", f"{mine}mlp_norm")
    for letter, name in (("q", "query"), ("k", "key"), ("v", "value")):
        rules.append(
            Rule(foreign=f"{block}attn1.to_{letter}.weight", ours=f"{mine}{name}/kernel", axes="(h c) d -> d h c")
        )
    rules += _affine(f"{block}attn1.to_out.0", f"{mine}out", "d (h c) -> h c d")
    rules += _affine(f"{block}ff.net.0.proj", f"{mine}mlp/up", _LINEAR)
    rules += _affine(f"{block}ff.net.2", f"{mine}mlp/down", _LINEAR)
    return tuple(rules)
