"""How what one call gives under both packages compares."""

import json

import numpy as np

RELATIVE = 1e-5
"""Norm of the difference of an array, by the norm of the reference's."""
DENOISERS = ("FlaxUNet2DConditionModel", "FlaxControlNetModel")
OF_DENOISERS = 5e-4
"""For UNet and ControlNet beside 0.39 as it is, whose attention has the tanh form of the GELU, and another epsilon."""
OF_PICTURES = 2 / 255
SAME = "same"


def bound(name, side):
    """Name of the measure, and its bound, for a call."""
    cls, method = name.split(":")[0].split(".")
    if cls.endswith("Pipeline") and method == "__call__":
        return "most", OF_PICTURES
    return "norm", OF_DENOISERS if cls in DENOISERS and side == "reference" and method == "__call__" else RELATIVE


def distance(ours, theirs, measure):
    """Relative distance by norms, or the greatest difference; infinite where one alone is not finite."""
    if ours.dtype.kind not in "fc":
        return 0.0 if np.array_equal(ours, theirs) else np.inf
    if not np.array_equal(np.isfinite(ours), np.isfinite(theirs)):
        return np.inf
    finite = np.isfinite(theirs)
    ours, theirs = ours[finite].astype(np.float64), theirs[finite].astype(np.float64)
    if not ours.size:
        return 0.0
    if measure == "most":
        return float(np.abs(ours - theirs).max())
    norm = float(np.linalg.norm(theirs))
    return float(np.linalg.norm(ours - theirs)) / norm if norm else float(np.linalg.norm(ours))


def compare(name, given, side):
    """Outcome of a call, in words, and the greatest distance of its arrays."""
    ours, theirs = given["ours"]["texts"][name], given[side]["texts"][name]
    if "raises" in theirs and "raises" in ours:
        kinds = json.loads(ours["raises"])
        return (SAME if "UserError" in kinds else f"ours raises {kinds[0]}, no UserError"), 0.0
    for one, who in ((theirs, "0.39"), (ours, "ours")):
        if "raises" in one:
            return f"{who} raises {json.loads(one['raises'])[0]}", 0.0
    if ours.keys() != theirs.keys():
        return "other leaves", 0.0
    if different := [path for path in ours if ours[path] != theirs[path]]:
        arrays = all(f"{name}|{path}" in given["ours"] for path in different)
        shapes = any(ours[path].partition("[")[2] != theirs[path].partition("[")[2] for path in different)
        return ("another shape" if shapes else "another dtype") if arrays else "other values", 0.0
    measure, limit = bound(name, side)
    keys = [f"{name}|{path}" for path in ours if f"{name}|{path}" in given["ours"]]
    pairs = [(given["ours"][key], given[side][key]) for key in keys]
    if "gradients" in name:  # some are zero but for rounding
        pairs = [tuple(np.concatenate([one.ravel() for one in part]) for part in zip(*pairs, strict=True))]
    worst = max([0.0, *(distance(*pair, measure) for pair in pairs)])
    return (SAME if worst <= limit else "other numbers"), worst


def explain(name, given, side):
    """What differs, for whoever reads a failure."""
    ours, theirs = given["ours"]["texts"][name], given[side]["texts"][name]
    if "raises" in ours or "raises" in theirs:
        return f"ours {ours.get('message', 'returns')!r}, 0.39 {theirs.get('message', 'returns')!r}"
    lines = [f"{path}: {ours.get(path)} | {theirs.get(path)}" for path in sorted({*ours, *theirs})]
    return "; ".join(line for line in lines if line.split(": ", 1)[1].split(" | ")[0] != line.rsplit(" | ", 1)[1])[:600]
