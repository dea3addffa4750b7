"""Makes Triton's interpreter trustworthy where it silently computes something else than a GPU. Importing applies it.

The interpreter keeps bfloat16 as uint16 bit patterns. As released (3.6 to 3.9) it truncates casts to bf16, and `tl.dot`,
arithmetic and reductions work on the bit patterns. With this patch

* casts to bf16 round to nearest, ties to even, and casts from bf16 are exact;
* a dot of bf16 tiles multiplies their values and sums in fp32, as tensor cores do;
* arithmetic, comparisons and reductions of bf16 values raise: kernels compute in fp32;
* a dot of fp32 tiles whose `input_precision` is tf32 (the default on a GPU) rounds its operands to tf32, so that a
  forgotten "ieee" shows;
* floating-point lanes that a masked load leaves undefined (no `other`) hold NaN, not 0;
* scalars count as Python integers, in loop bounds for example, with numpy 2.4 also in Triton 3.6.

Use: `import interpreter` at the top of a test of kernels. tests/test_interpreter.py tests it.
"""

import numpy as np
import triton.language as tl
from triton._C.libtriton import ir
from triton.runtime import interpreter as stock

Handle, Builder = stock.TensorHandle, stock.InterpreterBuilder


def bf16_to_fp32(bits: np.ndarray) -> np.ndarray:
    return (bits.astype(np.uint32) << 16).view(np.float32)


def fp32_to_bf16(x: np.ndarray) -> np.ndarray:
    bits = np.ascontiguousarray(x, dtype=np.float32).view(np.uint32).reshape(np.shape(x))
    nearest = (bits + (0x7FFF + ((bits >> 16) & 1)).astype(np.uint32)) >> 16  # a carry into the exponent is right
    return np.where(np.isnan(x), (bits >> 16) | 0x40, nearest).astype(np.uint16)


def fp32_to_tf32(x: np.ndarray) -> np.ndarray:
    bits = np.ascontiguousarray(x, dtype=np.float32).view(np.uint32)
    return np.where(np.isfinite(x), ((bits + np.uint32(0x1000)) & np.uint32(0xFFFFE000)).view(np.float32), x)  # cvt.rna


def is_bf16(handle) -> bool:
    return handle.dtype.scalar == tl.bfloat16


def cast(original):
    """Wraps `cast_impl` and `create_fp_to_fp`: bf16 goes through fp32 at both ends."""

    def wrapped(self, src, dst_type, *rounding):
        to_bf16 = dst_type.scalar == tl.bfloat16
        if is_bf16(src) == to_bf16:  # neither, or no change
            return src if to_bf16 else original(self, src, dst_type, *rounding)
        if not to_bf16:
            src = Handle(bf16_to_fp32(src.data), tl.float32)
            return src if dst_type.scalar == tl.float32 else Builder.cast_impl(self, src, dst_type)
        if rounding and rounding[0] == ir.ROUNDING_MODE.RTZ:
            return original(self, src, dst_type, *rounding)
        return Handle(fp32_to_bf16(src.data.astype(np.float32)), tl.bfloat16)

    return wrapped


def refuse_bf16(original):
    def wrapped(self, *args, **kwargs):
        if any(isinstance(arg, Handle) and is_bf16(arg) for arg in args):
            raise TypeError("bf16 values meet arithmetic in a kernel: convert them to fp32 first.")
        return original(self, *args, **kwargs)

    return wrapped


def dot(original):
    def wrapped(self, a, b, d, input_precision, *rest):
        if is_bf16(d) or is_bf16(a) != is_bf16(b):
            raise TypeError("A dot takes two bf16 tiles and an fp32 accumulator.")
        if is_bf16(a):
            a, b = (Handle(bf16_to_fp32(x.data), tl.float32) for x in (a, b))
        elif a.dtype.scalar == tl.float32 and input_precision == ir.INPUT_PRECISION.TF32:
            a, b = (Handle(fp32_to_tf32(x.data), tl.float32) for x in (a, b))
        return original(self, a, b, d, input_precision, *rest)

    return wrapped


def masked_load(original):
    def wrapped(self, ptrs, mask, other, *rest, **kwargs):
        dtype = ptrs.get_element_ty()
        if other is None and dtype.is_floating() and dtype.primitive_bitwidth >= 16:
            filler = 0x7FC0 if dtype == tl.bfloat16 else np.nan
            other = Handle(np.full(ptrs.data.shape, filler, dtype=stock._get_np_dtype(dtype)), dtype)
        return original(self, ptrs, mask, other, *rest, **kwargs)

    return wrapped


def check_reduction(original):
    def wrapped(self, inputs):
        original(self, inputs)
        if any(is_bf16(x.handle) for x in inputs):
            raise TypeError("bf16 values meet a reduction in a kernel: convert them to fp32 first.")

    return wrapped


def scalars_as_integers(original):
    def wrapped(tensor, scope):
        original(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.squeeze()))

    return wrapped


for name, wrapper in {
    "cast_impl": cast, "create_fp_to_fp": cast, "create_dot": dot, "create_masked_load": masked_load,
    "binary_op": refuse_bf16, "unary_op": refuse_bf16, "create_idiv": refuse_bf16, "create_fma": refuse_bf16,
    "create_clampf": refuse_bf16, "create_atomic_rmw": refuse_bf16,
}.items():  # fmt: skip
    setattr(Builder, name, wrapper(getattr(Builder, name)))
Builder.get_bf16 = lambda self, value: self.cast_impl(self.get_fp32(value), tl.bfloat16)  # 3.6 truncates here too
stock.ReduceScanOpInterface.check_tensor = check_reduction(stock.ReduceScanOpInterface.check_tensor)
stock._patch_lang_tensor = scalars_as_integers(stock._patch_lang_tensor)
