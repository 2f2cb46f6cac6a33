"""Compiles every CUDA kernel for a device that need not be there, and prints what a block of each
takes: bytes of shared memory, warps, and registers of a thread. `test_compiled` starts it.

Run as ``python -m tests.cuda.compiled_all CAPABILITY [few]``.
"""

import json
import sys

from tests.cuda import compiled, compiled_experts, compiled_routed, interpreted


def main(capability, few):
    taken = compiled.launches_compile(capability)
    for part in (compiled, compiled_experts, compiled_routed):
        interpreted.captured = False
        part.launch(capability, few)
    json.dump(taken, sys.stdout)


if __name__ == "__main__":
    main(int(sys.argv[1]), len(sys.argv) > 2)
