"""What an optimizer step measures, added up over its micro-batches and ranks."""

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from grpo.mismatch import MismatchMeter
from models.balance import count_experts, load_metrics
from models.moe import Routing


class Meters:
    """Weighted sums over micro-batches; the weights of a batch sum to 1, so sums are means.

    All stays on the device until the report, so that a GPU is never waited for in between.
    """

    def __init__(self) -> None:
        self._sums: dict[str, Tensor] = {}
        self.expert_counts: dict[int, Tensor] = {}
        """Layer -> [E] tokens that used each expert."""
        self.mismatch = MismatchMeter()

    def add(self, name: str, values_N: Tensor, weights_N: Tensor | float) -> None:
        _add(self._sums, {name: (values_N.detach() * weights_N).sum().double()})

    def add_experts(self, routing: Mapping[int, Routing]) -> None:
        _add(self.expert_counts, {layer: count_experts(routed) for layer, routed in routing.items()})

    @staticmethod
    def merged(meters: Sequence["Meters"]) -> "Meters":
        """What several ranks have seen together."""
        total = Meters()
        for one in meters:
            _add(total._sums, one._sums)
            _add(total.expert_counts, one.expert_counts)
            total.mismatch.merge(one.mismatch)
        return total

    def report(self) -> dict[str, float]:
        sums = {name: total.item() for name, total in self._sums.items()}
        return sums | self.mismatch.report() | load_metrics(self.expert_counts)


def _add(totals: dict[Any, Tensor], more: Mapping[Any, Tensor]) -> None:
    for name, value in more.items():
        totals[name] = totals[name] + value if name in totals else value
