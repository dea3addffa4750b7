"""The patched interpreter against torch: casts, dots, refusals. `python -m pytest tests/test_interpreter.py`"""

import numpy as np
import pytest
import torch

triton = pytest.importorskip("triton")
import triton.language as tl  # noqa: E402

import interpreter  # noqa: E402, F401
from triton.runtime.errors import InterpreterError  # noqa: E402


@triton.jit
def cast_kernel(x_ptr, y_ptr, SIZE: tl.constexpr):
    i = tl.program_id(0) * SIZE + tl.arange(0, SIZE)
    tl.store(y_ptr + i, tl.load(x_ptr + i).to(y_ptr.dtype.element_ty))


@triton.jit
def dot_kernel(a_ptr, b_ptr, c_ptr, SIZE: tl.constexpr, PRECISION: tl.constexpr):
    i = tl.arange(0, SIZE)[:, None] * SIZE + tl.arange(0, SIZE)[None, :]
    tl.store(c_ptr + i, tl.dot(tl.load(a_ptr + i), tl.load(b_ptr + i), input_precision=PRECISION))


@triton.jit
def misuse_kernel(x_ptr, y_ptr, SIZE: tl.constexpr, KIND: tl.constexpr):
    i = tl.arange(0, SIZE)
    x = tl.load(x_ptr + i)
    if KIND == "add":
        y = x + x
    elif KIND == "scale":
        y = x * 0.5
    elif KIND == "negate":
        y = -x
    elif KIND == "compare":
        y = tl.where(x < x, 1.0, 0.0)
    elif KIND == "exp":
        y = tl.exp2(x)
    elif KIND == "reduce":
        y = tl.reduce(tl.reshape(x, (1, SIZE)), 0, tl.standard._elementwise_max)
    else:
        y = tl.where(i < 3, x.to(tl.float32), 0.0)
    tl.store(y_ptr + i, y.to(y_ptr.dtype.element_ty))


@triton.jit
def undefined_kernel(x_ptr, y_ptr, n, SIZE: tl.constexpr):
    i = tl.arange(0, SIZE)
    tl.store(y_ptr + i, tl.load(x_ptr + i, mask=i < n).to(tl.float32))


@triton.jit
def loop_kernel(y_ptr, n):
    first, total = tl.program_id(0) + 1, 0
    for i in range(first, first + n):
        total += i
    tl.store(y_ptr + tl.program_id(0), total)


def every_bf16_neighbourhood() -> torch.Tensor:
    """Around each of the 65536 bf16 bit patterns: itself, the half-way point above, and one step to both sides."""
    low = np.array([0, 1, 0x7FFF, 0x8000, 0x8001, 0xFFFF], dtype=np.uint32)
    bits = (np.arange(65536, dtype=np.uint32)[:, None] << 16) + low
    return torch.from_numpy(bits.view(np.float32).reshape(-1).copy())


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Equal in every bit, any NaN counting as any other."""
    return torch.equal(a.isnan(), b.isnan()) and torch.equal(a.nan_to_num(7.0).signbit(), b.nan_to_num(7.0).signbit()) and (
        torch.equal(a.nan_to_num(7.0, 2e38, -2e38), b.nan_to_num(7.0, 2e38, -2e38)))  # fmt: skip


@pytest.mark.filterwarnings("ignore:overflow")  # bf16 reaches beyond fp16: infinity is right
def test_casts_to_and_from_bf16_are_torchs():
    x = every_bf16_neighbourhood()
    y = torch.empty_like(x, dtype=torch.bfloat16)
    cast_kernel[(x.numel() // 65536,)](x, y, 65536)
    assert same_bits(y, x.to(torch.bfloat16))
    for dtype in (torch.float32, torch.float16):
        z = torch.empty_like(y, dtype=dtype)
        cast_kernel[(x.numel() // 65536,)](y, z, 65536)
        assert same_bits(z, y.to(dtype))


@pytest.mark.parametrize("dtype, precision, most, least", [
    (torch.bfloat16, "ieee", 1e-6, 0.0), (torch.bfloat16, "tf32", 1e-6, 0.0), (torch.float16, "tf32", 1e-6, 0.0),
    (torch.float32, "ieee", 1e-6, 0.0), (torch.float32, "tf32", 2e-3, 1e-5),
])  # fmt: skip
def test_dots(dtype, precision, most, least):
    generator = torch.Generator().manual_seed(0)
    a, b = torch.randn(2, 128, 128, generator=generator).to(dtype)
    c = torch.empty(128, 128)
    dot_kernel[(1,)](a, b, c, 128, precision)
    exact = a.double() @ b.double()
    error = ((c - exact).abs().max() / exact.abs().max()).item()
    assert least <= error <= most


@pytest.mark.parametrize("kind", ["add", "scale", "negate", "compare", "exp", "reduce"])
def test_arithmetic_on_bf16_raises(kind):
    x = torch.ones(16)
    misuse_kernel[(1,)](x, torch.empty(16), 16, kind)  # fine in fp32
    with pytest.raises((InterpreterError, TypeError, ValueError), match="bf16|fp32"):
        misuse_kernel[(1,)](x.bfloat16(), torch.empty(16), 16, kind)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_what_a_mask_leaves_undefined_is_nan(dtype):
    y = torch.empty(16)
    undefined_kernel[(1,)](torch.ones(16, dtype=dtype), y, 5, 16)
    assert torch.equal(y.isnan(), torch.arange(16) >= 5) and (y[:5] == 1).all()


def test_scalars_bound_loops():
    y = torch.empty(3, dtype=torch.int32)
    loop_kernel[(3,)](y, 4)
    assert y.tolist() == [1 + 2 + 3 + 4, 2 + 3 + 4 + 5, 3 + 4 + 5 + 6]
