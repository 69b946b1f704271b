"""What Triton kernels do about scores that are formed again.

The backward, and in adaptive sparse attention later steps of the forward too, form a score a second time, in a tile of
another shape. It may differ in its last bits from what an earlier kernel saw, and large scores have large last bits.
"""

import triton
import triton.language as tl


@triton.jit
def last_bits(score):
    """How far two kernels' values of a score of this size may be apart: eight units in the last place each."""
    return tl.abs(score) * 0.0000019073486328125  # 2^-19


@triton.jit
def top_of(largest):
    """Where the exponentials of a row begin, given its largest score: scores from here on weigh as much as that one.

    It is the largest itself, unless scores are so large that their last bits decide between everything and nothing.
    """
    return largest - tl.maximum(2 * last_bits(largest) - 1, 0)
