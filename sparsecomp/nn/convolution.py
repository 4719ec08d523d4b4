"""SparseConv2d: a drop-in for nn.Conv2d of 1x1 without padding, which is a product of rows by a packed weight.

Takes a convolution and gives a module built on SparseLinear. Knows nothing of plans, masks or models.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from sparsecomp.backends import registry
from sparsecomp.backends.choice import Choice
from sparsecomp.errors import ModelError
from sparsecomp.modules.carry import carry_over, why_not_carried
from sparsecomp.nn.linear import SparseLinear
from sparsecomp.patterns import Pattern
from sparsecomp.patterns.numbers import parse_weights


class SparseConv2d(SparseLinear):
    """y = activation(conv(x)): a convolution of 1x1 with ``stride``, its weight [out, in] packed in ``pattern``.

    x is [B, in_channels, H, W] or [in_channels, H, W] of the layer's dtype, y [B, out_channels, ceil(H/stride), ...].
    Every position of the output is a row of the product, so ``dense_above`` counts B*Hout*Wout, and an input in
    torch.channels_last is read where it lies, while another is copied first. y has the memory format that nn.Conv2d
    would give: channels_last where x is, or where the convolution's weight was when the layer was made of it.

    Pattern, numbers, backend, activation, gradients, saving and errors are those of SparseLinear; the ``weight`` that
    the module shows is the matrix [out, in].
    """

    stride: tuple[int, int] = (1, 1)
    channels_last: bool = False

    def __init__(  # noqa: D107  (the class says it)
        self,
        in_channels: int,
        out_channels: int,
        pattern: str | Pattern = "2:4",
        bias: bool = True,
        *,
        stride: int | tuple[int, int] = 1,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        backend: str | None = None,
        activation: str = "none",
        quantize: str | None = None,
        activations: str | None = None,
    ) -> None:
        super().__init__(
            in_channels,
            out_channels,
            pattern,
            bias,
            device=device,
            dtype=dtype,
            backend=backend,
            activation=activation,
            quantize=quantize,
            activations=activations,
        )
        self.stride = _pair(stride)

    @classmethod
    def from_conv(
        cls,
        conv: nn.Conv2d,
        pattern: str | Pattern = "2:4",
        method: str | None = None,
        gram: Tensor | None = None,
        *,
        backend: str | None = None,
        activation: str = "none",
        preferred: str | None = None,
        quantize: str | None = None,
        activations: str | None = None,
    ) -> SparseConv2d:
        """A packed copy of ``conv``, which stays as it is; arguments and errors as ``SparseLinear.from_linear``.

        ``gram`` [in, in] is X^T X of the numbers at the positions that the convolution reads. Raises ModelError for a
        convolution that is larger than 1x1, padded or in groups.
        """
        linear = _as_linear(conv)
        choice = Choice.asked(*parse_weights(pattern, quantize, activations), backend, preferred)
        layer = cls.following(linear, choice, method, gram, activation)
        assert isinstance(layer, SparseConv2d)
        layer.read_as(conv)
        carry_over(conv, layer, cls.reserved_names(), shared=False)
        return layer

    def read_as(self, conv: nn.Conv2d | SparseConv2d) -> SparseConv2d:
        """Take over how ``conv`` reads its input and lays out its output; gives the layer itself."""
        self.stride = _pair(conv.stride)
        if isinstance(conv, SparseConv2d):
            self.channels_last = conv.channels_last
        else:
            self.channels_last = _is_channels_last(conv.weight)
        return self

    @property
    def in_channels(self) -> int:
        """Channels of x."""
        return self.in_features

    @property
    def out_channels(self) -> int:
        """Channels of y."""
        return self.out_features

    @property
    def kernel_size(self) -> tuple[int, int]:
        """(1, 1), as nn.Conv2d would say."""
        return 1, 1

    def to_linear(self) -> nn.Linear:
        """Raises ModelError: nn.Linear takes rows and no images; ``to_conv`` is the way back."""
        raise ModelError("nn.Linear takes rows and this layer images; use to_conv(), which gives nn.Conv2d")

    def to_conv(self) -> nn.Conv2d:
        """The same layer as nn.Conv2d, zeros in place, exactly; the way back for training.

        Hooks, attributes and buffers that the layer has beside its weight are copied.
        Raises ModelError for a layer with an activation, which nn.Conv2d cannot hold.
        """
        if self.activation != "none":
            raise ModelError(
                f"this layer applies {self.activation}, which nn.Conv2d cannot; apply it after the layer and set "
                f'layer.activation = "none" first'
            )
        if type(self).forward is not SparseConv2d.forward:
            raise ModelError(f"{type(self).__name__} has a forward of its own, which nn.Conv2d would not repeat")
        conv = nn.Conv2d(self.in_features, self.out_features, 1, self.stride, bias=self.bias is not None, device="meta")
        with torch.inference_mode(False):
            dense = registry.backends()[self.kernel.backend].dense(self.kernel)[..., None, None]
            if self.channels_last:
                dense = dense.clone(memory_format=torch.channels_last)
            conv.weight = nn.Parameter(dense)
            if self.bias is not None:
                conv.bias = nn.Parameter(self.bias.detach().clone(), requires_grad=self.bias.requires_grad)
        carry_over(self, conv, dir(nn.Conv2d), shared=False)
        return conv.train(self.training)

    def forward(self, input: Tensor) -> Tensor:
        """y [B, out_channels, Hout, Wout] for input [B, in_channels, H, W], both without B for one image."""
        if not isinstance(input, Tensor):
            return super().forward(input)  # says what is wrong with it
        if input.ndim not in (3, 4) or input.shape[-3] != self.in_features:
            raise ModelError(
                f"input has shape {tuple(input.shape)}; this layer takes [B, {self.in_features}, H, W] or "
                f"[{self.in_features}, H, W], so reshape it or check the layer before"
            )
        down, across = self.stride
        read = input if down == across == 1 else input[..., ::down, ::across]
        y = super().forward(read.movedim(-3, -1)).movedim(-1, -3)
        images = input if input.ndim == 4 else input[None]
        last = input.numel() > 0 and (self.channels_last or _is_channels_last(images))
        # where strides could mean either format, contiguous() would give y back as it is
        return y if last else y.clone(memory_format=torch.contiguous_format)

    def extra_repr(self) -> str:
        """As SparseLinear's, and the stride."""
        return f"{super().extra_repr()}, stride={self.stride}"


def _as_linear(conv: nn.Conv2d) -> nn.Linear:
    if not isinstance(conv, nn.Conv2d):
        raise ModelError(f"from_conv takes an nn.Conv2d, got {type(conv).__name__}")
    padded = conv.padding not in ("valid", "same", (0, 0))
    if tuple(conv.kernel_size) != (1, 1) or conv.groups != 1 or padded:
        raise ModelError(
            f"from_conv takes a convolution of 1x1 in one group without padding, got kernel_size={conv.kernel_size}, "
            f"groups={conv.groups}, padding={conv.padding}; others stay dense in execution"
        )
    if reason := why_not_carried(conv, nn.Conv2d):
        raise ModelError(f"from_conv cannot pack this layer: {reason}")
    linear = nn.Linear(conv.in_channels, conv.out_channels, bias=conv.bias is not None, device="meta")
    linear.weight = nn.Parameter(conv.weight.detach().flatten(1), requires_grad=conv.weight.requires_grad)
    linear.register_parameter("bias", conv._parameters.get("bias"))
    return linear.train(conv.training)


def _pair(stride: int | tuple[int, ...]) -> tuple[int, int]:
    both = (stride, stride) if isinstance(stride, int) else stride
    if not isinstance(both, tuple | list) or len(both) != 2 or not all(isinstance(e, int) and e >= 1 for e in both):
        raise ModelError(f"stride={stride} is none; allowed are one or two numbers of at least 1")
    return int(both[0]), int(both[1])


def _is_channels_last(x: Tensor) -> bool:
    """Whether torch takes ``x`` [B, C, H, W] for channels_last: its strides grow from C over W and H to B.

    Where they could mean both, as for one channel, it is not.
    """
    if x.ndim != 4 or x.numel() == 0 or x.stride(1) == 0:
        return False
    least = 0
    for side in (1, 3, 2, 0):
        if x.stride(side) < least or (side == 0 and least == x.stride(1)):
            return False
        least = x.stride(side) * x.shape[side]
    return True
