"""The table of CAM++'s state dict, batch-norm statistics included (spec/frontends.md 2.3)."""

from cv2jax.convert.rules import Rule

# How many batches a batch norm has seen: torch keeps a count a norm that nothing reads, ours is one number.
IGNORED = (r".*\.num_batches_tracked",)
_IMAGE, _TIME, _POINT = "o i f t -> t f i o", "o i t -> t i o", "o i 1 -> i o"


def campplus_rules() -> tuple[Rule, ...]:
    """Every tensor but IGNORED, and its place in {"encoder": parameters, "norms": statistics} of the speaker encoder."""
    block = "xvector.block{block}.tdnnd{layer}."
    mine = "block{block}_layer{layer}"
    return (
        *_head_rules(),
        _kernel("xvector.tdnn.linear", "tdnn", _TIME),
        *_norm("xvector.tdnn.nonlinear.batchnorm", "tdnn_norm"),
        *_norm(f"{block}nonlinear1.batchnorm", f"{mine}/norm1"),
        _kernel(f"{block}linear1", f"{mine}/bottleneck", _POINT),
        *_norm(f"{block}nonlinear2.batchnorm", f"{mine}/norm2"),
        _kernel(f"{block}cam_layer.linear_local", f"{mine}/context/local", _TIME),
        _kernel(f"{block}cam_layer.linear1", f"{mine}/context/down", _POINT),
        Rule(foreign=f"{block}cam_layer.linear1.bias", ours=f"encoder/{mine}/context/down/bias"),
        _kernel(f"{block}cam_layer.linear2", f"{mine}/context/up", _POINT),
        Rule(foreign=f"{block}cam_layer.linear2.bias", ours=f"encoder/{mine}/context/up/bias"),
        *_norm("xvector.transit{block}.nonlinear.batchnorm", "transit{block}_norm"),
        _kernel("xvector.transit{block}.linear", "transit{block}", _POINT),
        *_norm("xvector.out_nonlinear.batchnorm", "out_norm"),
        _kernel("xvector.dense.linear", "dense", _POINT),
        *_norm("xvector.dense.nonlinear.batchnorm", "dense_norm")[2:],  # not affine
    )


def _kernel(theirs: str, ours: str, axes: str) -> Rule:
    return Rule(foreign=f"{theirs}.weight", ours=f"encoder/{ours}/kernel", axes=axes)


def _norm(theirs: str, ours: str) -> tuple[Rule, ...]:
    return (
        Rule(foreign=f"{theirs}.weight", ours=f"encoder/{ours}/scale"),
        Rule(foreign=f"{theirs}.bias", ours=f"encoder/{ours}/bias"),
        Rule(foreign=f"{theirs}.running_mean", ours=f"norms/{ours}/mean"),
        Rule(foreign=f"{theirs}.running_var", ours=f"norms/{ours}/variance"),
    )


def _head_rules() -> tuple[Rule, ...]:
    block, mine = "head.layer{layer}.{place}.", "head/layer{layer}_{place}/"
    rules: list[Rule] = []
    for theirs, ours in (("head.", "head/"), (block, mine)):
        for number in (1, 2):
            rules.append(_kernel(f"{theirs}conv{number}", f"{ours}conv{number}", _IMAGE))
            rules += _norm(f"{theirs}bn{number}", f"{ours}norm{number}")
    rules.append(_kernel(f"{block}shortcut.0", f"{mine}shortcut", _IMAGE))
    return (*rules, *_norm(f"{block}shortcut.1", f"{mine}shortcut_norm"))
