"""The public surface, frozen: a change here is a change for users, and is made on purpose."""

from __future__ import annotations

import pytest
from typer.main import get_command

import stagemesh.client
from stagemesh.client.cli._main import COMMANDS, load_command, make_app

EXPORTED = """
AsyncClient AsyncManyStream AsyncTokenStream CancelledError ChainError Chunk Client Completion ConfigError
DeadlineExceededError FailedPreconditionError FinishReason InternalError InvalidArgumentError ManyStream
Message ModelError ModelInfo NotFoundError Prompt RequestOptions RequestSpec ResourceExhaustedError
StageLostError StagemeshError StartupError TokenStream UnavailableError UnimplementedError Usage
"""
FLAGS = {
    "up": """
        --admin --api-workers --block-size --config --cuda-graphs --debug-logits --device --dtype --gpus
        --head-share --heartbeat-timeout-s --insecure --max-graph-rows --max-step-tokens --nccl-links --no-cuda-graphs
        --fused-all-reduce --no-fused-all-reduce --no-nccl-links --no-pdl --no-symmetric-memory --pdl --symmetric-memory
        --event-log --itl-target-ms
        --kv-memory --linears --link-timeout-s --link-transport --listen --load-format --log-json --log-level --lookahead
        --max-context --max-in-flight --max-sequences --max-slots --max-waiting --memory-share --metrics
        --no-debug-logits --no-insecure --no-log-json --no-prefix-cache --no-shared-cores --prefix-cache
        --ready-file --served-model-name
        --shared-cores --stage-port --stages --step-log --step-timeout-s --step-tokens --threads --tp
        --trace --trace-ranks --no-trace-ranks
    """,
    "generate": """
        --address --admin --ignore-eos --json --max-tokens --priority --request-id --seed --temperature --timeout
        --token-ids --top-k --top-p --trace
    """,
    "chat": "--address --max-tokens --seed --system --temperature --timeout --top-k --top-p",
    "status": "--admin --interval --json --watch",
    "trace": "--admin --json",
    "top": "--admin --count --interval",
    "timeline": "--admin --output --seconds",
}


def flags_of(command: object) -> set[str]:
    return {flag for p in command.params for flag in (*p.opts, *p.secondary_opts) if flag.startswith("--")}  # type: ignore[attr-defined]


def test_the_client_exports_these_names_and_has_them() -> None:
    assert stagemesh.client.__all__ == EXPORTED.split()
    assert all(hasattr(stagemesh.client, name) for name in stagemesh.client.__all__)


def test_the_command_has_these_subcommands_and_global_flags() -> None:
    assert list(COMMANDS) == [
        "up",
        "generate",
        "chat",
        "status",
        "trace",
        "top",
        "timeline",
        "plan",
        "simulate",
        "health",
        "doctor",
        "stage",
        "router",
    ]
    assert flags_of(get_command(make_app())) >= {"--version", "--debug", "--install-completion"}


@pytest.mark.parametrize("name", FLAGS)
def test_a_subcommand_has_these_flags(name: str) -> None:
    assert flags_of(load_command(name)) == set(FLAGS[name].split())


@pytest.mark.parametrize("name", FLAGS)
def test_what_help_says_has_no_indentation_of_the_source(name: str) -> None:
    assert "   " not in (load_command(name).help or "")


@pytest.mark.parametrize("name", ["stage", "router"])
def test_every_setting_is_a_flag(name: str) -> None:
    from stagemesh.router.config import RouterConfig
    from stagemesh.stage.config import StageConfig

    fields = {"stage": StageConfig, "router": RouterConfig}[name].model_fields
    flags = flags_of(load_command(name))
    assert {"--" + field.replace("_", "-") for field in fields} <= flags
    assert "--config" in flags
