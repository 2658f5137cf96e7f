"""The programs of a bundle: read when first called, compiled once, run on one device.

A program takes (parameters, state, inputs) and gives (state, outputs), each a dict of arrays by name: any runtime can call it
that feeds arrays in the order of their sorted names. States are tables of names, shapes and what fills them at the start, so
that to make, grow, refill and reset one takes no program.
"""

import functools
import pathlib
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, export
from jax.sharding import SingleDeviceSharding

from cv2jax.config import UserError
from cv2jax.shapes import Bool
from cv2jax.synthesis.bundle_files import EXPORT_AGAIN, PARAMETERS, PROGRAMS, read_arrays
from cv2jax.synthesis.stages import NON_FINITE

Arrays = dict[str, Any]  # by name
PLATFORMS = ("cpu", "cuda", "tpu")


class Leaf(NamedTuple):
    """An array of a state: its start, whether `reset` fills the rows of a slot, whether what lies behind its end may stay."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    fill: int
    resets: bool = False
    may_stay: bool = False


Table = tuple[Leaf, ...]


def platform_of(device: jax.Device) -> str:
    """cpu, cuda, rocm or tpu: what `jax.export` calls the device's platform."""
    if device.platform != "gpu":
        return device.platform
    return "rocm" if "rocm" in str(getattr(device.client, "platform_version", "")).lower() else "cuda"


def require_calling_convention(path: pathlib.Path, manifest: Mapping[str, Any]) -> None:
    """Raises UserError for programs that this jax no longer, or not yet, reads; it says which jax wrote them."""
    version, written = manifest["calling_convention"], manifest["versions"]["jax"]
    least = export.minimum_supported_calling_convention_version
    most = export.maximum_supported_calling_convention_version
    if not least <= version <= most:
        age = "old" if version < least else "new"
        raise UserError(
            f"{path}: its programs are too {age} for jax {jax.__version__} (calling convention {version}, it reads {least} to"
            f" {most}); they were written by jax {written}: use that, or write them again: {EXPORT_AGAIN} {path} --out NEW"
        )


class Programs:
    """All programs of one bundle on one device, with the parameters of each stage, which are read with its first call."""

    def __init__(self, path: pathlib.Path, manifest: Mapping[str, Any], device: jax.Device | None = None) -> None:
        """Reads nothing yet. Raises UserError where the bundle has no programs for the device's platform."""
        self._path, self._manifest = path, manifest
        self.device = device or jax.local_devices()[0]
        platform, has = platform_of(self.device), manifest["platforms"]
        if platform not in has:
            raise UserError(
                f"{path}: has programs for {', '.join(has)}, this device is a {platform}; write them for it:"
                f" {EXPORT_AGAIN} {path} --out NEW --platforms {platform}"
            )
        require_calling_convention(path, manifest)
        self._about = {about["name"]: about for about in manifest["programs"] if platform in about["platforms"]}
        self._states: dict[str, dict[str, Table]] = {}
        for stage, tables in manifest["states"].items():
            self._states[stage] = {
                bucket: tuple(Leaf(**leaf)._replace(shape=tuple(leaf["shape"])) for leaf in leaves)
                for bucket, leaves in tables.items()
            }
        self._buckets = {
            (stage, _signature({leaf.name: leaf for leaf in table})): bucket
            for stage, tables in self._states.items()
            for bucket, table in tables.items()
        }
        self._parameters: dict[str, Arrays] = {}
        self._functions: dict[str, Any] = {}

    def __call__(self, stage: str, name: str, state: Arrays, inputs: Mapping[str, Any]) -> tuple[Arrays, Arrays]:
        """(next state, outputs) of the program `STAGE.NAME`; the state is used up where the program says so.

        Raises UserError for a bucket that the bundle lacks, and for a program that this jax cannot read.
        """
        full = f"{stage}.{name}"
        if full not in self._functions:
            self._functions[full] = self._load(full)
        return self._functions[full](self._parameters_of(stage), state, dict(inputs))

    @property
    def names(self) -> list[str]:
        """Of all programs for this device."""
        return sorted(self._about)

    def bucket(self, stage: str, state: Arrays) -> str:
        """The name of the bucket that a state is of."""
        return self._buckets[stage, _signature(state)]

    def init_state(self, stage: str, bucket: str) -> Arrays:
        """A state at its start; UserError for a bucket that the bundle lacks."""
        return _make(self._table(stage, bucket), SingleDeviceSharding(self.device))

    def grow(self, stage: str, state: Arrays, bucket: str) -> Arrays:
        """The state in larger arrays, filled behind what it holds; UserError for a bucket that the bundle lacks."""
        return _grow(self._table(stage, bucket), state)

    def refill(self, stage: str, used: Arrays, state: Arrays) -> Arrays:
        """`state` in the memory of `used`, which has as much room or more and is used up."""
        return _refill(self._table(stage, self.bucket(stage, used)), used, state)

    def reset(self, stage: str, state: Arrays, slots: Bool[np.ndarray, " B"]) -> Arrays:
        """The state, used up, with these slots emptied."""
        return _reset(self._table(stage, self.bucket(stage, state)), state, slots)

    def _table(self, stage: str, bucket: str) -> Table:
        if bucket not in self._states[stage]:
            raise UserError(
                f"{self._path}: {stage} has no programs of size {bucket}, only {', '.join(self._states[stage])}; ask for less,"
                f" or write others: {EXPORT_AGAIN} {self._path} --out NEW"
            )
        return self._states[stage][bucket]

    def _parameters_of(self, stage: str) -> Arrays:
        if stage not in self._parameters:
            file = self._path / PARAMETERS / f"{stage}.safetensors"
            self._parameters[stage] = (
                {name: jax.device_put(array, self.device) for name, array in read_arrays(file).items()}
                if f"{PARAMETERS}/{stage}.safetensors" in self._manifest["files"]
                else {}
            )
        return self._parameters[stage]

    def _load(self, full: str) -> Any:
        if full not in self._about:
            raise UserError(
                f"{self._path}: has no program {full} for {platform_of(self.device)}; write the bundle again:"
                f" {EXPORT_AGAIN} {self._path} --out NEW"
            )
        about = self._about[full]
        file = self._path / PROGRAMS / about["file"]
        try:
            exported = export.deserialize(bytearray(file.read_bytes()))
            exported.mlir_module()  # the line before reads the wrapping alone: StableHLO would refuse its part in the call
        except OSError as error:
            raise UserError(f"{file}: cannot be read ({error.strerror}); copy the bundle again") from None
        except Exception as error:  # flatbuffers, MLIR and jax each have their own
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            raise UserError(
                f"{file}: jax {jax.__version__} cannot read it ({reason}); jax {self._manifest['versions']['jax']} wrote it:"
                f" use that, or write it again: {EXPORT_AGAIN} {self._path} --out NEW"
            ) from None
        return jax.jit(exported.call, donate_argnums=(1,) if about["uses_up_state"] else ())


def _signature(arrays: Mapping[str, Any]) -> tuple[Any, ...]:
    return tuple((name, tuple(arrays[name].shape)) for name in sorted(arrays))


@functools.lru_cache(maxsize=64)
def _maker(table: Table, sharding: SingleDeviceSharding) -> Any:
    make = lambda: {leaf.name: jnp.full(leaf.shape, leaf.fill, leaf.dtype) for leaf in table}  # noqa: E731
    return jax.jit(make, out_shardings=sharding)


def _make(table: Table, sharding: SingleDeviceSharding) -> Arrays:
    return _maker(table, sharding)()


def _padded(leaf: Leaf, array: Array) -> Array:
    widths = [(0, size - had) for size, had in zip(leaf.shape, array.shape, strict=True)]
    return jnp.pad(array, widths, constant_values=leaf.fill)


@functools.partial(jax.jit, static_argnums=0)
def _grow(table: Table, state: Arrays) -> Arrays:
    return {leaf.name: _padded(leaf, state[leaf.name]) for leaf in table}


@functools.partial(jax.jit, static_argnums=0, donate_argnums=1)
def _refill(table: Table, used: Arrays, state: Arrays) -> Arrays:
    def put(leaf: Leaf) -> Array:
        into, array = used[leaf.name], state[leaf.name]
        if leaf.may_stay or into.shape == array.shape:
            return jax.lax.dynamic_update_slice(into, array, (0,) * array.ndim)
        return jax.lax.dynamic_update_slice(into, _padded(leaf, array), (0,) * array.ndim)

    return {leaf.name: put(leaf) for leaf in table}


@functools.partial(jax.jit, static_argnums=0, donate_argnums=1)
def _reset(table: Table, state: Arrays, slots: Bool[Array, " B"]) -> Arrays:
    def emptied(leaf: Leaf) -> Array:
        array = state[leaf.name]
        if not leaf.resets:
            return array
        return jnp.where(slots.reshape(-1, *(1,) * (array.ndim - 1)), jnp.asarray(leaf.fill, array.dtype), array)

    made = {leaf.name: emptied(leaf) for leaf in table}
    if "logits" not in state:
        return made
    # A weight of 0 in the attention does not hide what is not finite: caches of such slots, and only they, are cleared.
    spoilt = slots & ((state["status"] == NON_FINITE) | ~jnp.all(jnp.isfinite(state["logits"]), axis=-1))
    clear = lambda a: jnp.where(spoilt.reshape(-1, *(1,) * (a.ndim - 1)), jnp.zeros((), a.dtype), a)  # noqa: E731
    floats = {name: array for name, array in made.items() if jnp.issubdtype(array.dtype, jnp.floating)}
    cleared = jax.lax.cond(jnp.any(spoilt), lambda arrays: jax.tree.map(clear, arrays), lambda arrays: arrays, floats)
    return made | cleared
