"""What a client offers servers for a request: nothing. The original's classes, kept for scripts.

No server reads points, in the original as here.
"""

from abc import ABC, abstractmethod


class SpendingPolicyBase(ABC):
    """Says how many points a request is worth."""

    @abstractmethod
    def get_points(self, protocol: str, *args: object, **kwargs: object) -> float:
        """protocol: "rpc_forward", "rpc_backward" or "rpc_inference"."""


class NoSpendingPolicy(SpendingPolicyBase):
    """Every request is worth 0 points."""

    def get_points(self, protocol: str, *args: object, **kwargs: object) -> float:
        return 0.0
