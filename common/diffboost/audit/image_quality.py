"""Image quality: how near generated images are to the real ones, by MONAI's metrics."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import pandas as pd
import torch
from monai.metrics import MAEMetric, MSEMetric, MultiScaleSSIMMetric, RMSEMetric, SSIMMetric
from monai.metrics.regression import RegressionMetric
from tqdm import tqdm

from diffboost.data.transforms import LoadSliced
from diffboost.files import write_aside

METRICS = ("MAE", "MSE", "RMSE", "SSIM", "MS-SSIM")
WINDOW_PX = 11
SCALE_WEIGHTS = (0.0448, 0.2856, 0.3001, 0.2363, 0.1333)


def scale_weights(side_px: int) -> tuple[float, ...]:
    """Weights of the scales of MS-SSIM that an image is large enough for.

    The standard five scales with their 11 px window need 176 px in MONAI. A smaller image keeps
    the window and as many of the finest scales as fit (MONAI's rule, and a window within the
    coarsest scale), with their standard weights divided by their sum: 4 from 99 px, 3 from 44 px,
    2 from 22 px. So figures of images below 176 px are not those of five scales.

    Args:
        side_px: shorter side of the image.

    Raises:
        ValueError: the window does not fit.

    Source: Wang et al. 2003 (five scales and weights); fewer scales are our choice.
    """
    for count in range(len(SCALE_WEIGHTS), 0, -1):
        coarsest_px = min(side_px // max(1, count - 1) ** 2, side_px // 2 ** (count - 1))
        if coarsest_px >= WINDOW_PX:
            kept = SCALE_WEIGHTS[:count]
            total = 1 if count == len(SCALE_WEIGHTS) else sum(kept)
            return tuple(weight / total for weight in kept)
    raise ValueError(f"image_size: {side_px} px; SSIM's window needs {WINDOW_PX} px at least")


def quality_metrics(side_px: int) -> dict[str, RegressionMetric]:
    """MONAI's metrics of Table 1 by name, for images in [0, 1].

    Args:
        side_px: shorter side of the images; it decides on the scales of MS-SSIM.

    Source: paper Sec. 4.1, Table 1; windows of 11 px with sigma 1.5 are MONAI's and Wang's.
    """
    weights = scale_weights(side_px)
    metrics = (
        MAEMetric(),
        MSEMetric(),
        RMSEMetric(),
        SSIMMetric(spatial_dims=2, data_range=1.0, win_size=WINDOW_PX),
        MultiScaleSSIMMetric(2, data_range=1.0, kernel_size=WINDOW_PX, weights=weights),
    )
    return dict(zip(METRICS, metrics, strict=True))


def image_quality(generated: torch.Tensor, real: torch.Tensor) -> dict[str, list[float]]:
    """Every metric of every image, on intensities scaled to [0, 1].

    The paper does not say its range; on [-1, 1] MAE and RMSE would double, MSE quadruple.

    Args:
        generated: (B, 1, H, W) in [-1, 1].
        real: the same.

    Returns:
        Metric to B values.

    Source: paper Sec. 4.1, Table 1; the range is our choice.
    """
    generated, real = ((images.double() + 1) / 2 for images in (generated, real))
    metrics = quality_metrics(min(real.shape[-2:]))
    return {name: metric(generated, real)[:, 0].tolist() for name, metric in metrics.items()}


def measure_image_quality(
    data: Sequence[dict],
    images: Mapping[str, Sequence[Path]],
    path: str | Path,
    image_size: int,
    batch_size: int = 64,
) -> None:
    """Write ``image_quality.csv``, a row an image, a method and a metric.

    Args:
        data: items with ``case``, ``slice`` and the path ``image`` of the real image.
        images: method to its generated images, in the order of ``data``.
        path: the CSV file: columns ``case``, ``slice``, ``method``, ``metric``, ``value``.
        image_size: side to which real images of another size are brought, px.
        batch_size: images measured at a time.

    Raises:
        FileNotFoundError: a generated image is not there.

    Source: paper Sec. 4.1, Table 1.
    """
    load = LoadSliced(["image"], image_size=image_size)
    rows = []
    for start in tqdm(range(0, len(data), batch_size), desc="image quality"):
        batch = data[start : start + batch_size]
        real = torch.stack([load({"image": item["image"]})["image"] for item in batch])
        for method, paths in images.items():
            found = [load({"image": str(name)}) for name in paths[start : start + batch_size]]
            quality = image_quality(torch.stack([item["image"] for item in found]), real)
            for position, item in enumerate(batch):
                place = {"case": item["case"], "slice": item["slice"], "method": method}
                rows += [
                    place | {"metric": metric, "value": round(values[position], 6)}
                    for metric, values in quality.items()
                ]
    write_aside(Path(path), lambda partial: pd.DataFrame(rows).to_csv(partial, index=False))


def aggregate_quality(quality: pd.DataFrame) -> pd.DataFrame:
    """Mean, standard deviation over images (n - 1) and n of each method and metric.

    Args:
        quality: what :func:`measure_image_quality` wrote.

    Returns:
        Columns method, metric, mean, sd, n, in the order of ``quality``.

    Source: paper Table 1 (mean ± standard deviation).
    """
    groups = quality.groupby(["method", "metric"], sort=False).value
    return groups.agg(mean="mean", sd="std", n="size").reset_index()
