"""Compile Triton's kernels for a GPU that need not be there; a process of its own, as others run them on the CPU.

Prints JSON: for each kernel the bytes that it reads and writes for each weight, and how often it was compiled; and how
kernels round to bf16.
"""

import json
import re
import sys

import torch

from hf_ivon.passes import NoiseOptions, UpdateOptions
from hf_ivon.philox import noise_words
from hf_ivon.triton_passes import TritonPasses

THREADS = 128
SIZE = 2**14


class Compiling(TritonPasses):
    """Compiles kernels instead of launching them."""

    def __init__(self):
        super().__init__()
        self.variants, self.moved, self.roundings = {}, {}, set()

    def _start(self, kernel, programs, *arguments):
        made = kernel.warmup(*arguments, grid=(programs,), enable_fp_fusion=False)
        name, block = kernel.fn.__name__, arguments[-1]
        self.variants.setdefault(name, set()).add(made.hash)
        elements = block * (4 if name in ("sample", "subtract_noise") else 1)
        if ptx := made.asm.get("ptx"):
            self.moved[name] = [bytes_of(kind, ptx) * THREADS / elements for kind in ("ld", "st")]
            self.roundings.update(re.findall(r"cvt\.(\w+)\.bf16(?:x2)?\.f32", ptx))
        return True


def bytes_of(instruction, ptx):
    """Count the bytes of weights and states that one thread loads or stores: 16 at a time, or 8 in bf16."""
    return sum(
        int(vector) * int(bits) // 8 for vector, bits in re.findall(rf"{instruction}\.global\.v(\d)\.b(\d+)", ptx)
    )


def pretend(backend, architecture, warp):
    """Let Triton's compiler find the driver of a GPU."""
    from triton.backends.compiler import GPUTarget
    from triton.runtime import driver

    class Driver:
        def get_current_target(self):
            return GPUTarget(backend, int(architecture) if architecture.isdigit() else architecture, int(warp))

        def get_current_device(self):
            return 0

        def get_current_stream(self, device=None):
            return 0

    driver.set_active(Driver())


def main():
    pretend(*sys.argv[1:])
    run = Compiling()
    a, b, c, d, e, f = (torch.ones(SIZE) for _ in range(6))
    # Numbers of all kinds: none of them may be compiled in.
    for number, index in ((1, 1), (16, 2**31 - 1), (0.3, 2**31), (2.5, 2**32 - 1)):
        words = noise_words((index,), index)
        run.sample(a, b, c, words, number, number)
        run.subtract_noise(a, b, c, words, NoiseOptions(number, number, 0.9, number, True))
        run.take_product(a, b, c, number, False)
        run.add_product(a, b, c, d, number)
        run.square(a, b, number, True)
        run.adopt(f.bfloat16(), b)
        options = UpdateOptions(number, number, 0.9, 0.999, number, number, number, number, True, False)
        run.update((a, b, c, d, e, None), options)
    variants = {name: len(hashes) for name, hashes in run.variants.items()}
    print(json.dumps({"variants": variants, "moved": run.moved, "roundings": list(run.roundings)}))


if __name__ == "__main__":
    main()
