"""Body sections for CT and MR: each function paints a region with a finding on a canvas."""

import numpy as np

from diffboost.data.anatomy import Canvas


def spot(canvas: Canvas, cover: np.ndarray) -> tuple:
    """A random point (x, y) well inside a cover, as (x, y); the image center if it is empty."""
    rows = np.flatnonzero(cover.ravel() > 0.9)
    if not len(rows):
        return 0.0, 0.0
    at = canvas.rng.choice(rows)
    return float(canvas.grid.x.flat[at]), float(canvas.grid.y.flat[at])


def _spine(canvas: Canvas, y: float) -> None:
    """Vertebra with canal and transverse processes at (0, y)."""
    near = canvas.near
    for side in (-1, 1):
        canvas.blob("bone", (side * 0.13, y + 0.16), (0.12, 0.035), side * 0.5, 0.1)
    bone = canvas.blob("bone", (0, y), (near(0.15, 0.02), near(0.12, 0.02)), 0, 0.05)
    canvas.blob("marrow", (0, y), (0.125, 0.095), 0, 0.06, inside=bone)
    canvas.blob("csf", (0, y + 0.15), (0.06, 0.05), 0, 0.05)


def _trunk(canvas: Canvas) -> tuple:
    """Skin, fat, muscle and bowel of the belly; returns the covers of all and of the inside."""
    near, blob = canvas.near, canvas.blob
    canvas.fill("air")
    skin = blob("skin", (0, 0), (0.92, 0.72), 0, 0.03)
    wall = near(0.1, 0.06)
    blob("fat", (0, 0), (0.9, 0.7), 0, 0.03, inside=skin)
    muscle = blob("muscle", (0, 0), (0.9 - wall, 0.7 - wall), 0, 0.03)
    inner = blob("fat", (0, 0), (0.83 - wall, 0.62 - wall), 0, 0.03, inside=muscle)
    canvas.add("bowel", canvas.clumps((0.06, 0.06), near(0.25, 0.15)), inner)
    for _ in range(canvas.rng.integers(2, 6)):
        at, size = (near(0.05, 0.4), near(-0.1, 0.3)), near(0.11, 0.05)
        loop = blob("bowel", at, (size, size * 0.8), near(0, 1.5), 0.15, drift=0.3, inside=inner)
        if canvas.rng.random() < 0.4:
            blob("gas", at, (size * 0.5, size * 0.3), 0, 0.2, drift=0.1, inside=loop)
    return skin, inner


def abdomen(canvas: Canvas, finding: str) -> None:
    """Axial upper abdomen: liver, spleen, stomach, kidneys, bowel, vessels, spine."""
    near, blob = canvas.near, canvas.blob
    skin, inner = _trunk(canvas)
    _spine(canvas, near(0.33, 0.04))
    for side in (-1, 1):
        blob("muscle", (side * 0.24, 0.4), (0.1, 0.09), 0, 0.1, inside=skin)
        at, lie = (side * near(0.4, 0.06), near(0.25, 0.08)), side * near(0.5, 0.4)
        span = (near(-0.35, 0.2), near(0.7, 0.15))
        kidney = blob("kidney", at, (near(0.14, 0.03), near(0.18, 0.03)), lie, 0.08, 0, span, 0.1)
        blob("medulla", at, (0.1, 0.13), lie, 0.2, inside=kidney)
        blob("sinus", (at[0] - side * 0.06, at[1]), (0.06, 0.05), 0, 0.2, inside=kidney)
    liver = blob(
        "liver",
        (-0.38, -0.08),
        (near(0.38, 0.06), near(0.4, 0.06)),
        near(0.2, 0.3),
        0.12,
        0,
        (0.25, 1.1),
        0.2,
        inside=inner,
    )
    canvas.add("vessel", canvas.clumps((0.035, 0.06), 0.06), liver)
    at = (near(0.3, 0.1), near(-0.25, 0.1))
    wall = blob(
        "muscle",
        at,
        (near(0.24, 0.07), near(0.17, 0.05)),
        near(0, 0.6),
        0.15,
        0.2,
        (0.2, near(0.9, 0.1)),
        0.3,
        inside=inner,
    )
    blob("stomach", at, (0.2, 0.13), near(0, 0.6), 0.2, 0.2, inside=wall)
    blob("pancreas", (near(0.1, 0.1), near(0.02, 0.06)), (0.26, 0.06), near(-0.3, 0.3), 0.2, 0.5)
    at, size = (near(0.53, 0.06), near(0.02, 0.08)), np.array([near(0.22, 0.04), near(0.32, 0.05)])
    lie, bend, span = near(-0.3, 0.3), near(0.15, 0.2), (near(0, 0.1), near(0.78, 0.08))
    spleen = blob("spleen", at, size, lie, 0.1, bend, span, 0.08, None, inner, near(0.07, 0.03))
    blob("vessel", (near(0.06, 0.04), 0.17), (0.055, 0.055), 0, 0.03)
    blob("vessel", (near(-0.12, 0.04), 0.16), (0.07, 0.05), 0, 0.08)
    if finding != "normal":
        host = liver if canvas.rng.random() < 0.65 else spleen
        canvas.finding(finding, spot(canvas, host), near(0.13, 0.07), host)


def chest(canvas: Canvas, finding: str) -> None:
    """Axial chest: lungs with vessels, heart, great vessels, ribs, spine."""
    near, blob, rng = canvas.near, canvas.blob, canvas.rng
    canvas.fill("air")
    skin = blob("skin", (0, 0), (0.92, 0.66), 0, 0.03)
    blob("fat", (0, 0), (0.9, 0.64), 0, 0.03, inside=skin)
    blob("muscle", (0, 0), (near(0.82, 0.03), near(0.57, 0.03)), 0, 0.04)
    for angle in np.arange(0, 2 * np.pi, 0.5) + rng.uniform(0, 0.5):
        at = (0.75 * np.cos(angle), 0.5 * np.sin(angle))
        blob("bone", at, (0.08, 0.03), angle + 1.6, 0.1)
    blob("fat", (0, 0), (0.3, 0.45), 0, 0.1)
    lungs = []
    for side in (-1, 1):
        at, size = (side * near(0.4, 0.03), near(0, 0.05)), (near(0.27, 0.04), near(0.42, 0.05))
        lungs.append(blob("lung", at, size, near(0, 0.15), 0.08))
        canvas.add("vessel", canvas.clumps((0.02, 0.02), near(0.08, 0.05), 1), lungs[-1])
    heart = blob(
        "muscle", (near(0.12, 0.06), near(-0.12, 0.08)), (near(0.3, 0.06), near(0.24, 0.05)), 0.5
    )
    blob("vessel", (near(0.15, 0.05), -0.12), (0.16, 0.12), 0.5, 0.15, inside=heart)
    blob("vessel", (near(0.1, 0.04), 0.2), (0.08, 0.08), 0, 0.04)
    _spine(canvas, near(0.36, 0.03))
    lung = lungs[rng.integers(2)]
    if finding == "effusion":
        canvas.add("fluid", canvas.below(near(0.15, 0.12), 0.05), lung)
    elif finding != "normal":
        size = near(0.1, 0.05) if finding == "nodule" else near(0.2, 0.08)
        canvas.finding(finding, spot(canvas, lung), size, lung)


def brain(canvas: Canvas, finding: str) -> None:
    """Axial brain: skull, folded cortex, white matter, ventricles, deep nuclei."""
    near, blob = canvas.near, canvas.blob
    canvas.fill("air")
    size = near(0.72, 0.05), near(0.86, 0.05)
    head = blob("skin", (0, 0), size, 0, 0.03)
    blob("fat", (0, 0), (size[0] - 0.02, size[1] - 0.02), 0, 0.03, inside=head)
    skull = blob("bone", (0, 0), (size[0] - 0.06, size[1] - 0.06), 0, 0.02)
    blob("csf", (0, 0), (size[0] - 0.13, size[1] - 0.13), 0, 0.02, inside=skull)
    cortex = blob("gray", (0, 0), (size[0] - 0.16, size[1] - 0.16), 0, 0.03)
    folds = canvas.clumps((0.05, 0.05), near(0.55, 0.1), 0.4)
    rim = blob(None, (0, 0), (size[0] - 0.38, size[1] - 0.38), 0, 0.08, soft=0.1)
    white = canvas.add(
        "white", np.maximum(folds, rim), blob(None, (0, 0), (size[0] - 0.2, size[1] - 0.2))
    )
    canvas.add("csf", canvas.clumps((0.03, 0.03), near(0.12, 0.08), 0.4), cortex * (1 - rim))
    canvas.add(
        "csf", np.exp(-((canvas.grid.x / 0.018) ** 2)) * (np.abs(canvas.grid.y) > 0.3), cortex
    )
    wide = near(0.08, 0.05)
    for side in (-1, 1):
        blob("gray", (side * 0.2, near(0.05, 0.04)), (0.1, 0.15), side * 0.3, 0.12, inside=cortex)
        blob("csf", (side * 0.1, near(-0.12, 0.05)), (wide, 0.2), -side * 0.4, 0.12, side * 0.3)
        blob("csf", (side * 0.14, near(0.28, 0.05)), (wide, 0.15), side * 0.5, 0.12)
    for _ in range(canvas.rng.integers(3, 8) if finding == "lesion" else finding != "normal"):
        size = near(0.07, 0.04) if finding == "lesion" else near(0.17, 0.08)
        canvas.finding(finding, spot(canvas, white), size, cortex)


def hippocampus(canvas: Canvas, finding: str) -> None:
    """Enlarged medial temporal lobe: a bent gray structure beside white matter and a CSF horn."""
    near, blob, rng = canvas.near, canvas.blob, canvas.rng
    canvas.fill("white")
    bands = canvas.clumps((near(0.22, 0.08), near(0.22, 0.08)), near(0.4, 0.12), near(0.25, 0.15))
    canvas.add("gray", bands)
    canvas.add("csf", np.clip((bands - near(0.85, 0.1)) * 12, 0, 1), canvas.clumps((0.2, 0.2), 0.5))
    if rng.random() < 0.6:
        canvas.add("csf", canvas.below(near(0.65, 0.2), 0.1), canvas.clumps((0.2, 0.2), 0.6))
    if rng.random() < 0.6:
        blob("white", (near(0, 0.5), near(0.8, 0.2)), (near(0.4, 0.15), near(0.4, 0.1)), 0, 0.12)
    angle, bend = rng.uniform(0, 2 * np.pi), rng.uniform(-0.9, 0.9)
    at, shrink = (near(0, 0.25), near(0, 0.25)), 0.65 if finding == "atrophy" else 1.0
    size = np.array([near(0.45, 0.15), near(0.2, 0.06)])
    blob("white", at, size + (0.16, near(0.13, 0.06)), angle, 0.1, bend)
    normal = np.array([-np.sin(angle), np.cos(angle)])
    blob("csf", at + normal * size[1] * 0.7, size * (0.8, near(0.6, 0.3)), angle, 0.15, bend)
    body = blob("gray", at, size * shrink, angle, 0.12, bend, soft=near(0.06, 0.03))
    blob(
        "white",
        at + normal * 0.05,
        (size[0] * 0.6, 0.025),
        angle,
        0.1,
        bend,
        soft=0.05,
        inside=body,
    )
    for _ in range(rng.integers(0, 4)):
        blob("vessel", rng.uniform(-0.9, 0.9, 2), rng.uniform(0.02, 0.07, 2))
    if finding == "sclerosis":
        blob("edema", at, size * 0.8, angle, 0.15, bend, inside=body)
    elif finding == "cyst":
        canvas.finding("cyst", spot(canvas, body), near(0.11, 0.04), None)


def knee(canvas: Canvas, finding: str) -> None:
    """Sagittal knee: femur, tibia, patella, cartilage, menisci, muscle, fat."""
    near, blob, rng = canvas.near, canvas.blob, canvas.rng
    canvas.fill("air")
    leg = canvas.add("skin", (np.abs(canvas.grid.x) < near(0.8, 0.1)).astype(np.float32))
    canvas.add("fat", leg * (np.abs(canvas.grid.x) < 0.75))
    canvas.add("muscle", canvas.clumps((0.4, 0.12), near(0.45, 0.15), 0.3), leg)
    gap = near(0.1, 0.05)
    joint = blob(
        "fluid" if finding == "effusion" else "fat", (-0.05, gap), (0.6, near(0.25, 0.05)), 0, 0.2
    )
    for y, side in ((-0.3, -1), (0.52, 1)):
        head = (near(0.42, 0.05), near(0.33, 0.03))
        shaft = (np.abs(canvas.grid.x - 0.05) < 0.27) * (side * (canvas.grid.y - y) > 0)
        rim = blob(None, (0, y), head, 0, 0.06)
        blob("cartilage", (0, y - side * 0.06), (head[0], head[1]), 0, 0.04)
        canvas.add("bone", np.maximum(rim, shaft))
        thin = (np.abs(canvas.grid.x - 0.05) < 0.23) * (side * (canvas.grid.y - y) > 0)
        marrow = np.maximum(blob(None, (0, y), (head[0] - 0.04, head[1] - 0.04), 0, 0.06), thin)
        canvas.add("marrow", marrow)
    for x in (-0.28, 0.3):
        wedge = blob("meniscus", (x, gap), (0.15, 0.06), 0, 0.1)
        if finding == "tear":
            blob("fluid", (x, gap), (0.12, 0.02), near(0, 0.8), 0.1, inside=wedge)
    blob("bone", (-0.58, -0.35), (0.13, 0.22), 0.1, 0.06)
    blob("marrow", (-0.58, -0.35), (0.1, 0.19), 0.1, 0.06)
    blob("meniscus", (-0.6, 0.15), (0.035, 0.35), 0.1, 0.1)
    blob("vessel", (0.6, 0), (0.05, 0.9), near(0, 0.1), 0.05)
    if finding in ("lesion", "cyst"):
        host = marrow if finding == "lesion" else joint
        canvas.finding(finding, spot(canvas, host), near(0.14, 0.05) + 0.03 * rng.random(), None)


def pelvis(canvas: Canvas, finding: str) -> None:
    """Axial pelvis: prostate with zones, bladder, rectum, muscles, femoral heads."""
    near, blob = canvas.near, canvas.blob
    canvas.fill("air")
    skin = blob("skin", (0, 0), (0.98, 0.75), 0, 0.03)
    blob("fat", (0, 0), (0.95, 0.72), 0, 0.03, inside=skin)
    for side in (-1, 1):
        blob("muscle", (side * 0.6, 0.35), (0.3, 0.2), side * 0.5, 0.12, inside=skin)
        blob("muscle", (side * 0.4, near(0, 0.05)), (0.1, 0.3), -side * 0.2, 0.12)
        blob("bone", (side * 0.7, -0.1), (0.19, 0.2), 0, 0.08)
        blob("marrow", (side * 0.7, -0.1), (0.16, 0.17), 0, 0.08)
        blob("vessel", (side * 0.45, -0.4), (0.06, 0.06), 0, 0.05)
    blob("muscle", (0, near(-0.32, 0.04)), (near(0.3, 0.06), near(0.22, 0.06)), 0, 0.1)
    blob("fluid", (0, -0.32), (near(0.25, 0.05), near(0.17, 0.05)), 0, 0.1)
    size = np.array([near(0.27, 0.06), near(0.2, 0.05)])
    gland = blob("prostate", (near(0, 0.03), near(0.05, 0.05)), size, 0, 0.08)
    inner = blob("gland", (0, 0), size * (0.65, near(0.6, 0.15)), 0, 0.12, inside=gland)
    canvas.add("lesion", canvas.clumps((0.05, 0.05), 0.3), inner)
    wall = blob(
        "muscle", (near(0, 0.05), near(0.42, 0.04)), (near(0.17, 0.04), near(0.14, 0.04)), 0, 0.15
    )
    inside = canvas.rng.choice(["gas", "bowel", "fat"])
    blob(inside, (0, 0.42), (0.11, 0.09), 0, 0.2, inside=wall)
    if finding != "normal":
        canvas.finding(finding, spot(canvas, gland), near(0.1, 0.04), gland)
