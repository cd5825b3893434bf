"""A drift report as a page to look at: one file, without scripts, fonts or anything else from elsewhere.

Names are a stranger's, and so are escaped. Values are in tables too, and are told where a picture is hovered over.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import replace

from featcal_fast.reporting.charts import COLOURS, Panel
from featcal_fast.reporting.drift_charts import Charts, charts
from featcal_fast.reporting.drift_report import DriftReport
from featcal_fast.reporting.outcome import COLUMNS, outcome_pair
from featcal_fast.reporting.report import drift_text
from featcal_fast.reporting.splits import LayerSplit, Split
from featcal_fast.reporting.svg import HOVERS, heat_svg, panel_svg, safe

STYLE = """
:root { color-scheme: light dark; --ink: #24292f; --paper: #fff; --line: #d8dee4; --soft: #57606a; }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 1120px; padding: 24px 16px 64px; background: var(--paper); color: var(--ink);
  font: 15px/1.5 system-ui, sans-serif; overflow-wrap: anywhere; }
h1 { font-size: 24px; margin: 0 0 4px; } h2 { font-size: 18px; margin: 40px 0 4px; } h3 { font-size: 14px; margin: 0; }
p { margin: 4px 0 12px; max-width: 76ch; } .soft, figcaption { color: var(--soft); }
.lead { font-size: 18px; } .warning { border-left: 4px solid #b0413e; padding-left: 12px; }
figure { margin: 0; min-width: 0; } svg { display: block; }
.grid { display: grid; gap: 20px; grid-template-columns: repeat(auto-fit, minmax(min(100%, 420px), 1fr)); }
.small { grid-template-columns: repeat(auto-fill, minmax(min(46%, 230px), 1fr)); gap: 12px; }
.grid svg { width: 100%; height: auto; max-width: 640px; }
.small svg { max-width: 300px; } .scroll { overflow-x: auto; padding-bottom: 8px; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: 13px; }
th, td { padding: 3px 10px; text-align: right; border-bottom: 1px solid var(--line); overflow-wrap: normal; }
th:first-child, td:first-child { text-align: left; min-width: 110px; max-width: 280px;
  overflow-wrap: anywhere; }
thead th { border-bottom-color: currentColor; } summary { cursor: pointer; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: 2px 16px; margin: 0; } dd { margin: 0; }
.key { display: inline-block; width: 22px; height: 4px; margin: 0 6px 3px 14px; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e6e8eb; --paper: #16191d; --line: #3a4048; --soft: #a2abb5; }
  polyline.merged, path.merged { stroke: #ef7d74; } circle.merged { fill: #ef7d74; }
  polyline.calibrated, path.calibrated { stroke: #6cb4e4; } circle.calibrated { fill: #6cb4e4; }
}
"""
POLICY = "default-src 'none'; style-src 'unsafe-inline'"  # nothing is loaded, nothing is run
PARTS = (
    "Drift splits exactly in two. Local mismatch is what a layer's own weights do: the model's layer against the "
    "expert's, both given what enters the model's. Upstream propagation is what came from the layers before: the "
    "expert's layer, given what enters the model's, against what enters its own. Bars are signed shares, which add up "
    "to the drift; below zero, a part takes some of it back."
)
GAIN = (
    "Each linear module is given what the calibrated model gives it; its output is compared with what the expert's "
    "makes of its own input. A cell says by how many per cent calibration made the squared error smaller (blue) or "
    "larger (red), mean over tasks."
)


def page(report: DriftReport) -> str:
    """The page.

    Args:
        report: of at least one layer.

    Returns:
        A whole document of HTML.
    """
    found = charts(report.layers)
    parts = [
        *_head(report),
        *_depth(report, found),
        *_split(found),
        *_tasks(report, found),
        *_modules(report, found),
        *_settings(report, found),
        *_end(report),
        *_numbers(report),
        *_about(report),
    ]
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>Drift to the experts</title>\n<style>{STYLE}</style>\n</head>\n<body>\n"
        + "\n".join(parts)
        + "\n</body>\n</html>\n"
    )


def _head(report: DriftReport) -> list[str]:
    summary, *_ = report.summary().split("\n")
    return [
        "<h1>Drift to the experts</h1>",
        f'<p class="lead">{safe(summary[0].upper() + summary[1:])}.</p>',
        '<p class="soft">Drift is how far what leaves a layer is from what leaves the expert\'s on the same samples: '
        "the norm of the difference, relative to the norm of the expert's. 0 is the expert itself.</p>",
        *(f'<p class="warning">{safe(each)}</p>' for each in report.warnings),
    ]


def _depth(report: DriftReport, found: Charts) -> list[str]:
    mean = "" if len(report.tasks) == 1 else ", the mean over tasks"
    return [
        "<h2>Drift over depth</h2>",
        f'<p class="soft">After each layer{mean}.</p>',
        _grid([_figure(found.drift)]),
    ]


def _split(found: Charts) -> list[str]:
    figures = [_figure(each, each.title) for each in found.split]
    return ["<h2>Where it comes from</h2>", f'<p class="soft">{PARTS}</p>', _grid(figures)]


def _tasks(report: DriftReport, found: Charts) -> list[str]:
    if len(found.tasks) == 1:
        return []
    hover = len(found.tasks) * len(report.layers) <= HOVERS
    figures = [
        f"<figure><h3>{safe(panel.title)}</h3>{panel_svg(_unnamed(panel), 240, 150, hover=hover)}</figure>"
        for panel in found.tasks
    ]
    keys = "".join(f"{_key(model)}{model}" for model in report.models)
    return [
        "<h2>Drift of each task</h2>",
        f'<p class="soft">All on one scale.{keys}</p>',
        f'<div class="grid small">{"".join(figures)}</div>',
    ]


def _modules(report: DriftReport, found: Charts) -> list[str]:
    if found.removed is None:
        return []
    kept = " A circle marks a module that kept its merged weights." if found.removed.marked else ""
    return [
        "<h2>What calibration removed</h2>",
        f'<p class="soft">{GAIN}{kept}</p>',
        f'<div class="scroll">{heat_svg(found.removed)}</div>',
    ]


def _settings(report: DriftReport, found: Charts) -> list[str]:
    settings = report.settings
    if settings is None:
        return []
    alphas = _alphas(report.layers)
    chosen = {"ridge_lambda": found.picked, "teacher_alpha": alphas}
    names = [name for name in ("ridge_lambda", "anchor_rho", "teacher_alpha") if not chosen.get(name)]
    same = ", ".join(f"{name} {getattr(settings, name):g}" for name in names)
    return [
        "<h2>Settings</h2>",
        f"<p>{safe(same)}{'; ridge_lambda was chosen for each module' if found.picked else ''}.</p>",
        "" if found.picked is None else f'<div class="scroll">{heat_svg(found.picked)}</div>',
        f"<p>teacher_alpha as it was chosen: {safe(alphas)}.</p>" if alphas else "",
    ]


def _alphas(layers: Sequence[LayerSplit]) -> str:
    """Which value was chosen in which layers."""
    found: dict[float, list[str]] = {}
    for layer in layers:
        if layer.alpha is not None:
            found.setdefault(layer.alpha, []).append(str(layer.index))
    return "; ".join(f"{alpha:g} in layers {', '.join(found[alpha])}" for alpha in sorted(found))


def _end(report: DriftReport) -> list[str]:
    """What the models give."""
    outcome = report.outcome
    if outcome is None:
        return []
    found = outcome.tasks.values()
    columns = [name for name in COLUMNS if any(outcome_pair(each, name) for each in found)]
    titles = [f"{COLUMNS[name][0]}, {model}" for name in columns for model in report.models]
    experts = any(each.loss_expert is not None for each in found)
    rows = []
    for task, each in outcome.tasks.items():
        pairs = [(COLUMNS[name][1], outcome_pair(each, name)) for name in columns]
        cells = [form(value) for form, pair in pairs for value in pair or (math.nan, math.nan)]
        own = "" if each.loss_expert is None else COLUMNS["loss"][1](each.loss_expert)
        rows.append([task, str(each.samples), *cells, *([own] if experts else [])])
    titles += [f"{COLUMNS['loss'][0]}, expert"] if experts else []
    kind = "warning" if outcome.worse else "plain"
    return [
        "<h2>What the models give</h2>",
        f'<p class="{kind}">{safe(outcome.verdict())}.</p>',
        _table(["task", "samples", *titles], rows),
    ]


def _numbers(report: DriftReport) -> list[str]:
    last = report.layers[-1]
    tasks = [[task, *_cells(report, [last.splits(model)[task] for model in report.models])] for task in report.tasks]
    layers = [
        [f"{layer.index}  {layer.path}", *_cells(report, [layer.mean(model) for model in report.models])]
        for layer in report.layers
    ]
    titles = [title for model in report.models for title in (model, "local", "upstream")]
    titles += ["change"] if len(report.models) == 2 else []
    return [
        "<h2>Numbers</h2>",
        '<p class="soft">Drift of each task after the last layer, and its two shares.</p>',
        _table(["task", *titles], tasks),
        f"<details><summary>Every layer, mean over tasks</summary>{_table(['layer', *titles], layers)}</details>",
        *_kept(report),
    ]


def _kept(report: DriftReport) -> list[str]:
    rows = [[f"{layer.path}.{name}", reason] for layer in report.layers for name, reason in layer.kept.items()]
    if not rows:
        return []
    table = _table(["weights", "why"], rows)
    return [f"<details><summary>Weights that kept their merged values: {len(rows)}</summary>{table}</details>"]


def _about(report: DriftReport) -> list[str]:
    samples = ", ".join(
        f"{task}: {count}{' held out' if report.held_out.get(task) else ''}" for task, count in report.samples.items()
    )
    facts = {"samples": samples, "model": report.model or "", "family": report.family, "device": report.device}
    facts |= {"versions": ", ".join(f"{name} {version}" for name, version in report.versions.items())}
    items = "".join(f"<dt>{name}</dt><dd>{safe(value)}</dd>" for name, value in facts.items() if value)
    return ["<h2>What was measured</h2>", f'<dl class="soft">{items}</dl>']


def _cells(report: DriftReport, splits: Sequence[Split]) -> list[str]:
    cells = [drift_text(value) for each in splits for value in (each.drift, each.local_share, each.upstream_share)]
    if len(report.models) == 2:
        before, after = (each.drift for each in splits)
        cells.append(f"{after / before - 1:+.1%}" if before else "")
    return cells


def _table(titles: Iterable[str], rows: Iterable[Sequence[str]]) -> str:
    head = "".join(f"<th>{safe(each)}</th>" for each in titles)
    body = "".join(f"<tr>{''.join(f'<td>{safe(each)}</td>' for each in row)}</tr>" for row in rows)
    return f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


def _figure(panel: Panel, title: str = "") -> str:
    heading = f"<h3>{safe(title)}</h3>" if title else ""
    return f"<figure>{heading}{panel_svg(panel, 440, 270)}</figure>"


def _grid(figures: Sequence[str]) -> str:
    return f'<div class="grid">{"".join(figures)}</div>'


def _unnamed(panel: Panel) -> Panel:
    """Without a legend."""
    return replace(panel, curves=[replace(each, name="") for each in panel.curves])


def _key(model: str) -> str:
    line = f'<path class="{model}" d="M0 2h22" stroke-width="3" stroke="{COLOURS[model]}"/>'
    return f'<svg class="key" viewBox="0 0 22 4">{line}</svg>'
