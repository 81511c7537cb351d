"""Phantoms as MONAI Label's data: studies with labels, volumes and pictures to infer."""

import shutil
import sys
from pathlib import Path

import nibabel as nib
import numpy as np
from PIL import Image

from diffboost.data.phantom_volumes import write_decathlon_task


def main(folder: Path) -> None:
    """Writes studies/, studies/labels/final/, volumes/ and pictures/ below a new folder."""
    source = write_decathlon_task(folder / "source", seed=7, num_training=4, num_test=1)
    for name in ("studies/labels/final", "volumes", "pictures"):
        (folder / name).mkdir(parents=True)
    images = sorted((source / "imagesTr").glob("*.nii.gz"))
    for image in images:
        shutil.copy(image, folder / "studies" / image.name)
        label = source / "labelsTr" / image.name
        shutil.copy(label, folder / "studies" / "labels" / "final" / image.name)
    shutil.copy(images[0], folder / "volumes" / images[0].name)
    volume = nib.load(images[1])
    turned = nib.orientations.ornt_transform(
        nib.io_orientation(volume.affine), nib.orientations.axcodes2ornt("SPL")
    )
    nib.save(volume.as_reoriented(turned), folder / "volumes" / "turned.nii.gz")
    axial = np.asarray(nib.as_closest_canonical(volume).dataobj, np.float64)
    middle = axial[:, 5:-4, axial.shape[2] // 2]
    levels = np.round(255 * (middle - middle.min()) / np.ptp(middle)).astype(np.uint8)
    gray = Image.fromarray(levels)  # rows and columns differ in number
    gray.save(folder / "pictures" / "gray.png")
    Image.merge("RGB", [gray] * 3).save(folder / "pictures" / "photo.png")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
