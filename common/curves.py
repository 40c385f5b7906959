"""A run's metrics, read back, and the picture of six of them."""

import json
from pathlib import Path

CURVES = {  # of the page of rollouts; the first six are in curves.png, too
    "reward/mean": "reward",
    "kl/ref_k2": "KL to the initial policy",
    "entropy": "entropy (nats)",
    "response_length/mean": "response length (tokens)",
    "grad_norm": "gradient norm",
    "eval/reward": "held-out reward (greedy)",
    "ratio/clip_fraction": "clipped tokens (share)",
    "reward/zero_std_groups": "groups of equal rewards (share)",
}
PANELS = dict(list(CURVES.items())[:6])
LABELS = {**CURVES, "eval/accuracy": "held-out accuracy (greedy)"}


def read_metrics(run_dir):
    """The records of `metrics.jsonl`, one dict per step."""
    return read_lines(Path(run_dir) / "metrics.jsonl")


def read_lines(path):
    """The records of a JSONL file; a last line that the run is still writing is left out."""
    complete, _, _ = path.read_text().rpartition("\n")
    return [json.loads(line) for line in complete.splitlines()]


def plot_curves(records, title, path):
    """Plot the metrics of `PANELS` over steps into `path`."""
    import matplotlib

    matplotlib.use("Agg")  # to a file, also where there is no screen
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(2, 3, figsize=(13, 6.5), layout="constrained")
    for axis, (key, label) in zip(axes.flat, PANELS.items(), strict=True):
        points = [(r["step"], r[key]) for r in records if r.get(key) is not None]
        marker = "o" if len(points) < 30 else None
        axis.plot(*zip(*points, strict=True), marker=marker, markersize=3)
        axis.set(title=label if points else f"{label}: not logged", xlabel="step")
        axis.grid(alpha=0.3)
    figure.suptitle(title)
    figure.savefig(path, dpi=120)
    plt.close(figure)
