"""The rule engine: any table is a bijection or one error; blocks are read, and only those that are asked for."""

import itertools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cv2jax.config import MeshConfig, UserError
from cv2jax.convert.rules import Rule, fold_names, foreign_tensors, load_tree
from cv2jax.parallel.mesh import make_mesh
from cv2jax.parallel.sharding import abstract_state

RULES = (
    Rule(foreign="table", ours="table"),
    Rule(foreign="blocks.{i}.q", ours="net/blocks[{i}]/q", axes="(h c) d -> d h c"),
    Rule(foreign="blocks.{i}.o", ours="net/blocks[{i}]/o", axes="d (h c) -> h c d"),
    Rule(foreign="blocks.{i}.{name}.conv", ours="net/blocks[{i}]/{name}/kernel", axes="o i k -> k i o"),
    Rule(foreign="blocks.{i}.alpha", ours="net/blocks[{i}]/alpha", axes="1 d 1 -> d"),
    *(Rule(foreign="qkv", ours=f"joint/{name}", axes="o i -> i o", part=(i, 3)) for i, name in enumerate("qkv")),
    Rule(foreign="outer.{i}.inner.{j}.w", ours="outer[{i}]/inner[{j}]/w", axes="b a -> a b"),
)


class Arrays:
    """A reader over a dict that notes what it is asked for."""

    place = "somewhere"

    def __init__(self, arrays):
        self.arrays, self.asked = arrays, []

    def names(self):
        return {name: (a.shape, a.dtype) for name, a in self.arrays.items()}

    def read(self, name, index):
        assert len(index) == self.arrays[name].ndim
        self.asked.append((name, index))
        return self.arrays[name][index]


def foreign(layers=2, seed=3):
    rng = np.random.default_rng(seed)
    shapes = {"table": (7, 4), "qkv": (12, 5)}
    for i in range(layers):
        at = f"blocks.{i}."
        shapes |= {at + "q": (12, 8), at + "o": (8, 12), at + "alpha": (1, 6, 1)}
        shapes |= {f"{at}{name}.conv": (6, 5, 3) for name in ("up", "down")}
    shapes |= {f"outer.{i}.inner.{j}.w": (3, 2) for i in range(2) for j in range(3)}
    return {name: rng.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}


def expected(a, scan=True, layers=2):
    """Our tree, written out by hand."""

    def block(i):
        at = f"blocks.{i}."
        return {
            "q": a[at + "q"].T.reshape(8, 4, 3),
            "o": a[at + "o"].T.reshape(4, 3, 8),
            "alpha": a[at + "alpha"][0, :, 0],
            **{name: {"kernel": a[f"{at}{name}.conv"].transpose(2, 1, 0)} for name in ("up", "down")},
        }

    blocks, inner = (
        [block(i) for i in range(layers)],
        [[a[f"outer.{i}.inner.{j}.w"].T for j in range(3)] for i in range(2)],
    )
    if scan:
        net, outer = {"blocks": jax.tree.map(lambda *x: np.stack(x), *blocks)}, {"inner": {"w": np.asarray(inner)}}
        outer = {"outer": outer}
    else:
        net = {f"blocks_{i}": b for i, b in enumerate(blocks)}
        outer = {f"outer_{i}": {f"inner_{j}": {"w": w} for j, w in enumerate(row)} for i, row in enumerate(inner)}
    joint = {name: part.T for name, part in zip("qkv", np.split(a["qkv"], 3), strict=True)}
    return {"table": a["table"], "net": net, "joint": joint, **outer}


def shapes_of(tree):
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, jnp.float32), tree)


def message(rules, arrays, abstract, **options):
    reader = Arrays(arrays)
    with pytest.raises(UserError) as caught:
        load_tree(rules, reader, abstract, **options)
    assert reader.asked == []  # known before anything is read
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("scan", [True, False])
def test_there_and_back(scan):
    arrays = foreign()
    tree = expected(arrays, scan)
    loaded = load_tree(RULES, Arrays(arrays), shapes_of(tree))
    assert jax.tree.structure(loaded) == jax.tree.structure(tree)
    jax.tree.map(np.testing.assert_array_equal, loaded, tree)
    for params in (loaded, tree):  # JAX's arrays and numpy's
        back = foreign_tensors(RULES, params, "there")
        assert set(back) == set(arrays)
        for name, tensor in back.items():
            assert tensor.shape == arrays[name].shape
            np.testing.assert_array_equal(tensor.read(), arrays[name])


def test_scanned_and_unrolled_levels_mix():
    arrays = foreign()
    tree = expected(arrays)
    tree["outer"] = {f"inner_{j}": {"w": tree["outer"]["inner"]["w"][:, j]} for j in range(3)}
    jax.tree.map(np.testing.assert_array_equal, load_tree(RULES, Arrays(arrays), shapes_of(tree)), tree)


def test_values_take_our_dtype():
    arrays = {"table": np.array([[1.0, 1.0 / 3]], jnp.bfloat16)}
    loaded = load_tree(RULES, Arrays(arrays), {"table": jax.ShapeDtypeStruct((1, 2), jnp.float32)})
    assert loaded["table"].dtype == jnp.float32
    np.testing.assert_array_equal(loaded["table"], arrays["table"].astype(np.float32))


def test_shards_are_read_alone_and_once():
    mesh = make_mesh(MeshConfig(fsdp=2, tensor=2))  # and two replicas
    arrays = {name: a for name, a in foreign(layers=3).items() if name.endswith(".q")}
    tree = np.stack([arrays[f"blocks.{i}.q"].T.reshape(8, 4, 3) for i in range(3)])
    for spec, block in (
        ((None, "fsdp", "tensor"), (6, 4)),
        ((None, "tensor"), (12, 4)),
        ((None, None, "fsdp"), (6, 8)),
    ):
        sharding = jax.NamedSharding(mesh, jax.P(*spec))
        abstract = {"net": {"blocks": {"q": jax.ShapeDtypeStruct(tree.shape, jnp.float32, sharding=sharding)}}}
        reader = Arrays(arrays)
        found = load_tree(RULES, reader, abstract)["net"]["blocks"]["q"]
        assert found.sharding == sharding
        np.testing.assert_array_equal(found, tree)
        assert {tuple(cut.stop - cut.start for cut in index) for _, index in reader.asked} == {block}
        once = {(name, str(index)) for name, index in reader.asked}
        assert len(reader.asked) == len(once) == 3 * 96 // (block[0] * block[1])


def test_an_inner_axis_of_a_foreign_one_may_be_sharded_too():
    mesh = make_mesh(MeshConfig(tensor=2))
    arrays = {"blocks.0.q": np.arange(12.0 * 8, dtype=np.float32).reshape(12, 8)}
    tree = arrays["blocks.0.q"].T.reshape(8, 2, 6)
    sharding = jax.NamedSharding(mesh, jax.P(None, None, "tensor"))
    abstract = {"net": {"blocks_0": {"q": jax.ShapeDtypeStruct(tree.shape, jnp.float32, sharding=sharding)}}}
    found = load_tree(RULES, Arrays(arrays), abstract)["net"]["blocks_0"]["q"]
    assert found.sharding == sharding
    np.testing.assert_array_equal(found, tree)
    np.testing.assert_array_equal(
        foreign_tensors(RULES, {"net": {"blocks_0": {"q": found}}}, "x")["blocks.0.q"].read(), arrays["blocks.0.q"]
    )


def test_everything_wrong_is_in_one_error():
    arrays = foreign(layers=4)
    tree = shapes_of(expected(foreign(layers=2)))
    del arrays["blocks.1.up.conv"]
    del arrays["table"]
    arrays["blocks.0.o"] = arrays["blocks.0.o"].T
    arrays["blocks.1.q"] = arrays["blocks.1.q"].astype(np.int32)
    tree["strange"] = {"thing": jax.ShapeDtypeStruct((2,), jnp.float32)}
    del tree["joint"]["k"]
    text = message(RULES, arrays, tree)
    assert text.startswith("somewhere does not fit the model: 2 missing: blocks.1.up.conv, table; ")
    left = ", ".join(f"blocks.{{2-3}}.{name}" for name in ("q", "o", "alpha", "up.conv", "down.conv"))
    assert f"11 left over: {left}, qkv (2 of 3 parts); " in text
    assert "blocks.0.o is [12 8] and must be [8 12]" in text
    assert "blocks.1.q is int32 and must be like float32" in text
    assert "1 of ours without a counterpart: strange/thing" in text


def test_equal_misfits_of_many_layers_are_told_once():
    arrays = foreign(layers=12)
    tree = shapes_of(expected(arrays, layers=12))
    for i in range(12):
        arrays[f"blocks.{i}.o"] = np.zeros((8, 9 if i == 10 else 6), np.float32)
    text = message(RULES, arrays, tree)
    shapes = "blocks.{0-9,11}.o is [8 6] and must be [8 12], blocks.10.o is [8 9] and must be [8 12]; take"
    assert f"12 of another shape: {shapes}" in text


@pytest.mark.parametrize("seed", range(8))
def test_folded_names_say_exactly_which(seed):
    """Whatever lies in a folded name is there, and nothing else; each once."""
    rng = np.random.default_rng(seed)
    makers = (
        lambda: f"outer.{rng.integers(3)}.inner.{rng.integers(12)}.w",
        lambda: f"a/blocks_{rng.integers(4)}/conv1 is [{rng.integers(2)} 3]",
        lambda: f"{rng.integers(3)}.x.{rng.integers(2)}",
        lambda: rng.choice(["x", "x.1", "x.01", "layer2.w", "layer3.w"]),
    )
    names = [str(makers[rng.integers(4)]()) for _ in range(90)]
    folded = fold_names(names)

    def unfold(name):
        pieces = re.split(r"\{([\d,-]+)\}", name)
        for at in range(1, len(pieces), 2):
            ends = [[int(end) for end in span.split("-")] for span in pieces[at].split(",")]
            pieces[at] = [str(n) for span in ends for n in range(span[0], span[-1] + 1)]
        return ["".join(row) for row in itertools.product(*([p] if isinstance(p, str) else p for p in pieces))]

    found = list(itertools.chain.from_iterable(map(unfold, folded)))
    assert sorted(found) == sorted(set(names))
    assert len(folded) < len(found) / 2


def test_names_fold_over_all_their_numbers():
    names = [f"outer.{i}.inner.{j}.w" for i in (3, 0, 1) for j in range(12)]
    assert fold_names(["head", *names, "tail.2"]) == ["head", "outer.{0-1,3}.inner.{0-11}.w", "tail.2"]
    assert fold_names(names[:-1]) == ["outer.{0,3}.inner.{0-11}.w", "outer.1.inner.{0-10}.w"]
    assert fold_names(["net/blocks_0/q", "net/blocks_1/q"]) == ["net/blocks_{0-1}/q"]
    assert fold_names([]) == []


def test_a_missing_part_is_told_both_ways():
    tree = expected(foreign())
    del tree["joint"]["v"]
    assert "1 left over: qkv (2 of 3 parts)" in message(RULES, foreign(), shapes_of(tree))
    with pytest.raises(UserError, match=r"there does not fit.*1 cannot be made whole: qkv \(2 of 3 parts\)"):
        foreign_tensors(RULES, tree, "there")
    with pytest.raises(UserError, match="1 have no counterpart: other"):
        foreign_tensors(RULES, {"other": np.zeros(2)}, "there")


def test_known_names_are_passed_over_whole():
    arrays = {"table": np.zeros((2, 2), np.float32), "head.weight": np.zeros(3, np.float32)}
    abstract = {"table": jax.ShapeDtypeStruct((2, 2), jnp.float32)}
    reader = Arrays(arrays)
    load_tree(RULES, reader, abstract, ignored=[r"head\.\w+"])
    assert [name for name, _ in reader.asked] == ["table"]
    assert "left over: head.weight" in message(RULES, arrays, abstract, ignored=["head"])


@pytest.mark.parametrize(
    ("rules", "tree", "reason"),
    [
        ((Rule(foreign="a", ours="x"), Rule(foreign="b", ours="x")), {"x": np.zeros(2)}, "x: two rules"),
        ((Rule(foreign="a", ours="{n}"),), {"x": np.zeros(2), "y": np.zeros(2)}, "a: two places in our tree, x and y"),
        ((Rule(foreign="a", ours="x", axes="o i -> i o"),), {"x": np.zeros(2)}, "has 2 axes for an array of shape"),
        ((Rule(foreign="a", ours="x", axes="o -> i"),), {"x": np.zeros(2)}, "the same axes, each once"),
        ((Rule(foreign="a", ours="x", axes="i i -> i"),), {"x": np.zeros(2)}, "the same axes, each once"),
    ],
)
def test_a_wrong_table_is_our_error(rules, tree, reason):
    with pytest.raises(ValueError, match=reason):
        foreign_tensors(rules, tree, "x")


def test_shardings_of_an_abstract_state_are_kept():
    mesh = make_mesh(MeshConfig(fsdp=4))
    abstract, shardings = abstract_state(lambda key: {"table": jnp.zeros((4, 2))}, mesh)
    loaded = load_tree(RULES, Arrays({"table": np.ones((4, 2), np.float32)}), abstract)
    assert loaded["table"].sharding == shardings["table"]


def test_a_scaled_rule_is_exact_both_ways_and_scales_shards_and_stacks():
    rules = (
        Rule(foreign="w", ours="w", axes="o i -> i o", scale=1 / 128),
        Rule(foreign="b.{i}.w", ours="b[{i}]/w", scale=4.0),
        Rule(foreign="h", ours="h", scale=2.0**-20),
    )
    rng = np.random.default_rng(0)
    arrays = {"w": rng.standard_normal((4, 6)).astype(np.float32)}
    arrays |= {f"b.{i}.w": rng.standard_normal(3).astype(np.float32) for i in range(2)}
    arrays |= {"h": np.array([1 / 3], np.float16)}  # which could not hold a millionth of it
    mesh = make_mesh(MeshConfig(fsdp=2))
    sharding = jax.NamedSharding(mesh, jax.P("fsdp"))
    abstract = {
        "w": jax.ShapeDtypeStruct((6, 4), jnp.float32, sharding=sharding),
        "b": {"w": jax.ShapeDtypeStruct((2, 3), jnp.float32)},
        "h": jax.ShapeDtypeStruct((1,), jnp.float32),
    }
    loaded = load_tree(rules, Arrays(arrays), abstract)
    np.testing.assert_array_equal(loaded["w"], arrays["w"].T / 128)
    np.testing.assert_array_equal(loaded["b"]["w"], [4 * arrays[f"b.{i}.w"] for i in range(2)])
    np.testing.assert_array_equal(loaded["h"], arrays["h"].astype(np.float32) / 2**20)
    for name, tensor in foreign_tensors(rules, loaded, "there").items():
        np.testing.assert_array_equal(tensor.read(), arrays[name])


@pytest.mark.parametrize("scale", [0.0, 3.0, -2.0, 0.1, float("nan"), float("inf")])
def test_a_scale_that_could_round_is_refused(scale):
    with pytest.raises(ValueError, match=r"rule net/w: scale .* must be a power of two"):
        Rule(foreign="w", ours="net/w", scale=scale)


def test_arrays_for_the_host_are_numpys_and_the_largest_is_read_first():
    arrays = foreign()
    reader = Arrays(arrays)
    shapes = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype), expected(arrays))
    loaded = load_tree(RULES, reader, shapes, on_host=True)
    assert all(type(leaf) is np.ndarray for leaf in jax.tree.leaves(loaded))
    jax.tree.map(np.testing.assert_array_equal, loaded, expected(arrays))
    sizes = [arrays[name].size for name, _ in reader.asked]
    assert sizes[0] == max(sizes)
    assert reader.asked[0][0].startswith("blocks.0.")
    assert list(loaded) == list(shapes)
