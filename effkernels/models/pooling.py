"""Global pooling as a module of a network."""

# No `from __future__ import annotations`: torch.fx writes the types into its graphs, and TorchScript reads no strings.
from collections.abc import Callable

from torch import Tensor, nn

from effkernels.nn.fusible import is_untouched

POOL_TYPES: tuple[str, ...] = ("avg", "max", "")


class GlobalPool(nn.Module):
    """Pool each channel to one number, (N, C, H, W) to (N, C); with pool_type "" the identity.

    Children `pool` and `flatten`, with the names and the methods of timm's `SelectAdaptivePool2d`.

    Args:
        pool_type: "avg", "max" or "".

    Raises:
        ValueError: pool_type is another one.
    """

    def __init__(self, pool_type: str = "avg") -> None:
        super().__init__()
        if pool_type not in POOL_TYPES:
            raise ValueError(f"global_pool={pool_type!r} is not known; allowed: {', '.join(map(repr, POOL_TYPES))}")
        self.pool_type = pool_type
        pools: dict[str, Callable[[], nn.Module]] = {
            "avg": lambda: nn.AdaptiveAvgPool2d(1),
            "max": lambda: nn.AdaptiveMaxPool2d(1),
            "": nn.Identity,
        }
        self.pool = pools[pool_type]()
        self.flatten: nn.Module = nn.Flatten(1) if pool_type else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """x: (N, C, H, W), floating; returns (N, C), or x."""
        y: Tensor = self.flatten(self.pool(x))
        return y

    def is_plain_mean(self) -> bool:
        """Return whether a call is the mean over the image and nothing else: no other pooling, nothing attached."""
        pool, flatten = self._modules.get("pool"), self._modules.get("flatten")
        return (
            type(self) is GlobalPool
            and len(self._modules) == 2
            and type(pool) is nn.AdaptiveAvgPool2d
            and pool.output_size in (1, (1, 1))
            and type(flatten) is nn.Flatten
            and (flatten.start_dim, flatten.end_dim) == (1, -1)
            and all(map(is_untouched, (self, pool, flatten)))
        )

    def is_identity(self) -> bool:
        """Return whether nothing is pooled."""
        return not self.pool_type

    def feat_mult(self) -> int:
        """Return the number of features for each channel: 1."""
        return 1

    def extra_repr(self) -> str:
        return f"pool_type={self.pool_type!r}"
