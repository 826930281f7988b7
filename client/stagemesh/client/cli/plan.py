"""`stagemesh plan`."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any

import typer

from stagemesh.client.cli import _options as shared
from stagemesh.client.cli._extras import missing_extra
from stagemesh.client.cli._sizes import format_size, parse_size
from stagemesh.wire.cgroup import usable_cores
from stagemesh.wire.errors import ConfigError, UnavailableError

if TYPE_CHECKING:
    from stagemesh.model.config import ModelConfig
    from stagemesh.model.layer_split import PartTimes, Proposal

ITEMSIZE = {"float32": 4, "bfloat16": 2, "float16": 2}
BLOCK = 16
WORTH = 1.005
"""Gains below it are not spoken of."""
HERE = "here"
"""--measure's word for this machine."""
DEVICE_MEMORY = "80GB"
WORKED_OUT = {"bandwidth": "--device-tb-s", "tflops": "--device-tflops", "dtype": "--dtype"}
"""Parameters that say what a device would take: nothing is to be worked out where it was measured."""
OF_A_MODEL = {
    "model": "MODEL",
    "rows": "--rows",
    "context": "--context",
    "prefill": "--prefill",
    "memory": "--memory",
    **WORKED_OUT,
}
"""Parameters that a running mesh has no use for: its model is loaded, its times are those of its load."""


def command() -> Any:
    """The function to run."""
    return _plan


def _plan(
    ctx: typer.Context,
    model: Annotated[
        str | None, typer.Argument(help="Path of a Hugging Face folder or a GGUF file; its config is enough.")
    ] = None,
    num_stages: Annotated[int | None, typer.Option("--stages", min=1, help="How many; default 2.")] = None,
    measure: Annotated[
        str | None,
        typer.Option(
            "--measure",
            metavar="HOST:PORT|here",
            help="Stage times of a running mesh (its admin address), or of the model's parts on this machine's CPU.",
        ),
    ] = None,
    rows: Annotated[int, typer.Option("--rows", min=1, help="Sequences that decode in a step.")] = 64,
    context: Annotated[int, typer.Option("--context", min=1, help="Tokens of each of them so far.")] = 1024,
    prefill: Annotated[int, typer.Option("--prefill", min=0, help="Prompt tokens in the step.")] = 0,
    memory: Annotated[
        str | None,
        typer.Option(
            "--memory",
            help=f"Of one device; default {DEVICE_MEMORY}, and none with --measure here, which then says nothing of KV.",
        ),
    ] = None,
    bandwidth: Annotated[
        float, typer.Option("--device-tb-s", min=0.001, help="Of one device: TB/s of memory read.")
    ] = 4.3,
    tflops: Annotated[float, typer.Option("--device-tflops", min=0.01, help="Of one device.")] = 700.0,
    dtype: Annotated[str, typer.Option("--dtype", help="bfloat16, float16 or float32.")] = "bfloat16",
    as_json: shared.JsonOption = False,
) -> None:
    """Embedding and head are weighed in: the head costs layers in decode and next to nothing in prefill."""
    try:
        if measure:
            _refuse_unused(ctx, measure)
        if measure and measure != HERE:
            lines = _of_mesh(measure, num_stages)
        else:
            lines = _of_model(
                _Question(
                    model=model,
                    num_stages=num_stages or 2,
                    here=measure == HERE,
                    rows=rows,
                    context=context,
                    prefill=prefill,
                    memory=None if measure and memory is None else _size(memory or DEVICE_MEMORY),
                    bytes_per_s=bandwidth * 1e12,
                    flops=tflops * 1e12,
                    dtype=dtype,
                )
            )
    except ModuleNotFoundError as error:
        raise missing_extra(error, "plan") from error
    if as_json:
        print(json.dumps(lines.as_dict(), indent=2))
    else:
        lines.show()


@dataclass(frozen=True, slots=True, kw_only=True)
class _Question:
    model: str | None
    num_stages: int
    here: bool
    rows: int
    context: int
    prefill: int
    memory: int | None
    """Of one device; None: not known, as of a CPU."""
    bytes_per_s: float
    flops: float
    dtype: str


@dataclass(frozen=True, slots=True, kw_only=True)
class PlanView:
    """What is said."""

    proposal: Proposal
    present: Proposal
    """Of the running mesh; of a model, the split that its stages take by themselves."""
    present_name: str
    weight_bytes: tuple[int, ...]
    """Of each stage; empty where the model is not known."""
    kv_blocks: tuple[int, ...]
    """Of each stage; empty where the model or the memory is not known."""
    notes: tuple[str, ...]

    def as_dict(self) -> dict[str, Any]:
        """For --json."""
        proposal = self.proposal
        return {
            "split": list(proposal.split),
            "step_ms": [round(one * 1e3, 4) for one in proposal.times_s],
            "slowest_ms": round(proposal.slowest_s * 1e3, 4),
            "efficiency": round(proposal.efficiency, 4),
            "bubble_share": [round(one, 4) for one in _bubbles(proposal)],
            "present_split": list(self.present.split),
            "present_step_ms": [round(one * 1e3, 4) for one in self.present.times_s],
            "gain": round(self.present.slowest_s / proposal.slowest_s, 4),
            "weight_bytes": list(self.weight_bytes),
            "kv_blocks": list(self.kv_blocks),
            "notes": list(self.notes),
        }

    def show(self) -> None:
        """A row for each stage, then the notes."""
        from rich import box
        from rich.table import Table

        from stagemesh.client.cli._tables import make_console

        table = Table(box=box.SIMPLE, pad_edge=False)
        for header in (
            "stage",
            "layers",
            "step ms",
            "bubble",
            f"{self.present_name}: layers",
            "step ms",
            "bubble",
            "weights",
            "KV blocks",
        ):
            table.add_column(header, justify="right")
        begin = 0
        now, bubbles, bubbles_now = self.present, _bubbles(self.proposal), _bubbles(self.present)
        for index, count in enumerate(self.proposal.split):
            table.add_row(
                str(index),
                f"{begin}:{begin + count} ({count})",
                f"{self.proposal.times_s[index] * 1e3:.3f}",
                f"{bubbles[index]:.0%}",
                str(now.split[index]),
                f"{now.times_s[index] * 1e3:.3f}",
                f"{bubbles_now[index]:.0%}",
                format_size(self.weight_bytes[index]) if self.weight_bytes else "-",
                f"{self.kv_blocks[index]:,}" if self.kv_blocks else "-",
            )
            begin += count
        console = make_console()
        console.print(table)
        for note in self.notes:
            console.print(note)


def _bubbles(proposal: Proposal) -> tuple[float, ...]:
    """Of each stage in a full pipeline, where the slowest one has no pause; hops are not in it."""
    from stagemesh.router.bubble import bubble_share

    return tuple(bubble_share(one, proposal.slowest_s) for one in proposal.times_s)


def _refuse_unused(ctx: typer.Context, measure: str) -> None:
    """ConfigError that names what was given and would change nothing."""
    unused = WORKED_OUT if measure == HERE else OF_A_MODEL
    given = [
        name
        for parameter, name in unused.items()
        if (source := ctx.get_parameter_source(parameter)) and source.name == "COMMANDLINE"
    ]
    if given:
        raise ConfigError(
            f"{', '.join(given)}: no effect with --measure {measure}, which measures; leave it out"
        )


def _of_mesh(address: str, num_stages: int | None) -> PlanView:
    from stagemesh.client.cli._admin import Admin
    from stagemesh.model.layer_split import parts_from_stages, predict, propose

    with Admin(address, key="--measure") as router:
        status = router.status()
    lane = status.lanes[0]
    split = tuple(one.description.layer_end - one.description.layer_begin for one in lane.stages)
    times = tuple(one.step_ms / 1e3 for one in lane.stages)
    if num_stages not in (None, len(split)):
        raise ConfigError(f"--stages: {num_stages}, but the mesh at {address} has {len(split)}")
    if not all(times):
        raise UnavailableError(
            f"the router at {address} has not learnt its stages' step times yet: give it some load, then ask again",
            reason="NOTHING_MEASURED",
            retry_after_s=5.0,
        )
    parts = parts_from_stages(split, times)
    present, proposal = predict(split, parts), propose(sum(split), parts)
    return PlanView(
        proposal=proposal,
        present=present,
        present_name="now",
        weight_bytes=(),
        kv_blocks=(),
        notes=(
            f"measured at {address} under its present load: a step takes {_ms(times)} ms",
            _head_note(parts[-1]),
            _gain_note(proposal, present, "the present split"),
            f"predicted between two tokens of a stream: {_cycle(proposal) * 1e3:.2f} ms of stages, now "
            f"{_cycle(present) * 1e3:.2f}, and {lane.ring_hops_ms:.2f} of hops",
        ),
    )


def _of_model(question: _Question) -> PlanView:
    from stagemesh.client.cli._plan import GPU_HEAD_SHARE
    from stagemesh.model.cost import StepShape
    from stagemesh.model.deal import deal
    from stagemesh.model.layer_split import Device, predict, propose
    from stagemesh.model.shard_shapes import shard_parameters
    from stagemesh.model.source import open_model
    from stagemesh.model.split import split_layers

    if question.model is None:
        raise ConfigError("MODEL is missing; or name a running mesh by --measure HOST:PORT")
    if question.dtype not in ITEMSIZE:
        raise ConfigError(f"--dtype: '{question.dtype}' is not one of {', '.join(ITEMSIZE)}")
    source = open_model(question.model, weights=False)
    config = source.config
    shape = StepShape(
        tokens=question.rows + question.prefill,
        rows=question.rows,
        prefill=question.prefill,
        context=question.rows * question.context + question.prefill,
    )
    itemsize = ITEMSIZE["float32" if question.here else question.dtype]
    if question.here:
        from stagemesh.stage.measure_parts import measure_parts

        part = measure_parts(source, shape, usable_cores())
        how = f"measured on this machine's CPU in float32: a layer {part.layer_s * 1e3:.3f} ms"
    else:
        device = Device(bytes_per_s=question.bytes_per_s, flops=question.flops, itemsize=itemsize)
        part = device.parts(config, shape)
        how = (
            f"worked out for {question.bytes_per_s / 1e12:g} TB/s and {question.flops / 1e12:g} TFLOP/s at their most: "
            f"a layer {part.layer_s * 1e3:.3f} ms"
        )
    parts = [part] * question.num_stages
    proposal = propose(config.num_layers, parts)
    by_weights = split_layers(config, question.num_stages, 1.0 if question.here else GPU_HEAD_SHARE)
    default = predict(tuple(map(len, by_weights)), parts)
    whole = deal(config, 1)[0]
    weights, blocks, begin = [], [], 0
    for index, count in enumerate(proposal.split):
        layers = range(begin, begin + count)
        begin += count
        held = shard_parameters(
            config, layers, whole, has_embedding=index == 0, has_head=index == question.num_stages - 1
        )
        weights.append(held * itemsize)
        if question.memory is not None:
            blocks.append(max(0, question.memory - weights[-1]) // _block_bytes(config, count, itemsize))
    return PlanView(
        proposal=proposal,
        present=default,
        present_name="default",
        weight_bytes=tuple(weights),
        kv_blocks=tuple(blocks),
        notes=(
            f"{how}, for a step of {question.rows} rows of {question.context} tokens"
            + (f" and {question.prefill} prompt tokens" if question.prefill else ""),
            _head_note(part),
            _gain_note(proposal, default, "the split that stages take by themselves"),
            f"the slowest stage takes {proposal.slowest_s * 1e3:.3f} ms: a full pipeline uses {proposal.efficiency:.1%} "
            "of its stages"
            + (f"; the lane has {min(blocks):,} KV blocks of {BLOCK} tokens" if blocks else ""),
            *(
                ()
                if question.memory is None
                else (_replica_note(config, question, itemsize, question.memory),)
            ),
        ),
    )


def _replica_note(config: ModelConfig, question: _Question, itemsize: int, memory: int) -> str:
    from stagemesh.model.deal import deal
    from stagemesh.model.shard_shapes import shard_parameters

    layers = range(config.num_layers)
    weights = itemsize * shard_parameters(
        config, layers, deal(config, 1)[0], has_embedding=True, has_head=True
    )
    kv = _block_bytes(config, config.num_layers, itemsize) * question.rows * -(-question.context // BLOCK)
    name = f"one device of {format_size(memory)}"
    if weights + kv <= memory:
        return (
            f"the model fits {name} with the KV of these rows ({format_size(weights + kv)}): {question.num_stages} replicas "
            "of one device beat any pipeline of them, in throughput and in latency"
        )
    return f"the model does not fit {name} with the KV of these rows ({format_size(weights + kv)}): a pipeline it is"


def _block_bytes(config: ModelConfig, num_layers: int, itemsize: int) -> int:
    return 2 * num_layers * BLOCK * config.num_kv_heads * config.head_dim * itemsize


def _gain_note(proposal: Proposal, present: Proposal, whose: str) -> str:
    gain = present.slowest_s / proposal.slowest_s
    if gain < WORTH:
        return f"no split does better than {whose}"
    return f"the split equalizes the stages: {gain:.2f} times the throughput of {whose} while stages limit it"


def _head_note(part: PartTimes) -> str:
    return (
        f"the head weighs {part.head_s / part.layer_s:.1f} layers in such a step ({part.head_s * 1e3:.3f} ms)"
    )


def _cycle(proposal: Proposal) -> float:
    return max(sum(proposal.times_s), len(proposal.times_s) * proposal.slowest_s)


def _ms(times_s: tuple[float, ...]) -> str:
    return " + ".join(f"{one * 1e3:.2f}" for one in times_s)


def _size(text: str) -> int:
    try:
        return parse_size(text)
    except ValueError as error:
        raise ConfigError(f"--memory: {error}") from error
