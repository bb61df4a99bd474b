"""fourfold: one inference engine for DeepSeek-V4, on GPUs and on a CPU.

Contract: importing this package is instant: it imports neither torch nor any other part.
"""

__version__ = "0.1.0"
