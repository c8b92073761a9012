"""Plots of how much attention kept sets cover. `covered` maps each source to an array [L, M, C + 1] of L layers, M
steps and the C + 1 sets in `names`, the last of which is the best set."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from recyc_jax.commands.plotting import plot

IDEAL = "best set of the step"


@plot
def plot_covered(path: Path, covered: dict[str, Any], names: list[str]) -> None:
    """Plot the mean over layers against steps, one panel per source."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(3.4 * len(covered), 3.6), layout="constrained")
    panels = figure.subplots(1, len(covered), squeeze=False, sharey=True)[0]
    for axes, (source, values) in zip(panels, covered.items(), strict=True):
        steps = range(1, values.shape[1] + 1)
        for place, name in enumerate(names):
            axes.plot(steps, 100 * values[..., place].mean(axis=0), label=name, ls="--" if name == IDEAL else "-")
        axes.set_title(source)
        axes.set_xlabel("steps since the set was chosen")
    panels[0].set_ylabel("attention on the set, percent")
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=2, fontsize=8)
    figure.savefig(path, dpi=150)


@plot
def plot_layers(path: Path, covered: dict[str, Any], names: list[str]) -> None:
    """Plot how much less each set covers than the best set, by layer and step."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(3.2 * (len(names) - 1), 3 * len(covered)), layout="constrained")
    grid = figure.subplots(len(covered), len(names) - 1, squeeze=False)
    image = None
    for line, (source, values) in zip(grid, covered.items(), strict=True):
        for place, axes in enumerate(line):
            missed = 100 * (values[..., -1] - values[..., place])
            image = axes.imshow(
                missed, aspect="auto", vmin=0, vmax=50, cmap="magma", extent=(1, values.shape[1], len(values), 0)
            )
            axes.set_title(f"{source}\n{names[place]}", fontsize=7)
            axes.set_xlabel("steps", fontsize=7)
            axes.set_ylabel("layer", fontsize=7)
    figure.colorbar(image, ax=grid.ravel().tolist(), label="attention missed, percent")
    figure.savefig(path, dpi=80)


@plot
def plot_strides(path: Path, strides: dict[str, dict[str, list[float | None]]]) -> None:
    """Plot the effective stride by layer, one panel per policy."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 1 + 2.4 * len(strides)), layout="constrained")
    panels = figure.subplots(len(strides), 1, squeeze=False, sharex=True, sharey=True)[:, 0]
    for axes, (name, by_source) in zip(panels, strides.items(), strict=True):
        for source, layers in by_source.items():
            known = [(layer, stride) for layer, stride in enumerate(layers) if stride is not None]
            if known:
                axes.plot(*zip(*known, strict=True), marker="o", ms=3, label=source)
        axes.set_title(name, fontsize=8)
        axes.set_yscale("log")
        axes.set_ylabel("steps per full step")
    panels[-1].set_xlabel("layer")
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=4, fontsize=8)
    figure.savefig(path, dpi=150)
