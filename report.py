"""Pictures of a run. Reads what a run folder's metrics say and knows nothing of the loop."""

import os

import matplotlib

matplotlib.use("Agg")  # files, never a window
from matplotlib import pyplot  # noqa: E402

from tasks import TASK_TYPES  # noqa: E402


def draw_curves(metrics, path):
    """curves.png: six panels over steps, held-out accuracy with a band of one standard error."""
    def series(key):
        points = [(m["step"], m[key]) for m in metrics if m.get(key) is not None]
        return [step for step, _ in points], [value for _, value in points]

    panels = (
        ("held-out accuracy (greedy)", {type: f"heldout/{type}" for type in (*TASK_TYPES, "mean")}),
        ("solver accuracy in training", {type: f"solve/{type}/accuracy" for type in TASK_TYPES}),
        ("learnable share of proposals", {type: f"propose/{type}/learnable" for type in TASK_TYPES}),
        ("solver response length (tokens)", {type: f"response_tokens/solve/{type}" for type in TASK_TYPES}),
        ("new programs and structure", {"unique programs": "diversity/unique_ast",
                                        "edit distance": "diversity/edit_distance", "trivial": "diversity/trivial"}),
        ("entropy (nats a token)", {"entropy": "entropy"}))
    figure, axes = pyplot.subplots(2, 3, figsize=(13, 7), layout="constrained")
    for axis, (title, curves) in zip(axes.flat, panels):
        for label, key in curves.items():
            steps, values = series(key)
            line, = axis.plot(steps, values, label=label, marker="o" if key.startswith("heldout") else None,
                              markersize=3, color="black" if label == "mean" else None)
            if key.startswith("heldout"):
                _, errors = series(key.replace("heldout", "heldout_stderr"))
                axis.fill_between(steps, [v - e for v, e in zip(values, errors)],
                                  [v + e for v, e in zip(values, errors)], color=line.get_color(), alpha=0.15)
        axis.set_title(title)
        axis.set_xlabel("step")
        axis.set_ylim(bottom=0)
        axis.grid(alpha=0.3)
        axis.legend(fontsize=8)
    fresh = path.with_suffix(".new.png")
    figure.savefig(fresh, dpi=110)
    pyplot.close(figure)
    os.replace(fresh, path)
