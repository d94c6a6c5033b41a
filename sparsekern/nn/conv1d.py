"""The drop-in replacement of torch.nn.Conv1d."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F

from sparsekern.errors import InputError
from sparsekern.nn.conv2d import SparseConv2d, conv_arguments
from sparsekern.nn.converters import register_converter


class SparseConv1d(SparseConv2d):
    """*Weight*-sparse convolution in one dimension: only the stored blocks of the kernel exist.

    It is a convolution of images of one row, so kernels, probes and training methods are those of
    :class:`SparseConv2d`, and so are the arguments; sizes are ints, or tuples of one, as in :class:`torch.nn.Conv1d`.

    Raises:
        ValueError: a size, sparsity or count out of range, an unknown init or padding mode, or taps that are not tied.
        TypeError: a size that is neither an int nor a tuple of one int.

    Shape:
        input ``(N, Cin, L)`` or ``(Cin, L)``, output ``(N, Cout, Lo)`` or ``(Cout, Lo)``. Channels last is native, as
        ``x.transpose(1, 2)`` of contiguous ``(N, L, Cin)``: other inputs are copied into it, and so is the output
        (``flatten`` and ``reshape`` take it, ``view`` across channels and positions does not).

    Example:
        >>> import sparsekern as sk
        >>> conv = sk.SparseConv1d(64, 128, 5, padding=2, sparsity=0.9, block_size=16)
        >>> conv(torch.randn(8, 64, 100)).shape
        torch.Size([8, 128, 100])
    """

    dense_class = nn.Conv1d
    dimensions = 1

    def forward(self, input: Any) -> Tensor:
        """Return the convolution of ``input``.

        Raises:
            ValueError: an input of another shape, or shorter than the kernel.
            TypeError: an input of another dtype than the values have, or that is no tensor.
        """
        if not isinstance(input, Tensor):
            return super().forward(input)
        self._check_input(input)
        return super().forward(input.unsqueeze(-2)).squeeze(-2)

    def _check_input(self, input: Tensor) -> None:
        if input.dim() not in (2, 3) or input.shape[-2] != self.in_channels:
            raise InputError(
                f"input has shape {tuple(input.shape)}; it must be (N, C, L) or (C, L) with C = in_channels = "
                f"{self.in_channels}",
                parameter="input",
            )
        if self.conv_shape.output_size(1, input.shape[-1] + sum(self._around) * (self.padding_mode != "zeros"))[1] < 1:
            raise InputError(
                f"input has shape {tuple(input.shape)}, which is shorter than the kernel {self.kernel_size} of "
                f"dilation {self.dilation} with padding {self._around[2:]} (left, right)",
                parameter="input",
            )

    def dense_forward(self, input: Tensor, weight: Tensor) -> Tensor:
        """Return PyTorch's convolution of ``input`` with a dense weight and this layer's sizes and bias."""
        padding: int | str | tuple[int, ...] = self.padding
        if self.padding_mode != "zeros":
            input, padding = self._padded(input.unsqueeze(-2)).squeeze(-2), 0
        return F.conv1d(input, weight, self.bias, self.stride, padding, self.dilation, self.groups)


register_converter(nn.Conv1d, SparseConv1d, conv_arguments)
