"""A plan on the console, and as JSON."""

import math
from typing import Any

from rich.table import Table
from rich.text import Text

from mm.data.layout import size_text
from mm.plan.advice import advice, assumptions
from mm.plan.estimate import STAGES, Estimate, largest_batch
from mm.plan.speed import SPREAD, by_sample, model_flops
from mm.progress import Lines

GB = 1e9
LEAST = 5e6  # bytes: a part that is smaller under every stage is not shown


def as_json(found: Estimate) -> dict[str, Any]:
    """All figures: bytes, seconds, operations."""
    config, took = found.config, found.speed
    low, high = SPREAD
    return {
        "samples": config.samples,
        "batch": config.batch,
        "steps": found.steps,
        "gpu": config.gpu,
        "nodes": config.nodes,
        "ranks": found.ranks,
        "samples_per_gpu": config.batch // found.ranks,
        "micro_batch": found.micro_batch,
        "zero_stage": found.stage,
        "parameters": {
            "image": _count(found.subject.towers.image),
            "text": _count(found.subject.towers.text),
            "all": found.parameters.total,
            "trained": found.parameters.trained,
        },
        "memory": {
            "gpu_bytes": found.gpu.memory,
            "stages": {
                str(stage): {
                    "parts": dict(of.parts),
                    "at_once": dict(of.moments),
                    "needed": of.needed,
                    "fits": found.fits(stage),
                    "tight": found.tight(stage),
                    "largest_batch": largest_batch(found, stage),
                }
                for stage, of in found.stages.items()
            },
        },
        "flops_per_sample": dict(by_sample(found.trace, found.micro_batch)),
        "step_seconds": {**took._asdict(), "step": took.step},
        "sent_per_step": found.traffic._asdict(),
        "samples_per_s": found.samples_per_s,
        "samples_per_s_from_to": [low * found.samples_per_s, high * found.samples_per_s],
        "efficiency": found.efficiency,
        "hours": found.hours,
        "gpu_hours": found.hours * found.ranks,
        "storage": {
            **found.written._asdict(),
            "at_once": found.written.at_once,
            "total": found.written.total,
            "bytes_per_sample": found.data.bytes_per_sample,
            "samples_in_data": found.data.samples,
        },
        "assumptions": assumptions(found),
        "advice": advice(found),
    }


def show(found: Estimate) -> None:
    """Print it; to a file or a pipe without colours, and as wide as it must be."""
    console = Lines(highlight=False, markup=False, soft_wrap=True)
    if not console.is_terminal:
        console = Lines(highlight=False, markup=False, soft_wrap=True, no_color=True, width=10_000)
    for line in _heading(found):
        console.print(line)
    for title, grid in (("Memory of a GPU, GB", _memory(found)), ("A step", _step(found))):
        console.print(f"\n{title}")
        console.print(grid)
    for line in ["", *_speed(found), "", "Storage", *_storage(found), ""]:
        console.print(line)
    for line in assumptions(found):
        console.print(f"assumed: {line}")
    for line in advice(found):
        console.print(f"advice: {line}")


def _heading(found: Estimate) -> list[str]:
    config, towers = found.config, found.subject.towers
    machines = f"{found.ranks} {config.gpu}" + (
        f" ({config.nodes} nodes of {config.gpus_per_node})" if config.nodes > 1 else ""
    )
    share = config.batch // found.ranks
    at_once = f", {found.accumulation} times {found.micro_batch}" if found.accumulation > 1 else ""
    steps = f"{config.samples:,} samples in {found.steps:,} steps of {config.batch:,}"
    image = f"{towers.image.spec['name']}, {_millions(_count(towers.image))} parameters"
    text = f"{towers.text.spec['name']}, {_millions(_count(towers.text))} parameters"
    lines = [
        f"{steps} on {machines}, {share:,} a GPU{at_once}",
        f"  image   {image}, {towers.image.size[0]} px",
        f"  text    {text}, {found.subject.tokens} tokens",
    ]
    rest = found.parameters.total - _count(towers.image) - _count(towers.text)
    if rest > 1e6:
        lines.append(f"  besides {_millions(rest)} parameters in projections, heads, and what reads time")
    precision, stage = config.engine.precision, found.stage
    trained = f"{_millions(found.parameters.trained)} of {_millions(found.parameters.total)} parameters"
    return [*lines, f"  learns  {trained}, {precision}, ZeRO {stage}"]


def _memory(found: Estimate) -> Table:
    grid = _grid("", *(f"ZeRO {stage}{'*' if stage == found.stage else ''}" for stage in STAGES))
    for name in found.memory.parts:
        values = [found.stages[stage].parts[name] for stage in STAGES]
        if max(values) >= LEAST:
            grid.add_row(f"  {name}", *(_gb(value) for value in values))
    for name in found.memory.moments:
        grid.add_row(f"at once: {name}", *(_gb(found.stages[stage].moments[name]) for stage in STAGES))
    needed = [found.stages[stage].needed for stage in STAGES]
    grid.add_row("needed, with CUDA and the allocator", *map(_gb, needed))
    grid.add_row(
        f"of {found.gpu.memory / GB:.1f}",
        *(
            _share(value / found.gpu.memory, found.fits(stage), found.tight(stage))
            for stage, value in zip(STAGES, needed, strict=True)
        ),
    )
    kept = (found.activations, found.activations, found.activations, found.activations_of_stage_3)
    grid.add_row("activations of a sample, MB", *(f"{one.sample / 1e6:,.1f}" for one in kept))
    grid.add_row("most samples at once", *(f"{largest_batch(found, stage):,}" for stage in STAGES))
    return grid


def _step(found: Estimate) -> Table:
    grid = _grid("", "ms", "GFLOP a sample", "a rank sends")
    flops, took, sent = by_sample(found.trace, found.micro_batch), found.speed, found.traffic
    for name in ("forward", "backward", "recomputation"):
        if flops[name]:
            grid.add_row(f"  {name}", _ms(getattr(took, name)), f"{flops[name] / 1e9:,.1f}", "")
    grid.add_row("  optimizer", _ms(took.optimizer), "", "")
    if found.ranks > 1:
        what = {"gradients": sent.gradients, "weights": sent.weights, "features": sent.features}
        told = ", ".join(f"{name} {size_text(value)}" for name, value in what.items() if value)
        hidden = f", {_ms(took.hidden)} more hidden" if took.hidden > 1e-4 else ", not hidden"
        grid.add_row(f"  network{hidden}", _ms(took.network), "", told)
    grid.add_row("  a step", _ms(took.step), f"{sum(flops.values()) / 1e9:,.1f}", "")
    return grid


def _speed(found: Estimate) -> list[str]:
    low, high = SPREAD if found.config.efficiency is None else (1.0, 1.0)
    hours, ranks = found.hours, found.ranks
    span = f" ({_hours(hours / high)} to {_hours(hours / low)})" if low != high else ""
    all_span = f" ({_round(hours * ranks / high)} to {_round(hours * ranks / low)})" if low != high else ""
    flops = model_flops(found.trace) / found.micro_batch * found.samples_per_s / ranks / 1e12
    return [
        f"{_round(found.samples_per_s)} samples/s, {_round(found.samples_per_s / ranks)} a GPU: "
        f"{_round(flops)} TFLOP/s, {100 * found.efficiency:.2g}% of its peak",
        f"{_hours(hours)}{span}, {_round(hours * ranks)} GPU-hours{all_span}",
    ]


def _storage(found: Estimate) -> list[str]:
    save, config = found.written, found.config
    apart = save.steps_between * found.speed.step
    lines = [
        f"  checkpoints  {size_text(save.checkpoint)} each, every {save.steps_between * config.batch:,} samples "
        f"({_hours(apart / 3600)}): {save.checkpoints:,} are written, {min(save.kept, save.checkpoints)} kept",
        f"  model/       {size_text(save.model)}",
        f"  the disk     {size_text(save.at_once)} at most at a time, {size_text(save.total)} written in all",
    ]
    size = found.data.bytes_per_sample
    if size:
        rate = size * found.samples_per_s
        lines.append(
            f"  reading      {size_text(size)} a sample: {size_text(rate * 3600)} an hour, "
            f"{rate / config.nodes * 8 / 1e9:.2f} Gbit/s a node"
            + (f"; {config.samples / found.data.samples:.1f} passes" if found.data.samples else "")
        )
    for note in found.data.notes:
        lines.append(f"  data         {note}" + ("" if size else "; bytes_per_sample= tells what is read"))
    for name, figures in found.data.figures.items():
        wanted = (
            "share of a batch",
            "shards",
            "a rank opens",
            "distinct shards",
            "neighbours meet",
            "bytes",
            "cache",
        )
        told = [key for key in wanted if key in figures and (name or key != "share of a batch")]
        lines += [f"  {name or 'data'}: {key}  {figures[key]}" for key in told]
    return lines


def _grid(*columns: str) -> Table:
    grid = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for i, name in enumerate(columns):
        grid.add_column(Text(name), justify="right" if i else "left", no_wrap=True)
    return grid


def _count(tower: Any) -> int:
    return sum(p.numel() for p in tower.parameters())


def _millions(count: float) -> str:
    return f"{count / 1e6:,.1f} M"


def _gb(count: float) -> str:
    return f"{count / GB:,.2f}" if count else "-"


def _share(value: float, fits: bool, tight: bool) -> Text:
    if not fits:
        return Text(f"{value:.0%} does not fit", "red")
    return Text(f"{value:.0%} tight", "yellow") if tight else Text(f"{value:.0%}")


def _ms(seconds: float) -> str:
    return f"{1000 * seconds:,.1f}"


def _hours(hours: float) -> str:
    """Seconds, minutes, hours or days, with two digits or three."""
    units = {"seconds": 1 / 3600, "minutes": 1 / 60, "hours": 1.0, "days": 24.0}
    unit = next((name for name, size in units.items() if hours < 100 * size), "days")
    value = hours / units[unit]
    return f"{value:.0f} {unit}" if value >= 10 else f"{value:.1f} {unit}"


def _round(value: float) -> str:
    """Two or three digits: an estimate has no more."""
    digits = max(0, 2 - math.floor(math.log10(value))) if value > 0 else 0
    step = 10 ** max(0, math.floor(math.log10(max(value, 1))) - 2)
    return f"{round(value / step) * step:,}" if value >= 100 else f"{value:,.{digits}f}"
