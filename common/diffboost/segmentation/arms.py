"""The arms: ways to train the segmenter, by name. Studies read them before anything is imported."""

from diffboost.knobs import nearest

CLASSICAL_ARMS = (
    "baseline",
    "contrast",
    "gamma",
    "brightness",
    "noise",
    "resolution",
    "mirror",
    "rotate",
    "scale",
    "deepstack",
    "nnunet",
)
SYNTHETIC_ARM = "synthetic"  # variants alone
ARMS = (
    *CLASSICAL_ARMS,
    SYNTHETIC_ARM,
    "diffboost",
    *(f"diffboost+{name}" for name in CLASSICAL_ARMS if name != "baseline"),
)


def split_arm(arm: str) -> tuple[bool, str]:
    """Whether the arm needs variants, and its classical part.

    Args:
        arm: one of ARMS.

    Raises:
        ValueError: unknown arm; says which is nearest.

    Source: engineering choice
    """
    if arm not in ARMS:
        raise ValueError(f"arm: {arm!r} is unknown; {nearest(arm, ARMS)}")
    if arm in CLASSICAL_ARMS:
        return False, arm
    return True, arm.partition("+")[2] or "baseline"
