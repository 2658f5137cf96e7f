"""Floating-point operations of a traced function: 2 for each multiply-add of its matrix products, convolutions and FFTs.

Counted from the jaxpr, where a scan says its length, a kernel its grid and a recomputation that it is one. All else
(elementwise work, sorting, gathers) is not counted: it is bound by memory, which `hlo.py` counts.
"""

import dataclasses
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import ClosedJaxpr, Jaxpr, JaxprEqn, Literal, Var
from jax.interpreters import partial_eval

from cv2jax.parallel.windows import count_taps

# The name stack of what jax.checkpoint computes again for a gradient, in jaxprs and in the metadata of HLO.
RECOMPUTED = "rematted_computation"
_BACKWARD = "transpose("  # of what runs backward


@dataclasses.dataclass(frozen=True)
class Work:
    """What a function computes over all devices.

    Attributes:
      flops: with everything that rematerialisation computes again.
      recomputed: of these, what rematerialisation computes again.
      kernels: name of a Pallas kernel → (calls on one device, flops of them all on one device).
    """

    flops: float = 0.0
    recomputed: float = 0.0
    kernels: dict[str, tuple[float, float]] = dataclasses.field(default_factory=dict)

    @property
    def model_flops(self) -> float:
        """What the function needs, however it is rematerialised."""
        return self.flops - self.recomputed

    def __add__(self, other: "Work") -> "Work":
        kernels = dict(self.kernels)
        for name, (calls, flops) in other.kernels.items():
            before = kernels.get(name, (0.0, 0.0))
            kernels[name] = (before[0] + calls, before[1] + flops)
        return Work(self.flops + other.flops, self.recomputed + other.recomputed, kernels)

    def times(self, count: float, *, devices: float = 1.0) -> "Work":
        """The work of `count` calls on each of `devices` devices that hold different parts."""
        kernels = {name: (calls * count, flops * count) for name, (calls, flops) in self.kernels.items()}
        return Work(self.flops * count * devices, self.recomputed * count * devices, kernels)


def count_flops(function: Callable[..., Any], *args: Any) -> float:
    """FLOPs of function(*args), rematerialisation left out (`Work.model_flops`); args may be ShapeDtypeStructs."""
    return count_work(jax.make_jaxpr(function)(*args)).model_flops


def count_work(traced: ClosedJaxpr) -> Work:
    """The work of what a jaxpr's results need: scans times their length, of a cond the dearest branch.

    A while loop counts one trip, as nobody knows how many it makes.
    The body of a `shard_map` counts once for each device that holds a different part; a Pallas kernel once for each step
    of its grid, of splash attention once for each block that its mask does not skip.
    """
    jaxpr, _ = partial_eval.dce_jaxpr(traced.jaxpr, [True] * len(traced.jaxpr.outvars), instantiate=True)
    return _count(jaxpr, {}, traced.consts)[0]


# Of arrays that are known when traced, the share that is not 0: how full the tables of splash attention's masks are. What
# only moves an array about leaves it as it is, and so may be looked through on the way to a kernel.
Shares = dict[Var, float]
_MOVES = frozenset(("reshape", "broadcast_in_dim", "convert_element_type", "squeeze", "expand_dims", "transpose"))
_MOVES |= frozenset(("copy", "name", "sharding_constraint", "optimization_barrier", "pvary", "pcast"))


def _count(jaxpr: Jaxpr, shares: Shares, consts: Sequence[Any]) -> tuple[Work, list[float | None]]:
    """The work of a jaxpr, of whose inputs these shares are known; and the shares of its results."""
    total, shares = Work(), dict(shares)
    for variable, value in zip(jaxpr.constvars, consts, strict=False):
        _learn(shares, variable, _share_of(value))
    for equation in jaxpr.eqns:
        work, found = _count_equation(equation, shares)
        if work.flops and RECOMPUTED in str(equation.source_info.name_stack):
            work = dataclasses.replace(work, recomputed=work.flops)
        total = total + work
        for variable, share in zip(equation.outvars, found, strict=False):
            _learn(shares, variable, share)
    return total, [_known(variable, shares) for variable in jaxpr.outvars]


def _learn(shares: Shares, variable: Var, share: float | None) -> None:
    if share is not None:
        shares[variable] = share


def _share_of(value: Any) -> float | None:
    if not isinstance(value, np.ndarray | jax.Array) or not jnp.issubdtype(value.dtype, jnp.integer) or not value.size:
        return None
    return float(np.count_nonzero(np.asarray(value))) / value.size


def _known(operand: Any, shares: Shares) -> float | None:
    return _share_of(operand.val) if isinstance(operand, Literal) else shares.get(operand)


def _count_equation(equation: JaxprEqn, shares: Shares) -> tuple[Work, list[float | None]]:
    name, params = equation.primitive.name, equation.params
    operands = [_known(operand, shares) for operand in equation.invars]
    if name in _FORMULAS:
        return Work(_FORMULAS[name](equation)), []
    if name in _MOVES:
        return Work(), operands
    if name == "scan":
        first, carried = params["num_consts"], params["num_carry"]
        inputs = operands[:first] + [None] * carried + operands[first + carried :]
        work, found = _inner(params["jaxpr"], inputs)
        return work.times(float(params["length"])), [None] * carried + found[carried:]
    if name == "while":
        return _inner(params["cond_jaxpr"], [])[0] + _inner(params["body_jaxpr"], [])[0], []
    if name == "cond":
        branches = [_inner(branch, operands[1:])[0] for branch in params["branches"]]
        return max(branches, key=lambda work: work.flops), []
    if name == "pallas_call":
        return _count_kernel(equation, operands), []
    if name == "shard_map":
        mesh, specs = params["mesh"], params["in_specs"]
        names = {axis for spec in specs for entry in spec if entry for axis in _as_tuple(entry)}
        work, found = _inner(params["jaxpr"], operands)
        return work.times(1.0, devices=float(math.prod(mesh.shape[axis] for axis in names))), found
    total, found = Work(), []
    for inner in _jaxprs(params):
        work, found = _inner(inner, operands)
        total = total + work
    return total, found


def _inner(inner: ClosedJaxpr | Jaxpr, operands: Sequence[float | None]) -> tuple[Work, list[float | None]]:
    """The work of an equation's own jaxpr and the shares of its results, by those of its first inputs."""
    jaxpr, consts = (inner.jaxpr, inner.consts) if isinstance(inner, ClosedJaxpr) else (inner, ())
    passed = {v: share for v, share in zip(jaxpr.invars, operands, strict=False) if share is not None}
    return _count(jaxpr, passed, consts)


def _jaxprs(params: dict[str, Any]) -> Iterator[ClosedJaxpr | Jaxpr]:
    for value in params.values():
        for item in value if isinstance(value, tuple | list) else (value,):
            if isinstance(item, ClosedJaxpr | Jaxpr):
                yield item


def _as_tuple(entry: Any) -> tuple[Any, ...]:
    return entry if isinstance(entry, tuple) else (entry,)


def _count_kernel(equation: JaxprEqn, operands: Sequence[float | None]) -> Work:
    """A kernel's body for each step of its grid; where it says what a call costs and has no products, that.

    Splash attention gets its mask as tables before its operands, of which the second says of each step of the grid
    (heads and rows apart, which share it) whether the block is computed; a mask without any has no tables.
    """
    params = equation.params
    grid, name = params["grid_mapping"], params["name"]
    steps = float(math.prod(size for size in grid.grid if isinstance(size, int)))
    body = _inner(params["jaxpr"], [])[0].flops
    if name.startswith("splash") and grid.num_index_operands > 1 and operands[1] is not None:
        steps *= operands[1]
    flops = body * steps
    if not body and params["cost_estimate"] is not None:
        flops = float(params["cost_estimate"].flops)
    return Work(flops, 0.0, {name: (1.0, flops)})


def _aval(variable: Any) -> Any:
    return variable.aval


def _dot(equation: JaxprEqn) -> float:
    (contracted, _), _ = equation.params["dimension_numbers"]
    shape = _aval(equation.invars[0]).shape
    return 2.0 * _aval(equation.outvars[0]).size * math.prod(shape[axis] for axis in contracted)


def _ragged_dot(equation: JaxprEqn) -> float:
    numbers = equation.params["ragged_dot_dimension_numbers"].dot_dimension_numbers
    shape = _aval(equation.invars[0]).shape
    return 2.0 * _aval(equation.outvars[0]).size * math.prod(shape[axis] for axis in numbers[0][0])


def _convolution(equation: JaxprEqn) -> float:
    params, (lhs, rhs) = equation.params, (_aval(v).shape for v in equation.invars)
    out = _aval(equation.outvars[0]).shape
    numbers = params["dimension_numbers"]
    (_, _, *lhs_axes), (_, rhs_in, *rhs_axes) = numbers.lhs_spec, numbers.rhs_spec
    out_batch, out_features, *out_axes = numbers.out_spec
    flops = 2.0 * out[out_batch] * out[out_features] * rhs[rhs_in]  # of groups the kernel has only its own inputs
    windows = zip(
        params["window_strides"], params["padding"], params["lhs_dilation"], params["rhs_dilation"], strict=True
    )
    for axis, (stride, (low, _), dilation, kernel_dilation) in enumerate(windows):
        sizes = lhs[lhs_axes[axis]], out[out_axes[axis]], rhs[rhs_axes[axis]]
        flops *= count_taps(*sizes, stride, low, dilation, kernel_dilation)
    return flops


def _fft(equation: JaxprEqn) -> float:
    """5 N log2 N a complex transform, half of it for a real one: the convention of FFT benchmarks."""
    points, kind = math.prod(equation.params["fft_lengths"]), jax.lax.FftType(equation.params["fft_type"])
    whole = equation.outvars[0] if kind == jax.lax.FftType.IRFFT else equation.invars[0]
    is_complex = kind in (jax.lax.FftType.FFT, jax.lax.FftType.IFFT)
    return (5.0 if is_complex else 2.5) * _aval(whole).size * math.log2(max(points, 2))


_FORMULAS: dict[str, Callable[[JaxprEqn], float]] = {
    "dot_general": _dot,
    "ragged_dot_general": _ragged_dot,
    "conv_general_dilated": _convolution,
    "fft": _fft,
}


def saved_bytes(traced: ClosedJaxpr) -> int:
    """Bytes of what a traced step keeps from its forward for its backward pass, over all devices, its inputs apart.

    Of the equations of the step itself, where scans are one and hold stacks. An upper bound: what the compiler
    computes again of its own accord, or fuses away, is in it.
    """
    jaxpr = traced.jaxpr
    while len(jaxpr.eqns) == 1 and jaxpr.eqns[0].primitive.name in ("jit", "pjit"):
        jaxpr = jaxpr.eqns[0].params["jaxpr"].jaxpr
    forward: dict[Var, int] = {}
    kept: dict[Var, int] = {}
    for equation in jaxpr.eqns:
        if _BACKWARD in str(equation.source_info.name_stack):
            kept |= {v: forward[v] for v in equation.invars if isinstance(v, Var) and v in forward}
        else:
            forward |= {v: _num_bytes(v.aval) for v in equation.outvars}
    return sum(kept.values())


def _num_bytes(aval: Any) -> int:
    dtype = getattr(aval, "dtype", None)
    return int(aval.size) * getattr(dtype, "itemsize", 0) if dtype is not None else 0
