"""Makes Triton's interpreter faster without changing what it computes."""

import functools
from typing import Any

from triton import language
from triton.language import core
from triton.runtime import interpreter


def speed_up() -> None:
    """Replace slow functions of the interpreter; call it once, before a kernel runs."""
    _patch_language_once()
    _cache_dtypes()
    _cache_block_types()
    _return_early_without_broadcast()
    _skip_unused_overflow_checks()


def _patch_language_once() -> None:
    # The interpreter patches triton.language at every call of a device function, although the
    # launch has done so.
    patch_lang = interpreter._patch_lang

    def patch_unless_patched(function: Any) -> Any:
        if any(core.is_builtin(module.load) for module in (language, core)):
            return patch_lang(function)
        return None  # a device function's call has nothing to undo

    interpreter._patch_lang = patch_unless_patched


def _cache_dtypes() -> None:
    # It builds a dictionary of all dtypes for every array.
    np_dtype = interpreter._get_np_dtype
    cached = functools.cache(np_dtype)

    def np_dtype_of_scalar(dtype: Any) -> Any:
        scalar = dtype.scalar
        return np_dtype(scalar) if scalar.is_ptr() else cached(scalar)  # pointers have no hash

    interpreter._get_np_dtype = np_dtype_of_scalar


def _cache_block_types() -> None:
    # It derives and checks the shape of every block and of every tensor anew.
    initialize_block, initialize_tensor = core.block_type.__init__, core.tensor.__init__
    blocks: dict[tuple[Any, ...], dict[str, Any]] = {}

    def block_type(self: Any, element_ty: Any, shape: Any) -> None:
        key = (element_ty.name, *map(core._unwrap_if_constexpr, shape))
        if element_ty.is_ptr():  # the name does not tell pointers of two address spaces apart
            initialize_block(self, element_ty, shape)
        elif key in blocks:
            self.__dict__ = blocks[key]
        else:
            initialize_block(self, element_ty, shape)
            blocks[key] = self.__dict__

    def tensor(self: Any, handle: Any, type: Any) -> None:
        attributes = type.__dict__.get("_tensor_attributes")
        if attributes is None:
            initialize_tensor(self, handle, type)
            type._tensor_attributes = {k: v for k, v in self.__dict__.items() if k != "handle"}
        else:
            self.handle = handle
            self.__dict__.update(attributes)

    core.block_type.__init__, core.tensor.__init__ = block_type, tensor


def _return_early_without_broadcast() -> None:
    # It compares shapes of one size a dimension at a time.
    semantic = interpreter.interpreter_semantic
    broadcast = semantic.broadcast_impl_value

    def broadcast_if_shapes_differ(lhs: Any, rhs: Any) -> Any:
        if [*lhs.shape] == [*rhs.shape]:
            return lhs, rhs
        return broadcast(lhs, rhs)

    semantic.broadcast_impl_value = broadcast_if_shapes_differ


def _skip_unused_overflow_checks() -> None:
    # It repeats every addition in 64 bits for an assertion that it makes in debug mode only.
    semantic = interpreter.interpreter_semantic
    if not semantic.builder.options.debug:
        semantic.binary_op_sanitize_overflow_impl = lambda *_: None
