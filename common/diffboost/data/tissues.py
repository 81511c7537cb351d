"""What tissues are to each modality, and what findings are made of."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Tissue:
    """How a tissue answers each modality.

    Args:
        hu: CT density, Hounsfield units.
        t1_ms, t2_ms: MR relaxation times at 1.5 T.
        density: MR proton density, 1 is water.
        echo_db: ultrasound backscatter relative to liver.
        attenuation_db: ultrasound loss along half an image's depth, beyond the average.
        strands_db: height of fibrous strands over the echo level.
        texture: relative inner variation.

    Source: engineering choice, after textbook values.
    """

    hu: float
    t1_ms: float
    t2_ms: float
    density: float
    echo_db: float = 0.0
    attenuation_db: float = 0.0
    strands_db: float = 0.0
    texture: float = 0.06


TISSUES = {
    "air": Tissue(-1000, 1000, 10, 0.01, -14, 14, 0, 0.0),
    "gas": Tissue(-900, 1000, 10, 0.03, 14, 50, 0, 0.1),
    "lung": Tissue(-780, 900, 25, 0.15, 8, 30, 0, 0.12),
    "fat": Tissue(-95, 270, 75, 0.95, -7, 0, 13, 0.05),
    "skin": Tissue(20, 500, 40, 0.8, 9, 4, 2, 0.05),
    "gland": Tissue(25, 800, 60, 0.85, 3, 6, 8, 0.12),
    "muscle": Tissue(55, 900, 42, 0.82, -6, 8, 12, 0.07),
    "liver": Tissue(62, 580, 46, 0.82, 0, 4, 2, 0.05),
    "spleen": Tissue(52, 1050, 82, 0.9, -1, 4, 2, 0.05),
    "kidney": Tissue(38, 960, 88, 0.9, -5, 3, 3, 0.07),
    "medulla": Tissue(30, 1350, 110, 0.92, -9, 2, 2, 0.05),
    "sinus": Tissue(-30, 420, 90, 0.9, 9, 5, 6, 0.1),
    "pancreas": Tissue(40, 650, 58, 0.82, 2, 4, 3, 0.12),
    "stomach": Tissue(25, 1300, 100, 0.85, -3, 6, 8, 0.2),
    "bowel": Tissue(35, 1000, 80, 0.82, 2, 12, 8, 0.2),
    "vessel": Tissue(45, 1400, 160, 0.85, -24, -6, 0, 0.03),
    "bone": Tissue(700, 400, 3, 0.08, 22, 70, 0, 0.08),
    "marrow": Tissue(180, 330, 60, 0.8, 5, 40, 4, 0.12),
    "cartilage": Tissue(80, 1050, 35, 0.8, -12, 2, 0, 0.05),
    "meniscus": Tissue(100, 800, 8, 0.4, 2, 8, 6, 0.05),
    "gray": Tissue(38, 950, 100, 0.88, -4, 3, 2, 0.05),
    "white": Tissue(29, 620, 80, 0.74, 0, 3, 2, 0.04),
    "csf": Tissue(6, 4000, 1800, 1.0, -28, -8, 0, 0.03),
    "fluid": Tissue(8, 3200, 1100, 0.98, -30, -14, 0, 0.03),
    "prostate": Tissue(40, 1200, 100, 0.88, -2, 4, 3, 0.12),
    "thyroid": Tissue(100, 900, 75, 0.85, 5, 3, 2, 0.05),
    "lesion": Tissue(22, 1250, 120, 0.92, -21, 3, 2, 0.12),
    "tumor": Tissue(75, 1150, 105, 0.9, -20, 14, 3, 0.15),
    "necrosis": Tissue(15, 2200, 250, 0.95, -21, 0, 4, 0.15),
    "nodule": Tissue(85, 850, 95, 0.9, -10, 1, 3, 0.1),
    "edema": Tissue(18, 1400, 150, 0.92, -10, 0, 2, 0.06),
    "blood": Tissue(72, 700, 60, 0.9, -14, 0, 2, 0.08),
    "calcium": Tissue(900, 600, 4, 0.12, 26, 75, 0, 0.02),
}

FINDING_TISSUES = {
    "lesion": "lesion",
    "mass": "tumor",
    "cyst": "fluid",
    "calcification": "calcium",
    "stone": "calcium",
    "nodule": "nodule",
    "infarct": "edema",
    "hemorrhage": "blood",
    "consolidation": "lesion",
    "sclerosis": "edema",
}
