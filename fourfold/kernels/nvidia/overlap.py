"""Starting before the kernel ahead has ended: what programmatic dependent launch asks of a kernel.

Contract: a kernel launched with `launch_pdl=True` may start while the one before it in the stream still
runs. Every program of it calls `after_previous` before it reads what that kernel writes, and before it
writes at all. Weights may be read earlier, and so may what is older than the kernel ahead, if that one
was launched in the ordinary way or lets this one start only behind its own wait.
"""

from __future__ import annotations

import triton
import triton.experimental.gluon.language as gl
import triton.language as tl
from triton.experimental import gluon


@gluon.jit
def after_previous(value):
    """The int32 `value`, once every kernel before this one is complete and its writes are visible.

    The kernel behind may start then: it may read early what is older than this one.
    What must not be read earlier is to be computed from the result: that orders it for the compiler.
    """
    return gl.inline_asm_elementwise(
        "griddepcontrol.wait; griddepcontrol.launch_dependents; mov.b32 $0, $1;",
        "=r,r",
        [value],
        dtype=gl.int32,
        is_pure=False,
        pack=1,
    )


@triton.jit
def begin_beside_previous(value):
    """The int32 `value`, once every kernel before this one is complete; the one after may start now.

    For a small kernel at the head of a large one, which then fetches what does not depend on it.
    """
    return tl.inline_asm_elementwise(
        "griddepcontrol.launch_dependents; griddepcontrol.wait; mov.b32 $0, $1;",
        "=r,r",
        [value],
        dtype=tl.int32,
        is_pure=False,
        pack=1,
    )
