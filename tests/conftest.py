"""Settings that every test and every subprocess of a test inherits."""

import os

# Triton decides at its import whether `@triton.jit` functions run in its interpreter, and some of torch imports it: so
# here, before anything else. Without a GPU there is no other way to run the kernels. Code that needs the real compiler
# (kernels/inspect.py) runs in a process from which the variable is removed.
os.environ.setdefault("TRITON_INTERPRET", "1")
# The interpreter multiplies small tiles with numpy, whose BLAS threads cost more than they save there (2 to 3 times).
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
