"""What the compiler makes of the kernels, with no GPU present: `python -m kernels.inspect`

The launchers run as in production, on meta tensors of the model's real sizes (24 heads of 128, 3584 and 9728 tokens, and
3500 for the ragged tails), forward and backward, once per GPU architecture. Every launch compiles with the
specialisation and the configuration it would have on that GPU, and its machine code is read with the tools in Triton's
wheel. One line per kernel, target and specialisation:

    regs, stack, smem    registers of a thread; bytes of stack (spilled registers); bytes of shared memory of a block
    matrix               matrix instructions by kind, in the main loop (in the whole kernel, where no loop has any)
    loop                 other instructions in the main loop: the innermost loop with the most matrix instructions
    share                share of the tensor cores' time in the main loop, if nothing overlaps and nothing waits
    accesses, atomics    global memory instructions by width in bits

The share counts, per iteration and multiprocessor, tc = flops / rate (dense 16-bit flops per clock: 2048 on sm_80, 4096
on sm_90), issue = other instructions x warps / 4, mufu = 8 clocks x special functions (exp2) x warps / 4, and is tc /
(tc + max(issue, mufu)). It compares formulations; it predicts no speed.
"""

import argparse
import importlib
import json
import os
import re
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path

import torch

os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")  # the default, said aloud: else 3.9 warns that it may change

try:
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.runtime.jit import JITFunction
except ImportError:
    print("kernels.inspect needs Triton: pip install triton (Linux).", file=sys.stderr)
    sys.exit(2)
if triton.knobs.runtime.interpret:
    print("kernels.inspect compiles, and TRITON_INTERPRET=1 asks for Triton's interpreter: unset it.", file=sys.stderr)
    sys.exit(2)

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
MATRIX = r"HMMA|HGMMA|UTCHMMA|v_mfma"
FLOPS_PER_CLOCK = {"sm_80": 2048, "sm_90": 4096}  # of one multiprocessor: A100 312 TFLOP/s, H100 989 TFLOP/s
BATCH, TEXT, HEADS, WIDTH, MLP = 1, 512, 24, 128, 12288


class Driver:
    """Stands in for a GPU's driver: says which target to compile for."""

    target = "sm_80"

    def get_current_target(self):
        return TARGETS[self.target]

    def get_current_device(self):  # Triton keeps compiled kernels per device
        return list(TARGETS).index(self.target)

    def get_current_stream(self, device):
        return 0


def launch_attention(n: int) -> None:
    from kernels.attention import attention_triton

    q, k, v = meta(BATCH, n, 3, HEADS, WIDTH).unbind(2)
    backward(attention_triton(q, k, v))


def launch_rope(n: int) -> None:
    from kernels.rope import qk_norm_rope_triton

    pe = torch.empty(n, WIDTH // 2, 2, device="meta")
    text, image = (meta(BATCH, m, 3, HEADS, WIDTH) for m in (TEXT, n - TEXT))
    single = meta(BATCH, n, 3 * HEADS * WIDTH + MLP)[..., : 3 * HEADS * WIDTH].unflatten(-1, (3, HEADS, WIDTH))
    for streams in ([text, image], [single]):
        backward(qk_norm_rope_triton(streams, [meta(WIDTH) for _ in range(2 * len(streams))], pe))


def launch_modulate(n: int) -> None:
    from kernels.modulate import modulate_triton

    shift, scale = meta(BATCH, 1, 6 * HEADS * WIDTH).chunk(6, dim=-1)[:2]
    backward(modulate_triton(meta(BATCH, n, HEADS * WIDTH), shift, scale))


def launch_residual_modulate(n: int) -> None:
    from kernels.modulate import residual_modulate_triton

    x, y = meta(BATCH, n, HEADS * WIDTH), meta(BATCH, n, HEADS * WIDTH)
    shift, scale, gate = meta(BATCH, 1, 6 * HEADS * WIDTH).chunk(6, dim=-1)[:3]
    backward(*residual_modulate_triton(x, gate, y, shift, scale))


LAUNCHES = {
    "attention": launch_attention,
    "rope": launch_rope,
    "modulate": launch_modulate,
    "residual_modulate": launch_residual_modulate,
}
LENGTHS = (3584, 9728, 3500)


def meta(*shape: int) -> torch.Tensor:
    return torch.empty(shape, dtype=torch.bfloat16, device="meta", requires_grad=True)


def backward(*outputs: torch.Tensor) -> None:
    torch.autograd.backward(outputs, [torch.empty_like(out) for out in outputs])


def compiled(launch, *args, target: str) -> list:
    """Calls `launch(*args)`, whose launches compile for `target` and run nothing; returns the compiled kernels.

    In place of a kernel that does not compile stands (its name, the error).
    """
    kernels, run = [], JITFunction.run

    def warm_up(self, *args, grid, warmup, **kwargs):
        try:
            kernels.append(run(self, *args, grid=grid, warmup=True, **kwargs))
        except (RuntimeError, triton.TritonError) as error:
            kernels.append((self.fn.__name__, str(error) or type(error).__name__))

    Driver.target, JITFunction.run = target, warm_up
    triton.runtime.driver.set_active(Driver())
    try:
        launch(*args)
    finally:
        JITFunction.run = run
    return list({id(kernel): kernel for kernel in kernels}.values())


def run_launchers_on_meta_tensors() -> None:
    """On meta tensors a custom op runs its fake: let that be the launcher itself, so that its launches take place."""
    for file in ("attention", "rope", "modulate"):
        for op in vars(importlib.import_module(f"kernels.{file}")).values():
            if isinstance(op, torch._library.custom_ops.CustomOpDef):
                op.register_fake(op._init_fn)


def describe(kernel, target: str) -> dict:
    """Figures of one compiled kernel, from its machine code."""
    if isinstance(kernel, tuple):
        return dict(zip(("kernel", "error"), kernel), target=target)
    if target.startswith("gfx"):
        text = kernel.asm["amdgcn"]
        registers, stack, spills = (
            int(re.search(rf"\.{name}:\s+(\d+)", text)[1])
            for name in ("vgpr_count", "private_segment_fixed_size", "vgpr_spill_count")
        )
        code = amd_instructions(text)
    else:
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "kernel.cubin"
            path.write_bytes(kernel.asm["cubin"])
            usage, sass = tool("-res-usage", path), tool("-sass", path)
        registers, stack = (int(re.search(rf"{name}:(\d+)", usage)[1]) for name in ("REG", "STACK"))
        code = nvidia_instructions(sass)
        spills = sum(op.startswith(("LDL", "STL")) for op, _ in code)
    loop = main_loop(code)
    body = [code[i][0] for i in loop] or [op for op, _ in code]
    matrix = Counter(kind(op) for op in body if kind(op))
    accesses = Counter(filter(None, (access(op) for op, _ in code)))
    return dict(
        kernel=kernel.metadata.name, target=target, warps=kernel.metadata.num_warps, registers=registers, stack=stack,
        spills=spills, shared=kernel.metadata.shared, instructions=len(code), matrix=dict(matrix),
        loop=len(loop) - sum(matrix.values()) if loop else None,
        share=tensor_core_share(body, kernel.metadata.num_warps, target) if loop else None,
        accesses=dict(sorted(accesses.items())),
        atomics=sum(bool(re.match(r"(ATOM|ATOMG|RED|REDG)(\.|$)|(global|buffer|flat)_atomic", op)) for op, _ in code),
    )  # fmt: skip


def tool(option: str, path: Path) -> str:
    cuobjdump = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    return subprocess.run([cuobjdump, option, path], check=True, capture_output=True, text=True).stdout


def nvidia_instructions(sass: str) -> list[tuple[str, int | None]]:
    """(opcode, index of the instruction it may jump to) of each instruction; a conditional opcode ends in '?'."""
    found = re.findall(r"^\s+/\*([0-9a-f]{4,})\*/\s+(@!?U?P\w+ +)?([A-Z][\w.]*)([^;]*);", sass, re.M)
    index = {int(address, 16): i for i, (address, *_) in enumerate(found)}
    code = []
    for _, predicate, op, operands in found:
        jump = re.search(r"0x([0-9a-f]+)\s*$", operands) if op.startswith("BRA") else None
        conditional = predicate or re.search(r"\bU?P\d", operands)
        code.append((op + "?" * bool(conditional), index.get(int(jump[1], 16)) if jump else None))
    return code


def amd_instructions(text: str) -> list[tuple[str, int | None]]:
    lines = re.findall(r"^(\.LBB\w+):|^\s+((?:v|s|ds|buffer|global|flat|scratch)_\w+)([^;\n]*)", text, re.M)
    labels, code = {}, []
    for label, op, operands in lines:
        if label:
            labels[label] = len(code)
        else:
            code.append((op + "?" * op.startswith("s_cbranch"), operands.strip() if "branch" in op else None))
    return [(op, labels.get(jump)) for op, jump in code]


def main_loop(code: list[tuple[str, int | None]]) -> list[int]:
    """Indices of the innermost loop with the most matrix instructions; empty if no loop has any.

    A loop is a jump back to an instruction that every path to the jump passes (its dominator): slow paths of waits,
    placed after the code, jump back as well. Its body is what reaches that jump without passing the head.
    """
    starts = sorted({0} | {j for _, j in code if j is not None} | {i + 1 for i, (op, j) in enumerate(code) if leaves(op, j)})
    starts = [s for s in starts if s < len(code)]
    block_of = {s: b for b, s in enumerate(starts)}
    ends = [*starts[1:], len(code)]
    before = [set() for _ in starts]  # predecessors
    for b, end in enumerate(ends):
        op, jump = code[end - 1]
        if jump is not None:
            before[block_of[jump]].add(b)
        if end < len(code) and not (leaves(op, jump) and not op.endswith("?")):
            before[b + 1].add(b)
    everything = set(range(len(starts)))
    dominators, changed = [{0}, *(set(everything) for _ in starts[1:])], True
    while changed:
        changed = False
        for b in range(1, len(starts)):
            new = {b} | (set.intersection(*(dominators[p] for p in before[b])) if before[b] else set())
            changed, dominators[b] = changed or new != dominators[b], new

    loops = []
    for head in everything:
        for tail in before[head]:
            if head in dominators[tail]:
                body, todo = {head}, [tail]
                while todo:
                    b = todo.pop()
                    if b not in body:
                        body.add(b)
                        todo += before[b]
                loops.append(body)
    bodies = [[i for b in sorted(body) for i in range(starts[b], ends[b]) if code[i][0] != "NOP"] for body in loops]
    bodies = [body for body in bodies if any(kind(code[i][0]) for i in body)]
    inner = [body for body in bodies if not any(set(other) < set(body) for other in bodies)]
    return max(inner, key=lambda body: sum(bool(kind(code[i][0])) for i in body), default=[])


def leaves(op: str, jump: int | None) -> bool:
    return jump is not None or op.startswith(("BRA", "EXIT", "s_endpgm", "s_branch"))


def kind(op: str) -> str | None:
    found = re.match(MATRIX, op)
    return found[0].removeprefix("v_") if found else None


def access(op: str) -> str | None:
    """LDG.E.128.CONSTANT -> LDG.128, buffer_load_dwordx4 -> load.128; None for anything but global memory."""
    if found := re.match(r"(LDG|STG|LDGSTS)\.", op):
        width = re.search(r"\.([US]?(?:8|16|64|128))(?=[.?]|$)", op)
        return f"{found[1]}.{width[1] if width else 32}"
    if found := re.match(r"UTMALDG|UTMASTG", op):
        return found[0]
    if found := re.match(r"(?:buffer|global)_(load|store)_(\w+)", op):
        width = re.search(r"(ubyte|sbyte|byte|ushort|sshort|short|dwordx4|dwordx3|dwordx2|dword)", found[2])
        bits = dict(dword=32, dwordx2=64, dwordx3=96, dwordx4=128)
        return f"{found[1]}.{bits.get(width[1], 16 if 'short' in width[1] else 8)}"
    return None


def tensor_core_share(body: list[str], warps: int, target: str) -> float | None:
    flops = 0  # of all warps
    for op in body:
        if found := re.match(r"HGMMA\.(\d+)x(\d+)x(\d+)", op):  # of a warp group, four warps
            flops += 2 * int(found[1]) * int(found[2]) * int(found[3]) * warps // 4
        elif found := re.match(r"HMMA\.16(8)(\d+)", op):
            flops += 2 * 16 * int(found[1]) * int(found[2]) * warps
    if target not in FLOPS_PER_CLOCK or not flops:
        return None
    tc = flops / FLOPS_PER_CLOCK[target]
    issue = sum(not kind(op) for op in body) * warps / 4
    mufu = 8 * sum(op.startswith("MUFU") for op in body) * warps / 4
    return tc / (tc + max(issue, mufu))


def inspect(operation: str, target: str) -> list[dict]:
    """One dict per kernel and specialisation; lengths that compile to the same figures share it."""
    rows = {}
    for n in LENGTHS:
        for kernel in compiled(LAUNCHES[operation], n, target=target):
            figures = dict(operation=operation) | describe(kernel, target)
            rows.setdefault(json.dumps(figures), figures | dict(lengths=[]))["lengths"].append(n)
    return list(rows.values())


def table_line(row: dict) -> str:
    line = f"{row['operation']:<18}{row['kernel']:<19}{row['target']:<8}{','.join(map(str, row['lengths'])):<16}"
    if "error" in row:
        return f"{line}does not compile: {row['error']}"
    counts = lambda d: " ".join(f"{n} {name}" for name, n in d.items())  # noqa: E731
    share = "-" if row["share"] is None else f"{row['share']:.0%}"
    return (
        f"{line}{row['warps']:>5}{row['registers']:>5}{row['stack']:>6}{row['shared']:>8}  {counts(row['matrix']) or '-':<15}"
        f"{row['loop'] or '-':>5}{share:>6}{row['atomics']:>8}  {counts(row['accesses'])}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kernel", choices=LAUNCHES, action="append", help="only this operation (repeatable)")
    parser.add_argument("--target", choices=TARGETS, action="append", help="only this architecture (repeatable)")
    parser.add_argument("--json", action="store_true", help="a JSON object per line instead of a table")
    args = parser.parse_args()
    if not args.json:
        print(f"triton {triton.__version__}, bf16, batch {BATCH}, {HEADS} heads of {WIDTH}, {TEXT} text tokens")
        print(
            f"{'operation':<18}{'kernel':<19}{'target':<8}{'tokens':<16}warps regs stack    smem  {'matrix':<15} loop share"
            " atomics  accesses"
        )
    run_launchers_on_meta_tensors()
    for target in args.target or TARGETS:
        for operation in args.kernel or LAUNCHES:
            for row in inspect(operation, target):
                print(json.dumps(row) if args.json else table_line(row), flush=True)


if __name__ == "__main__":
    main()
