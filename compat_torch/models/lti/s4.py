"""lrnnx's S4: diagonal plus low-rank state matrices."""

from __future__ import annotations

from ._s4_kernels import Register, SSMKernelDPLR, Storage
from ._s4_lrnnx import LrnnxS4


class S4(LrnnxS4):
    """S4: a diagonal plus low-rank system per channel, (B, H, L) -> ((B, H, L), state).

    Arguments, errors and the table of differences are those of `S4D`, without `disc` (the method is always the
    bilinear one) and with `rank` in use. Parameters are those of S4D, and P (rank, n_ssm, n, 2) and the buffer
    layer.kernel.l_kernel.

    C and C~. Where l_kernel is 0, C is the readout. Where it is M > 0, C holds C~ = C (I - A_bar^M), from which
    the convolution kernel of M steps is computed directly, and which is what the optimizer moves. The reference
    rewrites C so in its first forward; here the constructor does, when `l_max` is given (M = l_max), and
    `set_kernel_length(M)` on request. A call changes nothing. Where its kernel needs another M than that of C~, C~
    is converted on the fly, at a cost of O(n^3) a channel; from C itself the kernel comes at O(rank n) a step and
    channel, from powers of the step. Checkpoints of the reference load and save in either state.

    Cache: lrnn_state (B, H, 2 n), the states and their conjugates, and dC (c, H, n), the readout C. A step
    costs O(rank n) a channel. A call with a state or cache runs step by step in one compiled loop.

    Raises:
        ValueError: as S4D. A call in training mode with drop_kernel and a state or cache raises, too.

    Source: S4 (arXiv:2111.00396); lrnnx 1.0.0 `lrnnx.models.lti.S4`.
    """

    def _make_kernel(self, storage: Storage, inv_dt, A, P, B, C, register: Register) -> SSMKernelDPLR:
        return SSMKernelDPLR(self._name, storage, inv_dt, A, P, B, C, self.l_max, register, self.precision)

    def set_kernel_length(self, M: int) -> None:
        """Convert C to kernels of M steps, M = 0 to the readout itself; the outputs stay the same.

        Raises:
            ValueError: M is not an integer from 0 to 2^24, or not 0 for is_real, whose C~ is not real.
        """
        self._ssm.set_length(M)
