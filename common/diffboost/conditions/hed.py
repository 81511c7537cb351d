"""HED: controlnet-aux's network with published weights. Imported only where an edge needs it."""

import hashlib
import warnings
from pathlib import Path

from diffboost.conditions.hed_weights import bsds500_file, controlnet_hed_file
from diffboost.data.weights import load_weights

with warnings.catch_warnings():  # controlnet_aux loads all its annotators; their libraries warn
    warnings.simplefilter("ignore")
    from controlnet_aux.hed import ControlNetHED_Apache2


def load_hed(name: str, weights: str | Path | None) -> tuple[ControlNetHED_Apache2, str]:
    """HED in float32 without gradients, and the hash of its weights' file.

    Args:
        name: ``hed-bsds500`` or ``controlnet-hed``.
        weights: see :func:`diffboost.conditions.edges.load_edge_detector`.

    Raises:
        ValueError: the weights' hash or tensors are not the expected ones.
        FileNotFoundError: no weights; says where they were looked for and how to get them.

    Source: DiffBoost Sec. 3.2; facts, item 11.
    """
    path = bsds500_file(weights) if name == "hed-bsds500" else controlnet_hed_file(weights)
    network = ControlNetHED_Apache2()
    load_weights(network, path, "edge_weights")
    return network.float().requires_grad_(False), hashlib.sha256(path.read_bytes()).hexdigest()
