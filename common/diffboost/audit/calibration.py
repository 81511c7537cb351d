"""What tells good slices from defective ones: a logistic regression on scores, and a threshold."""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import pandas as pd
from scipy.optimize import minimize

logger = logging.getLogger(__name__)

WEIGHT_DECAY = 5.0  # of the regression's weights, beside a loss that is summed over samples
FARTHEST = 4.0  # standard deviations of good samples at which a score is cut
PARTS = 5  # of the cases: each part's scores come from a regression on the others
LEAST_FOUND = 0.5  # share of planted defects; a judge that finds fewer is of little use


@dataclass(frozen=True)
class Judge:
    """A regression's verdict on scores; positive is kept.

    Args:
        names: of the scores, (N,).
        middle, spread: median and standard deviation of good samples, (N,).
        weights: (N,), of the scores z in standard deviations from the middle.
        products: (N, N), symmetric, of their products: the verdict is z w + z P z + bias.
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
    products: np.ndarray
    bias: float
    num_good: int = 0
    num_defects: int = 0
    lost: float = float("nan")
    found: Mapping[str, float] | None = None

    def parts(self, scores: pd.DataFrame) -> np.ndarray:
        """What each score adds to the verdict, (rows, N); 0 where it is as in good samples.

        Two scores share what their product adds. A score that a sample lacks (NaN) adds nothing.
        """
        values = _standardized(scores[list(self.names)].to_numpy(float), self.middle, self.spread)
        return values * (self.weights + values @ self.products)

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
            "products": self.products.round(4).tolist(),
            "bias": round(self.bias, 4),
            "num_good": self.num_good,
            "num_defects": self.num_defects,
            "good_lost": round(self.lost, 4),
            "defects_rejected": {kind: round(share, 4) for kind, share in self.found.items()},
        }


def calibrate(scores: pd.DataFrame, names: Sequence[str], max_lost: float) -> Judge:
    """A judge that loses at most a share of good samples, of cases that it did not see.

    The threshold is the order statistic of the good samples' verdicts below which a share of about
    ``max_lost`` lies, up to one sample; these verdicts come from regressions on other cases. Where
    few cases are there and one of them looks bad to the others, it lies so low that most defects
    pass; a warning names the cases then.

    Args:
        scores: a row a sample: the scores, ``case``, and ``kind`` of the defect, empty for none.
        names: the scores to use.
        max_lost: share of good samples that may be rejected, in (0, 1).

    Raises:
        ValueError: ``max_lost`` is outside of its range, good samples are not of two cases at
            least, or defective ones are missing.

    Source: engineering choice; the threshold is split conformal prediction's.
    """
    if not 0 < max_lost < 1:
        raise ValueError(f"max_lost: {max_lost}; a share between 0 and 1 is needed")
    good = (scores.kind == "").to_numpy()
    with_good = set(scores.case[good])
    if len(with_good) < 2 or good.all():
        raise ValueError(
            f"calibration: {len(with_good)} cases with good samples, {(~good).sum()} defects; "
            "two such cases, and defects are needed"
        )
    # Cases with good samples come first: two of them never share a part, so none lacks them.
    cases = sorted(scores.case.unique(), key=lambda case: case not in with_good)
    parts = scores.case.map({case: number % PARTS for number, case in enumerate(cases)}).to_numpy()
    verdicts = np.zeros(len(scores))
    for part in np.unique(parts):
        verdicts[parts == part] = _regress(scores[parts != part], names).verdict(
            scores[parts == part]
        )
    ordered = np.sort(verdicts[good])
    threshold = ordered[min(int(max_lost * (len(ordered) + 1)), len(ordered) - 1)]
    rejected = pd.Series(verdicts < threshold).groupby(scores.kind.to_numpy()).mean()
    found = {kind: float(share) for kind, share in rejected.items() if kind}
    if np.mean(list(found.values())) < LEAST_FOUND:
        logger.warning(
            "quality filter: it will reject little, for it finds %.0f %% of planted defects; good "
            "slices of %s look as bad to what is learned of other cases, and at most %g of good "
            "slices may be lost (max_lost)",
            100 * np.mean(list(found.values())),
            ", ".join(sorted(set(scores.case[good & (verdicts <= threshold)]))),
            max_lost,
        )
    whole = _regress(scores, names)
    return replace(
        whole,
        bias=whole.bias - float(threshold),
        num_good=int(good.sum()),
        num_defects=int((~good).sum()),
        lost=float(rejected[""]),
        found=found,
    )


def _standardized(values: np.ndarray, middle: np.ndarray, spread: np.ndarray) -> np.ndarray:
    """Scores in standard deviations from the middle, cut at FARTHEST; 0 where there is none."""
    return np.nan_to_num(np.clip((values - middle) / spread, -FARTHEST, FARTHEST))


def _regress(scores: pd.DataFrame, names: Sequence[str]) -> Judge:
    """Logistic regression of good or not; both sides weigh the same, and so do kinds of defects."""
    values = scores[list(names)].to_numpy(float, copy=True)
    good = (scores.kind == "").to_numpy()
    values[:, np.isnan(values[good]).all(0)] = 0  # no good sample has it, so it can tell nothing
    middle, spread = np.nanmedian(values[good], 0), np.maximum(np.nanstd(values[good], 0), 1e-3)
    inputs = _standardized(values, middle, spread)
    first, second = np.triu_indices(len(names))
    products = inputs[:, first] * inputs[:, second] / 2
    inputs = np.hstack([inputs, products, np.ones((len(inputs), 1))])
    counts = scores.kind.map(scores.kind.value_counts()).to_numpy()
    shares = np.where(good, 0.5, 0.5 / max(scores.kind[~good].nunique(), 1)) / counts * len(scores)
    decay = np.append(np.full(inputs.shape[1] - 1, WEIGHT_DECAY), 0.0)

    def loss(weights: np.ndarray) -> tuple[float, np.ndarray]:
        odds = inputs @ weights
        value = shares @ (np.logaddexp(0, odds) - good * odds) + decay @ weights**2 / 2
        slope = inputs.T @ (shares * (1 / (1 + np.exp(-odds)) - good)) + decay * weights
        return value, slope

    found = minimize(loss, np.zeros(inputs.shape[1]), jac=True, method="L-BFGS-B").x
    matrix = np.zeros((len(names), len(names)))
    matrix[first, second] = found[len(names) : -1] / 4
    return Judge(
        tuple(names), middle, spread, found[: len(names)], matrix + matrix.T, float(found[-1])
    )
