"""An interpreter for the machine code of AMD's gfx942 and gfx950, in numpy.

It runs the assembly text that Triton returns (`binary.asm["amdgcn"]`), so that a kernel's real code for a
GPU that is not here can be compared with the op it implements:

    kernel = Kernel(asm, "gfx942", signature, shared, num_warps)
    kernel.unsupported()                    # {} or {opcode: reason}: a static check
    kernel.launch((gx, gy, gz), arguments)  # arrays for pointers, ints, floats; constants left out

A file a concern: `assembly` (text to instructions), `wave` (registers and lanes), `formats` (number
formats), `lanes` (operand modifiers, DPP, SDWA), `scalar`, `vector`, `vector_tables`, `convert`, `mfma`,
`access` (loads and stores), `memory` (what is loaded from), `kernel` (workgroups and launching).

Faults are raised, never survived: access outside the given arrays, local memory out of range or larger
than the target has, an unknown opcode. Registers and local memory start poisoned.

Not modelled: time, hazards and missing waits, caches, races between waves, the exact rounding of
transcendentals and of matrix accumulation. Expect agreement with hardware, not bit equality; nothing here
has been compared with hardware.
"""

from tools.gcn.errors import Fault, Unsupported
from tools.gcn.kernel import Kernel

__all__ = ["Fault", "Kernel", "Unsupported"]
