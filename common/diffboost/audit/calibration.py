"""What tells good slices from defective ones: a logistic regression over scores, a threshold."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
from scipy.optimize import minimize

WEIGHT_DECAY = 1.0  # of the regression's weights, beside a loss that is summed over samples
FARTHEST = 4.0  # standard deviations of good samples at which a score is cut
PARTS = 5  # of the cases: each part's scores come from a regression on the others


@dataclass(frozen=True)
class Judge:
    """A regression's verdict on scores; positive is kept.

    Args:
        names: of the scores, (N,).
        middle, spread: median and standard deviation of good samples, (N,).
        weights: (N,), of the scores in standard deviations from the middle.
        bias: added to their sum; the threshold is in it.
        num_good, num_defects: samples that it was made from.
        lost, found: shares of good samples and of defects that it rejects, measured on cases that
            the regression did not see.

    Source: engineering choice.
    """

    names: tuple[str, ...]
    middle: np.ndarray
    spread: np.ndarray
    weights: np.ndarray
    bias: float
    num_good: int = 0
    num_defects: int = 0
    lost: float = float("nan")
    found: Mapping[str, float] | None = None

    def parts(self, scores: pd.DataFrame) -> np.ndarray:
        """What each score adds to the verdict, (rows, N); 0 where it is as in good samples."""
        values = scores[list(self.names)].to_numpy(float)
        return np.clip((values - self.middle) / self.spread, -FARTHEST, FARTHEST) * self.weights

    def verdict(self, scores: pd.DataFrame) -> np.ndarray:
        """Log-odds of being good above the threshold's, (rows,)."""
        return self.parts(scores).sum(1) + self.bias

    def describe(self) -> dict:
        """What quality.json says of it."""
        columns = {"middle": self.middle, "spread": self.spread, "weight": self.weights}
        return {
            "scores": {
                name: {key: round(float(values[place]), 4) for key, values in columns.items()}
                for place, name in enumerate(self.names)
            },
            "bias": round(self.bias, 4),
            "num_good": self.num_good,
            "num_defects": self.num_defects,
            "good_lost": round(self.lost, 4),
            "defects_rejected": {kind: round(share, 4) for kind, share in self.found.items()},
        }


def calibrate(scores: pd.DataFrame, names: Sequence[str], max_lost: float) -> Judge:
    """A judge that loses at most a share of good samples, of cases that it did not see.

    The threshold is the order statistic of the good samples' verdicts of which ``max_lost`` lie
    below in expectation; these verdicts come from regressions on other cases.

    Args:
        scores: a row a sample: the scores, ``case``, and ``kind`` of the defect, empty for none.
        names: the scores to use.
        max_lost: share of good samples that may be rejected, in (0, 1).

    Raises:
        ValueError: ``max_lost`` is outside of its range, good or defective samples are missing, or
            they are of one case.

    Source: engineering choice; the threshold is split conformal prediction's.
    """
    if not 0 < max_lost < 1:
        raise ValueError(f"max_lost: {max_lost}; a share between 0 and 1 is needed")
    good = (scores.kind == "").to_numpy()
    cases = scores.case.unique()
    if len(cases) < 2 or good.all() or not good.any():
        raise ValueError(
            f"calibration: {len(cases)} cases, {good.sum()} good samples, {(~good).sum()} defects; "
            "two cases, and samples of both sides are needed"
        )
    parts = scores.case.map({case: number % PARTS for number, case in enumerate(cases)}).to_numpy()
    verdicts = np.zeros(len(scores))
    for part in np.unique(parts):
        verdicts[parts == part] = _regress(scores[parts != part], names).verdict(
            scores[parts == part]
        )
    ordered = np.sort(verdicts[good])
    threshold = ordered[int(max_lost * (len(ordered) + 1))]
    rejected = pd.Series(verdicts < threshold).groupby(scores.kind.to_numpy()).mean()
    whole = _regress(scores, names)
    return Judge(
        whole.names,
        whole.middle,
        whole.spread,
        whole.weights,
        whole.bias - float(threshold),
        int(good.sum()),
        int((~good).sum()),
        float(rejected[""]),
        {kind: float(share) for kind, share in rejected.items() if kind},
    )


def _regress(scores: pd.DataFrame, names: Sequence[str]) -> Judge:
    """Logistic regression of good or not; both sides weigh the same, and so do kinds of defects."""
    values = scores[list(names)].to_numpy(float)
    good = (scores.kind == "").to_numpy()
    middle, spread = np.median(values[good], 0), np.maximum(values[good].std(0), 1e-3)
    inputs = np.clip((values - middle) / spread, -FARTHEST, FARTHEST)
    inputs = np.hstack([inputs, np.ones((len(inputs), 1))])
    counts = scores.kind.map(scores.kind.value_counts()).to_numpy()
    shares = np.where(good, 0.5, 0.5 / max(scores.kind[~good].nunique(), 1)) / counts * len(scores)
    decay = np.append(np.full(len(names), WEIGHT_DECAY), 0.0)

    def loss(weights: np.ndarray) -> tuple[float, np.ndarray]:
        odds = inputs @ weights
        value = shares @ (np.logaddexp(0, odds) - good * odds) + decay @ weights**2 / 2
        slope = inputs.T @ (shares * (1 / (1 + np.exp(-odds)) - good)) + decay * weights
        return value, slope

    found = minimize(loss, np.zeros(inputs.shape[1]), jac=True, method="L-BFGS-B").x
    return Judge(tuple(names), middle, spread, found[:-1], float(found[-1]))
