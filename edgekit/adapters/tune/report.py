"""A benchmark of adapters as Markdown, as JSON, and as a picture."""

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgekit.adapters.tune.benchmark import BASE, Benchmark
from edgekit.figures import write_png
from edgekit.markdown import markdown_table
from edgekit.wilson import wilson

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["Row", "as_markdown", "draw_table", "rows_of"]

Record = Mapping[str, Any]
MEASURE = {"sentiment": "accuracy", "restore": "exact match"}
COLOURS = {"aflora": "#1f5fa8", "lora": "#c8601a", "vera": "#2f7d4f", BASE: "#6b6b6b"}


@dataclass(frozen=True, kw_only=True, slots=True)
class Row:
    """One method at one task, over its seeds.

    Attributes:
        method: or `base`.
        share: of the test examples that are right, mean over seeds.
        interval: Wilson's of that share for the number of test examples; seeds share these
            examples, so they do not make it narrower.
        shares: of each seed.
        character_error_rate: mean over seeds; None where nothing is written.
        lr: the rate that was found.
        trainable: start, end, mean, each a mean over seeds; None for the base.
        peak_bytes: of gradients, optimiser state and scores, the highest over seeds.
        seconds_per_step: median over seeds of the medians.
    """

    method: str
    share: float
    interval: tuple[float, float]
    shares: tuple[float, ...]
    samples: int
    character_error_rate: float | None
    lr: float | None = None
    trainable: dict[str, float] | None = None
    peak_bytes: int | None = None
    seconds_per_step: float | None = None


def rows_of(records: Sequence[Record]) -> list[Row]:
    """A row for each method, in the order of the records."""
    methods = dict.fromkeys(record["method"] for record in records)
    return [_row(method, [r for r in records if r["method"] == method]) for method in methods]


def as_markdown(
    benchmark: Benchmark, tasks: Mapping[str, Sequence[Record]], command: str, model: str
) -> str:
    """The whole report.

    Args:
        benchmark: what was compared.
        tasks: what `measure` returned.
        command: that made it.
        model: the name of what was tuned.
    """
    device = next((r["device"] for records in tasks.values() for r in records if "device" in r), "")
    lines = [
        f"# Adapters on {model}",
        "",
        f"{benchmark.steps} steps of {benchmark.batch} examples, {len(benchmark.seeds)} seeds; "
        f"{device}.",
        "",
    ]
    for task, records in tasks.items():
        rows = rows_of(records)
        lines += [f"## {task}", "", _table(task, rows), "", _rates(records), ""]
    lines += [
        "Intervals are Wilson's 95 % of the mean share for the number of test examples; seeds "
        "share the examples and do not narrow them. Rates were chosen by held-out loss on the "
        f"validation part, {benchmark.search_steps} steps each, with the first seed. Bytes are of "
        "gradients, optimiser state and the scores of freezing, at their peak.",
        "",
        f"Made by `{command}`.",
        "",
    ]
    return "\n".join(lines)


def draw_table(tasks: Mapping[str, Sequence[Record]], out: Path) -> None:
    """Write a PNG: share that is right against elements trained on average, a panel per task."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4.6 * max(len(tasks), 1), 3.6), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(1, len(tasks), squeeze=False)[0]
    for axes, (task, records) in zip(panels, tasks.items(), strict=True):
        _panel(axes, task, rows_of(records))
    write_png(figure, out)


def _row(method: str, records: Sequence[Record]) -> Row:
    samples = int(records[0]["samples"])
    shares = tuple(record["correct"] / record["samples"] for record in records)
    share = statistics.fmean(shares)
    errors = [record["character_error_rate"] for record in records]
    common: dict[str, Any] = {
        "method": method,
        "share": share,
        "interval": wilson(round(share * samples), samples),
        "shares": shares,
        "samples": samples,
        "character_error_rate": None if None in errors else statistics.fmean(errors),
    }
    if method == BASE:
        return Row(**common)
    return Row(
        **common,
        lr=records[0]["lr"],
        trainable={
            key: statistics.fmean(record["trainable"][key] for record in records)
            for key in ("start", "end", "mean")
        },
        peak_bytes=max(record["memory"]["peak"] for record in records),
        seconds_per_step=statistics.median(record["seconds_per_step"] for record in records),
    )


def _table(task: str, rows: Sequence[Row]) -> str:
    written = any(row.character_error_rate is not None for row in rows)
    headers = ["method", "rate", f"{MEASURE[task]} of {rows[0].samples}", "seeds"]
    headers += ["character errors"] if written else []
    headers += ["trained: mean", "start", "end", "peak bytes", "s/step"]
    return markdown_table([_cells(row, written) for row in rows], headers)


def _cells(row: Row, written: bool) -> list[str]:
    low, high = row.interval
    cells = [
        row.method,
        "-" if row.lr is None else f"{row.lr:g}",
        f"{row.share:.1%} ({low:.1%} to {high:.1%})",
        " ".join(f"{share:.1%}" for share in row.shares) if row.lr is not None else "-",
    ]
    if written:
        rate = row.character_error_rate
        cells.append("-" if rate is None else f"{rate:.1%}")
    if row.trainable is None:
        return [*cells, "0", "0", "0", "0", "-"]
    return [
        *cells,
        *(f"{row.trainable[key]:,.0f}" for key in ("mean", "start", "end")),
        f"{row.peak_bytes:,}",
        f"{row.seconds_per_step:.2f}",
    ]


def _rates(records: Sequence[Record]) -> str:
    """What the search found, a line per method."""
    lines = []
    for record in records:
        if record.get("search"):
            told = ", ".join(
                f"{trial['lr']:g}: "
                + (
                    "not finite"
                    if trial["held_out_loss"] is None
                    else f"{trial['held_out_loss']:.4f}"
                )
                for trial in record["search"]
            )
            lines.append(f"- {record['method']}: held-out loss by rate {told}")
    return "\n".join(lines)


def _panel(axes: "Axes", task: str, rows: Sequence[Row]) -> None:
    from matplotlib.ticker import EngFormatter, NullFormatter

    for row in rows:
        colour = COLOURS[row.method]
        low, high = row.interval
        if row.trainable is None:
            axes.axhline(row.share, color=colour, linewidth=1.0, linestyle="--")
            corner = (0.99, row.share)
            _name(axes, row.method, corner, ("axes fraction", "data"), colour, ha="right")
            continue
        x, spread = row.trainable["mean"], [[row.share - low], [high - row.share]]
        axes.errorbar(x, row.share, yerr=spread, fmt="o", color=colour, capsize=3)
        axes.scatter([x] * len(row.shares), row.shares, s=9, color=colour, alpha=0.5)
        _name(axes, row.method, (x, high), ("data", "data"), colour, ha="center")
    axes.set_xscale("log")
    axes.margins(x=0.25, y=0.12)
    axes.set_title(f"{task}: {MEASURE[task]}", loc="left", fontsize=10)
    axes.set_xlabel("elements trained, mean over steps")
    axes.xaxis.set_major_formatter(EngFormatter(sep=" "))
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
    axes.spines[["top", "right"]].set_visible(False)


def _name(
    axes: "Axes",
    name: str,
    at: tuple[float, float],
    where: tuple[str, str],
    colour: str,
    *,
    ha: str,
) -> None:
    """Write a method's name above a point: a legend would hide some of them."""
    axes.annotate(name, at, (0, 4), where, "offset points", ha=ha, fontsize=8, color=colour)
