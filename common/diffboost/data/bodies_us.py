"""Body regions under an ultrasound probe: each function paints one with a finding on a canvas."""

import numpy as np

from diffboost.data.anatomy import Canvas
from diffboost.data.bodies import spot


def breast(canvas: Canvas, finding: str) -> None:
    """Breast under the probe: skin, fat with strands, gland, muscle, ribs, a mass or a cyst."""
    near, rng = canvas.near, canvas.rng
    canvas.fill("skin")
    skin = near(-0.87, 0.06)
    canvas.add("fat", canvas.below(skin, 0.015))
    top = near(-0.4, 0.3)
    canvas.add("gland", canvas.below(top, 0.1, 0.08))
    lobules = canvas.clumps((near(0.07, 0.03), near(0.2, 0.1)), near(0.35, 0.25), near(0.5, 0.3))
    canvas.add("fat", lobules, canvas.below(top, 0.05))
    floor = near(0.55, 0.3)
    muscle = canvas.add("muscle", canvas.below(floor, 0.05))
    if rng.random() < 0.2:
        canvas.blob(
            "bone", (near(0, 0.8), floor + near(0.25, 0.08)), (near(0.3, 0.1), 0.07), inside=muscle
        )
    at, size = np.array([near(0, 0.5), near(-0.05, 0.35)]), near(0.32, 0.17)
    kind = rng.choice(["mass", "oval", "cyst"]) if finding == "lesion" else finding
    if kind == "mass":  # irregular, spiculated, shadowing, with a bright halo
        canvas.blob("gland", at, (size * 1.25, size * 1.15), 0, 0.2, soft=0.2)
        radii = size * np.exp(rng.normal(0, 0.2, 2))
        canvas.blob("tumor", at, radii, near(0, 0.5), near(0.22, 0.1), soft=near(0.07, 0.05))
        canvas.add(
            "tumor", canvas.clumps((0.05, 0.05), 0.4), canvas.blob(None, at, radii * 1.25, 0, 0.3)
        )
    elif kind in ("oval", "cyst"):  # wider than tall, sharp; a cyst enhances what lies behind
        radii = (size, size * near(0.6, 0.2))
        body = canvas.blob("lesion" if kind == "oval" else "fluid", at, radii, near(0, 0.3), 0.08)
        if kind == "oval" and rng.random() < 0.4:
            canvas.add("gland", canvas.clumps((0.05, 0.08), 0.25), body)
    elif kind == "calcification":
        canvas.blob("lesion", at, (size, size * 0.8), 0, 0.15, soft=0.1)
        canvas.finding("calcification", at, size * 0.45, None)


def thyroid(canvas: Canvas, finding: str) -> None:
    """Neck under the probe: skin, strap muscles, thyroid lobes, trachea, carotid."""
    near, blob = canvas.near, canvas.blob
    canvas.fill("skin")
    canvas.add("fat", canvas.below(near(-0.85, 0.05), 0.02))
    canvas.add("muscle", canvas.below(near(-0.65, 0.08), 0.05))
    canvas.add("fat", canvas.below(near(0.55, 0.15), 0.1, 0.1))
    canvas.add("muscle", canvas.below(near(0.7, 0.15), 0.08))
    side = canvas.rng.choice([-1, 1])
    at = (side * near(0.1, 0.2), near(-0.05, 0.12))
    lobe = blob("thyroid", at, (near(0.5, 0.12), near(0.36, 0.08)), side * near(0.2, 0.2), 0.1)
    blob("cartilage", (-side * near(0.75, 0.1), near(0.1, 0.1)), (0.32, 0.32), 0, 0.04)
    blob("gas", (-side * 0.75, near(0.1, 0.1)), (0.26, 0.26), 0, 0.04)
    wall = blob("skin", (side * near(0.75, 0.08), near(0.1, 0.15)), (0.2, 0.18), 0, 0.05)
    blob("vessel", (side * 0.75, 0.1), (0.17, 0.15), 0, 0.05, inside=wall)
    if finding != "normal":
        center, size = spot(canvas, lobe), near(0.2, 0.1)
        if finding == "calcification":
            canvas.finding("nodule", center, size, None)
        canvas.finding(finding, center, size, None)


def flank(canvas: Canvas, finding: str) -> None:
    """Right flank under a convex probe: liver with vessels, kidney, gallbladder, diaphragm."""
    near, blob = canvas.near, canvas.blob
    canvas.fill("muscle")
    canvas.add("fat", canvas.below(near(-0.93, 0.03), 0.02))
    liver = canvas.add("liver", canvas.below(near(-0.7, 0.1), 0.05))
    for _ in range(canvas.rng.integers(2, 6)):
        at = (near(0, 0.7), near(0, 0.5))
        wall = blob("sinus", at, (near(0.2, 0.1), near(0.05, 0.02)), near(0, 1.5), 0.1)
        blob("vessel", at, (0.2, 0.04), near(0, 1.5), 0.1, inside=wall)
    if canvas.rng.random() < 0.75:
        at, lie = (near(0.35, 0.2), near(0.35, 0.15)), near(0.3, 0.4)
        blob("fat", at, (0.5, 0.28), lie, 0.06)
        kidney = blob("kidney", at, (near(0.44, 0.05), near(0.23, 0.04)), lie, 0.06)
        canvas.add("medulla", canvas.clumps((0.06, 0.06), 0.3), kidney)
        blob("sinus", at, (0.25, 0.09), lie, 0.2)
    if canvas.rng.random() < 0.5 or finding == "stone":
        at = (near(-0.35, 0.2), near(0.05, 0.2))
        wall = blob("sinus", at, (near(0.27, 0.06), near(0.16, 0.04)), near(0.5, 0.6), 0.06)
        bladder = blob("fluid", at, (0.24, 0.13), 0.4, 0.08, inside=wall)
        if finding == "stone":
            canvas.finding("stone", (at[0], at[1] + 0.05), 0.2, bladder)
    dome = canvas.below(near(0.85, 0.1), 0.2)
    canvas.add("bone", dome * (1 - dome) * 3)
    canvas.add("lung", np.clip(dome * 2 - 1, 0, 1))
    if finding in ("cyst", "mass", "lesion"):
        canvas.finding(finding, spot(canvas, liver), near(0.2, 0.1), liver)
