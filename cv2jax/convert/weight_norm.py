"""Kernels under torch's weight normalisation, w = g · v / ‖v‖, as one plain tensor and back.

The pair (g, v) of a module is called `weight_g`, `weight_v` (the old hook) or `parametrizations.weight.original0`,
`…original1` (the parametrisation); folded it is `weight`. The norm is over all axes but the first: the outputs, of a
transposed convolution the inputs. Rules see folded tensors through `FoldedReader`, files pairs through `unfold_tensors`.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping

import numpy as np
from jaxtyping import Float, Shaped

from cv2jax.convert.rules import ForeignTensor, Index, Reader, Shape

OLD = ("weight_g", "weight_v")
NEW = ("parametrizations.weight.original0", "parametrizations.weight.original1")
Pair = tuple[str, str]


def fold(g: Float[np.ndarray, "n *ones"], v: Float[np.ndarray, "n *rest"]) -> Float[np.ndarray, "n *rest"]:
    """g · v / ‖v‖ with the norm over all axes but the first, in fp32; 0 where v is, which torch makes NaN.

    Of a pair of another type too: the official loader makes both fp32 before they are multiplied.
    """
    norm = _norm(v)
    return (v.astype(np.float32) * (g.astype(np.float64) / np.where(norm == 0, 1, norm))).astype(np.float32)


def unfold(kernel: Float[np.ndarray, "n *rest"]) -> tuple[Float[np.ndarray, "n *ones"], Float[np.ndarray, "n *rest"]]:
    """(g, v) = (‖kernel‖, kernel), which fold to the kernel; v is 1 where a row is 0, so that torch folds it too."""
    norm = _norm(kernel)
    return norm.astype(kernel.dtype), np.where(norm == 0, np.ones((), kernel.dtype), kernel)


def _norm(v: Float[np.ndarray, "n *rest"]) -> Float[np.ndarray, "n *ones"]:
    return np.sqrt(
        np.sum(np.square(v.astype(np.float32), dtype=np.float64), axis=tuple(range(1, v.ndim)), keepdims=True)
    )


@dataclasses.dataclass(frozen=True)
class FoldedReader:
    """The tensors of `reader`, each pair of a weight normalisation as the one `….weight` that it stands for.

    Half a pair stays under its own name, so that a conversion reports it as left over.
    """

    reader: Reader

    @property
    def place(self) -> str:
        """Of the reader within."""
        return self.reader.place

    def names(self) -> Mapping[str, tuple[Shape, np.dtype]]:
        """Shape and dtype of every tensor, folded."""
        theirs = self.reader.names()
        folded = {name: (theirs[v][0], np.dtype(np.float32)) for name, (_, v) in self.pairs.items()}
        halves = {half for pair in self.pairs.values() for half in pair}
        return {name: facts for name, facts in theirs.items() if name not in halves} | folded

    def read(self, name: str, index: Index) -> Shaped[np.ndarray, "..."]:
        """The block `index` of a tensor; of a pair all of the rows is read, whose norm it takes."""
        if name not in self.pairs:
            return self.reader.read(name, index)
        g, v = self.pairs[name]
        shape = self.reader.names()[v][0]
        rows, rest = index[:1], tuple(index[1:])
        whole = (slice(None),) * (len(shape) - 1)
        return fold(self.reader.read(g, (*rows, *whole)), self.reader.read(v, (*rows, *whole)))[(slice(None), *rest)]

    def pair(self, name: str) -> tuple[Shaped[np.ndarray, "n *ones"], Shaped[np.ndarray, "n *rest"]] | None:
        """(g, v) of a folded kernel as the file has them; None of a tensor that is no pair."""
        if name not in self.pairs:
            return None
        theirs = self.reader.names()
        g, v = (self.reader.read(half, (slice(None),) * len(theirs[half][0])) for half in self.pairs[name])
        return g, v

    @functools.cached_property
    def pairs(self) -> dict[str, Pair]:
        """Folded name → (name of g, name of v)."""
        theirs = self.reader.names()
        found = {}
        for style in (OLD, NEW):
            for name in theirs:
                start = name.removesuffix(style[0])
                if start != name and start + style[1] in theirs:
                    found[f"{start}weight"] = (name, start + style[1])
        return found


def unfold_tensors(
    tensors: Mapping[str, ForeignTensor], style: Callable[[str], Pair | None], kept: FoldedReader | None = None
) -> dict[str, ForeignTensor]:
    """Tensors to write, each `….weight` for which `style` gives OLD or NEW as its pair; None: as it is.

    `kept`: the file that they came from. Many pairs fold to one kernel: one that has not changed keeps the pair it had.
    """
    written: dict[str, ForeignTensor] = {}
    for name, tensor in tensors.items():
        pair = style(name) if name.endswith(".weight") else None
        if pair is None:
            written[name] = tensor
            continue
        start = name.removesuffix("weight")
        ones = (tensor.shape[0], *(1 for _ in tensor.shape[1:]))
        for part, shape in enumerate((ones, tensor.shape)):
            read = functools.partial(_unfolded, tensor, part, name, kept)
            written[start + pair[part]] = ForeignTensor(shape=shape, read=read)
    return written


def _unfolded(tensor: ForeignTensor, part: int, name: str, kept: FoldedReader | None) -> Shaped[np.ndarray, "..."]:
    kernel = tensor.read()
    pair = kept.pair(name) if kept is not None else None
    if pair is not None and np.array_equal(fold(*pair).astype(kernel.dtype), kernel):
        return pair[part].astype(kernel.dtype)
    return unfold(kernel)[part]
