"""Starting before the kernel ahead has ended: what programmatic dependent launch asks of a kernel.

Contract: a kernel launched with `launch_pdl=True` may start while the one before it in the stream still
runs. Every program of it calls `after_previous` before it reads what that kernel writes, and before it
writes at all. Weights may be read earlier, and so may what is older than the kernel ahead, if that one
was launched in the ordinary way.
"""

from __future__ import annotations

import triton.experimental.gluon.language as gl
from triton.experimental import gluon


@gluon.jit
def after_previous(value):
    """The int32 `value`, once every kernel before this one is complete and its writes are visible.

    What must not be read earlier is to be computed from the result: that orders it for the compiler.
    """
    return gl.inline_asm_elementwise(
        "griddepcontrol.wait; mov.b32 $0, $1;",
        "=r,r",
        [value],
        dtype=gl.int32,
        is_pure=False,
        pack=1,
    )
