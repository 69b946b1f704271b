"""Triton's interpreter made to round as a GPU may: products that no block shape changes, and scores that differ.

Imported before kernels run, it replaces two operations of the interpreter, and remembers what it derives of types again
and again, which takes most of its time:

- ``tl.dot`` is a matrix product of NumPy there, whose BLAS rounds one and the same element differently in products of
  different shapes and on different processors. Here terms are added one after the other in float64, and the sum is
  rounded once: an element is one number, whatever the shape of its block.
- On a GPU a score that a later kernel forms again may differ in its last bits from what an earlier one saw. Within
  :func:`perturbed` every product, and every float sum, is off by a few units in the last place, at random.
"""

import functools
from collections.abc import Callable
from contextlib import contextmanager

import numpy as np
import triton.language as tl
from triton.language.semantic import TritonSemantic
from triton.runtime import interpreter

_noise: tuple[np.random.Generator, int] | None = None


@contextmanager
def perturbed(ulps: int, seed: int = 0):
    """Move every product and sum of floats by up to ``ulps`` units in the last place."""
    global _noise
    _noise = np.random.default_rng(seed), ulps
    try:
        yield
    finally:
        _noise = None


def _moved(x: np.ndarray) -> np.ndarray:
    if _noise is None or x.dtype != np.float32:
        return x
    generator, ulps = _noise
    with np.errstate(all="ignore"):
        return x * (1 + generator.integers(-ulps, ulps, x.shape, endpoint=True) * 2.0**-23).astype(np.float32)


def product(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Return the product of two matrices, float32: each element a sum in float64, in order, rounded once."""
    a, b = a.astype(np.float64), b.astype(np.float64)
    total, term = np.zeros((a.shape[0], b.shape[1])), np.empty((a.shape[0], b.shape[1]))
    with np.errstate(all="ignore"):  # inf - inf and the like are what kernels are tested with
        for k in range(a.shape[1]):
            np.multiply(a[:, k, None], b[None, k], out=term)
            total += term
        return total.astype(np.float32)


def _dot(self, a, b, d, input_precision, max_num_imprecise_acc):
    return interpreter.TensorHandle(_moved(product(a.data, b.data)) + d.data, d.dtype.scalar)


def _sum(self, input):
    return self.to_tensor(_moved(np.sum(input.handle.data, axis=self.axis, keepdims=self.keep_dims)), input.dtype)


class _Launch:
    """What a kernel's launch changes of triton.language, by the modules that its functions see."""

    current = None

    def __init__(self):
        self.scopes = {}

    def restore(self) -> None:
        _Launch.current = None
        for scope in reversed(self.scopes.values()):
            scope.restore()


def _patch_lang_once(fn, patch_lang=interpreter._patch_lang) -> _Launch:
    """Change triton.language once a launch, not for every device function that it calls: a quarter of the time."""
    if _Launch.current is None:
        _Launch.current = _Launch()
    seen = frozenset(id(x) for x in fn.__globals__.values() if x is tl or x is tl.core)
    if seen not in _Launch.current.scopes:
        _Launch.current.scopes[seen] = patch_lang(fn)
    return _Launch.current


def _remembering(function: Callable, key: Callable) -> Callable:
    """Return the function as one that computes its result once for every key of its arguments."""
    results = {}

    def remembered(*args):
        of = key(*args)
        if of not in results:
            results[of] = function(*args)
        return results[of]

    return remembered


def _sides(shape) -> tuple:
    return tuple(x.value if isinstance(x, tl.constexpr) else x for x in shape)


def _attributes(init: Callable, kind: type, *args) -> dict:
    made = object.__new__(kind)
    init(made, *args)
    return made.__dict__


_of_block = _remembering(
    functools.partial(_attributes, tl.block_type.__init__, tl.block_type),
    lambda element, shape: (element.name, _sides(shape)),
)
_of_tensor = _remembering(
    lambda kind, init=tl.tensor.__init__: _attributes(init, tl.tensor, None, kind), lambda kind: kind.name
)


def _make_block(self, element_ty, shape) -> None:
    self.__dict__.update(_of_block(element_ty, shape))


def _make_tensor(self, handle, type) -> None:
    self.__dict__.update(_of_tensor(type))
    self.handle = handle


def _same(self, other, equal=tl.dtype.__eq__) -> bool:
    return self is other or equal(self, other)


def _broadcast(self, lhs, rhs, broadcast=TritonSemantic.broadcast_impl_value) -> tuple:
    if lhs.type.is_block() and rhs.type.is_block() and lhs.type.shape.values == rhs.type.shape.values:
        return lhs, rhs
    return broadcast(self, lhs, rhs)


def _operands(self, lhs, rhs, *options, check=TritonSemantic.binary_op_type_checking_impl, **more) -> tuple:
    """Return two tensors of one numeric type as they are: but of a division, there is nothing to cast or broadcast."""
    tensors = isinstance(lhs, tl.tensor) and isinstance(rhs, tl.tensor)
    divides = len(options) > 3 or more
    if tensors and not divides and not lhs.dtype.is_ptr() and lhs.type.name == rhs.type.name:
        return lhs, rhs
    return check(self, lhs, rhs, *options, **more)


tl.dtype.__eq__ = _same
tl.block_type.__init__ = _make_block
tl.tensor.__init__ = _make_tensor
TritonSemantic.broadcast_impl_value = _broadcast
TritonSemantic.binary_op_type_checking_impl = _operands
TritonSemantic.computation_type_impl = _remembering(
    TritonSemantic.computation_type_impl,
    lambda _, a, a_is_number, b, b_is_number, divides: (a.name, a_is_number, b.name, b_is_number, divides),
)
interpreter._get_np_dtype = _remembering(interpreter._get_np_dtype, lambda kind: kind.scalar.name)
interpreter._patch_lang = _patch_lang_once
interpreter.InterpreterBuilder.create_dot = _dot
interpreter.ReduceOps.sum = _sum
