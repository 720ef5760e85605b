"""Stochastic depth, dropped per sample."""

# No `from __future__ import annotations`: torch.fx writes the types into its graphs, and TorchScript reads no strings.
from torch import Tensor, nn


class DropPath(nn.Module):
    """Drop the whole residual branch of a sample with probability `rate`, scaling what is kept by 1 / (1 - rate).

    Huang et al. 2016, "Deep Networks with Stochastic Depth". One decision per sample, as the TensorFlow EfficientNet
    and timm make it (Hugging Face's implementation drops single elements). The identity in eval mode.

    Args:
        rate: probability of dropping, in [0, 1).

    Raises:
        ValueError: rate outside [0, 1).
    """

    def __init__(self, rate: float = 0.0) -> None:
        super().__init__()
        if not 0.0 <= rate < 1.0:
            raise ValueError(f"DropPath: rate={rate} is not a probability in [0, 1)")
        self.rate = rate

    def forward(self, x: Tensor) -> Tensor:
        """x: (N, ...), floating; returns the same shape and dtype."""
        if self.rate == 0.0 or not self.training:
            return x
        keep = 1.0 - self.rate
        mask = x.new_empty((x.shape[0],) + (1,) * (x.ndim - 1)).bernoulli_(keep)
        return x * mask.div_(keep)

    def extra_repr(self) -> str:
        return f"rate={self.rate:g}"
