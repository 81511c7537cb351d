"""Prompts: "modality, organ, finding" of a case, and the phrases that vary it at synthesis."""

from collections.abc import Mapping
from pathlib import PurePath

# The first five are expanded by the paper's code (facts, item 2); the knee and ankle ligaments of
# RadImageNet's finding folders are our addition.
ABBREVIATIONS = {
    "abd": "abdomen",
    "af": "ankle foot",
    "cbd": "common bile duct",
    "gb": "gallbladder",
    "ivc": "inferior vena cava",
    "acl": "anterior cruciate ligament",
    "atfl": "anterior talofibular ligament",
    "lcl": "lateral collateral ligament",
    "mcl": "medial collateral ligament",
    "pcl": "posterior cruciate ligament",
}

# Negative prompt of the ControlNet examples, which the paper's sampling code uses.
STOCK_NEGATIVE_PROMPT = (
    "longbody, lowres, bad anatomy, bad hands, missing fingers, extra digit, fewer digits, "
    "cropped, worst quality, low quality"
)

PHRASES = (
    "higher contrast",
    "lower contrast",
    "brighter exposure",
    "darker exposure",
    "raised gamma",
    "lowered gamma",
    "stretched histogram",
    "flattened histogram",
    "wide intensity window",
    "narrow intensity window",
    "fine speckle",
    "coarse speckle",
    "light thermal noise",
    "strong thermal noise",
    "Rician noise",
    "Poisson noise",
    "smooth texture",
    "grainy texture",
    "sharp tissue borders",
    "soft tissue borders",
    "slight blur",
    "motion blur",
    "low resolution",
    "high resolution",
    "thick slice",
    "thin slice",
    "partial volume effect",
    "smooth bias field",
    "uneven coil sensitivity",
    "shading from left to right",
    "deep attenuation",
    "acoustic shadow",
    "posterior enhancement",
    "high near-field gain",
    "high far-field gain",
    "low dynamic range",
    "high dynamic range",
    "beam hardening",
    "streak artifact",
    "ringing artifact",
    "low dose",
    "high dose",
    "hyperintense organ",
    "hypointense organ",
    "heterogeneous organ",
    "homogeneous organ",
    "fatty surroundings",
    "fibrous surroundings",
    "another scanner",
    "another acquisition protocol",
)


def _words(folder: str) -> str:
    """``"gb_stone" -> "gallbladder stone"``: blanks for underscores, abbreviations in full."""
    words = folder.replace("_", " ").split()
    return " ".join(ABBREVIATIONS.get(word.lower(), word) for word in words)


def prompt_from_path(path: str | PurePath) -> str:
    """The prompt of an image in a RadImageNet tree, from its path.

    Args:
        path: path below the tree's root, ``modality/organ/finding/name.png``.

    Returns:
        ``"modality, organ, finding"``, e.g. ``"US, gallbladder, stone"``.

    Raises:
        ValueError: the image does not lie three folders deep.

    Source: DiffBoost Sec. 3.2; facts, item 2.
    """
    parts = PurePath(path).parts
    if len(parts) != 4:
        raise ValueError(
            f"'{path}': an image of a RadImageNet tree lies at modality/organ/finding/name.png"
        )
    return ", ".join(_words(folder) for folder in parts[:3])


# What the released code's task prompts call them, where RadImageNet's folders say US, MR, CT.
_MODALITY_WORDS = {"US": "ultrasound", "MR": "MRI"}


def task_prompt(task: Mapping, finding: str | None = None) -> str:
    """The prompt of a task's case.

    Args:
        task: a task as ``diffboost.data.tasks.read_task`` gives it.
        finding: what this case shows, in place of the task's own finding (BUSI: the subfolder).

    Returns:
        ``"modality, organ, finding"`` without empty parts; with the task's ``prompt_order``
        "organ_first" ``"organ, modality"``, as in "breast, ultrasound".

    Source: DiffBoost Sec. 3.2; facts 9 (the released task prompts: organ first, in other words
        than pretraining).
    """
    if task["prompt_order"] == "organ_first":
        modality = _MODALITY_WORDS.get(task["modality"], task["modality"])
        return ", ".join(part for part in (task["organ"], modality) if part)
    parts = (task["modality"], task["organ"], _words(finding or task["finding"]))
    return ", ".join(part for part in parts if part)


def augmentation_phrase(variant: int) -> str:
    """The phrase that is added to the prompt of a variant.

    Args:
        variant: number of the variant, from 0.

    Returns:
        Phrase number ``variant`` mod 50.

    Source: DiffBoost Sec. 3.4 (one phrase of 50 a variant); the wording is ours.
    """
    return PHRASES[variant % len(PHRASES)]
