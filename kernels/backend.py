"""Triton, imported only where a kernel can run or be compiled: the import alone takes longer than a small edit on a CPU."""

import os
import sys

import torch

triton = tl = None
if torch.cuda.is_available() or "TRITON_INTERPRET" in os.environ or "kernels.inspect" in sys.orig_argv:
    try:
        import triton
        import triton.language as tl
    except ImportError:  # it exists for Linux; the references run without it
        pass
