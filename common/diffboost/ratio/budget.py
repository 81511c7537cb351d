"""What a search for the ratio may cost, which ratios it tries, and what they cost."""

import math
from collections.abc import Mapping
from dataclasses import dataclass

from diffboost.knobs import nearest

# Ratios grow by about two a rung, as an ablation over them does (paper Figure 6: 1 to 50).
SERIES = (1, 2, 5, 10, 20, 50, 100, 200, 500)
# Budgets by name: how many of the unit on the right one of them is.
BUDGETS = {
    "share": ("share", 1.0),
    "hours": ("seconds", 3600.0),
    "tflop": ("flops", 1e12),
    "pflop": ("flops", 1e15),
}


@dataclass(frozen=True)
class Price:
    """What the parts of a search cost, all in one unit (FLOPs or seconds).

    Args:
        variants: one more variant of every training slice.
        probe: one training of a segmenter to tell a rung's worth, scored.
        training: one whole training of it.

    Source: engineering choice
    """

    variants: float
    probe: float
    training: float

    def whole(self, ratio: int) -> float:
        """All variants of a ratio, and one training on them."""
        return self.variants * ratio + self.training


@dataclass(frozen=True)
class Budget:
    """What a search may cost.

    Args:
        amount: in ``unit``; for ``share`` in (0, 1].
        unit: ``seconds`` of this machine, ``flops``, or ``share`` of the FLOPs of the largest
            ratio's variants and one training on them.

    Source: engineering choice
    """

    amount: float
    unit: str

    @property
    def counts(self) -> str:
        """What is added up: ``seconds`` or ``flops``."""
        return "seconds" if self.unit == "seconds" else "flops"

    def limit(self, price: Price, max_ratio: int) -> float:
        """The budget in ``counts``; ``price`` in the same."""
        return self.amount * price.whole(max_ratio) if self.unit == "share" else self.amount


def read_budget(value: object) -> Budget:
    """A budget as people write it.

    Args:
        value: one of {share: x} with x in (0, 1], {hours: x}, {tflop: x}, {pflop: x}.

    Raises:
        ValueError: another value.

    Source: engineering choice
    """
    if not isinstance(value, Mapping) or len(value) != 1:
        raise ValueError(f"budget: {value!r}; one of {{{': x}, {'.join(BUDGETS)}: x}} is needed")
    name, amount = next(iter(value.items()))
    if name not in BUDGETS:
        raise ValueError(f"budget: {name!r} is unknown; {nearest(name, BUDGETS)}")
    highest = 1 if name == "share" else math.inf
    if type(amount) not in (int, float) or not 0 < amount <= highest or math.isinf(amount):
        raise ValueError(f"budget: {name}: {amount!r}; a number above 0 is needed, a share up to 1")
    unit, factor = BUDGETS[name]
    return Budget(amount * factor, unit)


def rungs_up_to(max_ratio: int) -> list[int]:
    """The ratios that a search tries: 1, 2, 5, 10, 20 … and the largest.

    Raises:
        ValueError: the largest is not a whole number from 2 up.

    Source: engineering choice
    """
    if type(max_ratio) is not int or max_ratio < 2:
        raise ValueError(f"max_ratio: {max_ratio!r}; a whole number from 2 up is needed")
    return [ratio for ratio in SERIES if ratio < max_ratio] + [max_ratio]
