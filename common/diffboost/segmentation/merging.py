"""DiffBoost's own step: a slice meets one of its variants, and patches of both are merged."""

import math
from collections.abc import Callable, Hashable, Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from monai.inferers import Inferer
from monai.transforms import RandomizableTransform

from diffboost.data.manifest import read_manifest
from diffboost.data.memory import PictureMemory
from diffboost.data.transforms import LoadSliced
from diffboost.knobs import nearest

MERGES = ("logits", "images")


def variants_by_slice(
    synthetic_dir: str | Path, num_variants: int | None = None
) -> dict[tuple[str, int], list[str]]:
    """Files of the kept variants of each (case, slice), in the order of their numbers.

    A slice whose variants were all rejected has an empty list; one without variants is not there.

    Args:
        synthetic_dir: a synthetic store (images/, manifest.parquet).
        num_variants: use variants 0 … num_variants - 1 only, which are what a synthesis of that
            ratio would have made; None uses all.

    Raises:
        FileNotFoundError: there is no manifest.
        ValueError: num_variants is not between 1 and the store's ratio, or the manifest is damaged.

    Source: engineering choice (ablation over the ratio, paper Sec. 5.1)
    """
    manifest = read_manifest(synthetic_dir, ["image", "case", "slice", "variant", "kept"])
    ratio = int(manifest["variant"].max()) + 1
    if num_variants is not None and not 1 <= num_variants <= ratio:
        raise ValueError(f"num_variants: {num_variants}; {synthetic_dir} has 1 to {ratio} a slice")
    manifest = manifest[manifest["variant"] < (num_variants or ratio)]
    manifest = manifest.sort_values(["case", "slice", "variant"])
    root = Path(synthetic_dir).resolve()
    return {
        (str(case), int(number)): [str(root / image) for image in rows["image"][rows["kept"]]]
        for (case, number), rows in manifest.groupby(["case", "slice"])
    }


def own_labels(variants: Sequence[str]) -> list[str] | None:
    """Labels of variants whose anatomy was deformed, in ``labels/`` beside ``images/``, or None.

    Args:
        variants: files of a slice's variants.

    Source: engineering choice (the names are those of a slice store).
    """
    paths = [Path(path) for path in variants]
    if not paths or not (paths[0].parents[1] / "labels").is_dir():
        return None
    return [str(path.parents[1] / "labels" / path.name) for path in paths]


class PickVariantd(RandomizableTransform):
    """Draws one file of ``variants`` and loads it, float32 (1, H, W) in [-1, 1].

    A variant with a label of its own (``variant_labels``) brings it: in place of ``label`` where it
    takes the place of the slice, else as a second channel of it, which RandMergeMaskd merges.

    Args:
        key: where it goes: "synthetic", beside the real slice, or "image", in its place.
        memory: keeps decoded pictures; None reads their files each time.

    Raises:
        ValueError: the variant's shape is not the slice's.

    Source: facts 23 (each epoch one of N variants, so steps do not grow with N)
    """

    def __init__(self, key: str = "synthetic", memory: PictureMemory | None = None) -> None:
        super().__init__(prob=1.0)
        self.key = key
        self.load = LoadSliced(["synthetic", "label"], allow_missing_keys=True, memory=memory)

    def __call__(self, data: Mapping[Hashable, object]) -> dict[Hashable, object]:
        """The item with a variant at ``key``."""
        paths = data["variants"]
        number = self.R.randint(len(paths))
        path, labels = paths[number], data.get("variant_labels")
        files = {"synthetic": path} | ({"label": labels[number]} if labels else {})
        loaded = self.load(files)
        variant = loaded["synthetic"]
        if variant.shape != data["image"].shape:
            shape, expected = tuple(variant.shape), tuple(data["image"].shape)
            raise ValueError(f"synthetic: {path} has shape {shape}, its slice has {expected}")
        item = {**data, self.key: variant}
        if labels and self.key == "image":
            item["label"] = loaded["label"]
        elif labels:
            item["label"] = torch.cat([torch.as_tensor(data["label"]), loaded["label"]])
        return item


class RandMergeMaskd(RandomizableTransform):
    """Draws ``merge_mask``, float32 (1, H, W): 1 where a patch is real, 0 where it is synthetic.

    A matrix of ceil(H / patch_size) x ceil(W / patch_size) uniform numbers is compared with alpha
    and enlarged by nearest neighbor; the last patches are cut at the slice's border. A ``label`` of
    two channels, the slice's and its variant's, becomes one by the same mask.

    Args:
        alpha: chance in [0, 1] that a patch is real.
        patch_size: side of a patch in pixels, at least 1.

    Raises:
        ValueError: alpha or patch_size outside these ranges.

    Source: Algorithm 1; facts 22, 23
    """

    def __init__(self, alpha: float, patch_size: int) -> None:
        super().__init__(prob=1.0)
        if not 0 <= alpha <= 1:
            raise ValueError(f"alpha: {alpha} is not in [0, 1]")
        if patch_size < 1:
            raise ValueError(f"patch_size: {patch_size} is not at least 1 pixel")
        self.alpha = alpha
        self.patch_size = patch_size

    def __call__(self, data: Mapping[Hashable, object]) -> dict[Hashable, object]:
        """The item with ``merge_mask`` of the size of ``image``."""
        height, width = data["image"].shape[-2:]
        size = (math.ceil(height / self.patch_size), math.ceil(width / self.patch_size))
        real = (self.R.uniform(size=size) < self.alpha).astype(np.float32)
        mask = np.kron(real, np.ones((self.patch_size, self.patch_size), np.float32))
        mask = torch.from_numpy(mask[None, :height, :width].copy())
        item = {**data, "merge_mask": mask}
        if len(data.get("label", ())) == 2:
            own, variant = torch.as_tensor(data["label"]).split(1)
            item["label"] = torch.where(mask > 0, own, variant)
        return item


class MergeInferer(Inferer):
    """One batched pass over real and synthetic slices, merged by the mask; a plain pass without.

    Batch norm thus sees both halves at once; the released code makes two passes.

    Args:
        merge: "images" merges the two slices before a single pass (the paper's prose);
            "logits" merges the two predictions, ``y * m + y_aug * (1 - m)`` (released code).
        amp: run the network in bfloat16.

    Raises:
        ValueError: unknown merge.

    Source: Algorithm 1; facts 22
    """

    def __init__(self, merge: str = "images", amp: bool = False) -> None:
        super().__init__()
        if merge not in MERGES:
            raise ValueError(f"merge: {merge!r} is unknown; {nearest(merge, MERGES)}")
        self.merge = merge
        self.amp = amp

    def __call__(
        self,
        inputs: torch.Tensor,
        network: Callable[..., torch.Tensor],
        synthetic: torch.Tensor | None = None,
        merge_mask: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Logits, float32.

        Args:
            inputs: real slices (B, 1, H, W).
            network: maps slices to logits (B, classes, H, W).
            synthetic: a variant of each slice (B, 1, H, W), or None.
            merge_mask: (B, 1, H, W), 1 = real; needed with ``synthetic``.

        Returns:
            Logits (B, classes, H, W).
        """
        with torch.autocast(inputs.device.type, dtype=torch.bfloat16, enabled=self.amp):
            if synthetic is None:
                return network(inputs).float()
            if self.merge == "images":
                return network(inputs * merge_mask + synthetic * (1 - merge_mask)).float()
            real, variant = network(torch.cat([inputs, synthetic])).float().chunk(2)
            return real * merge_mask + variant * (1 - merge_mask)
