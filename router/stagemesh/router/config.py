"""The settings of the router, and mesh.yaml."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from stagemesh.wire.errors import ConfigError


class _Settings(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=())


class StageEntry(_Settings):
    """A stage in mesh.yaml; its index is its place in the list."""

    address: str
    layers: str | None = None
    metrics: str | None = None
    tp: int = Field(default=1, ge=1)


class RouterEntry(_Settings):
    """The router in mesh.yaml."""

    listen: str | None = None
    admin: str | None = None
    metrics: str | None = None
    api_workers: int | None = Field(default=None, ge=0)


class MeshFile(_Settings):
    """mesh.yaml: one description that router, stages and `stagemesh up` read."""

    model: str | None = None
    served_model_name: str | None = None
    router: RouterEntry = RouterEntry()
    stages: tuple[StageEntry, ...] = ()
    block_size: int | None = Field(default=None, ge=1)
    max_context: int | None = Field(default=None, ge=1)

    @classmethod
    def read(cls, path: str | Path) -> MeshFile:
        """Parse a file; an unknown key, a wrong type or bad YAML is a ConfigError naming it."""
        content = load_yaml(path)
        try:
            return cls.model_validate(content or {})
        except ValidationError as error:
            raise ConfigError(f"{path}: {first_problem(error)}") from error


class RouterConfig(_Settings):
    """What a router is started with. Defaults are written here and nowhere else."""

    model: str = Field(description="Path of a Hugging Face folder or a GGUF file (tokenizer and limits).")
    stages: tuple[str, ...] = Field(min_length=1, description="Addresses of the stages, in order.")
    listen: str = Field(default="127.0.0.1:50051", description="Address of the public gRPC server.")
    admin: str = Field(default="127.0.0.1:50052", description="Address of the admin gRPC server.")
    api_workers: int = Field(
        default=0,
        ge=0,
        description="Processes that tokenize, detokenize and stream; 0: the router does it itself.",
    )
    served_model_name: str | None = Field(
        default=None, description="Unset: the name of the model's file or folder."
    )
    max_context: int | None = Field(
        default=None, ge=1, description="Tokens of a sequence at most; unset: the model's."
    )
    max_sequences: int = Field(
        default=512, ge=1, description="Running sequences at most, for each stage of the lane."
    )
    max_waiting: int = Field(
        default=1024, ge=1, description="Waiting requests at most; past it RESOURCE_EXHAUSTED."
    )
    step_tokens: int = Field(
        default=512, ge=1, description="Tokens of a step at most, decodes and prefill together."
    )
    lookahead: int = Field(
        default=1, ge=0, description="Sampled tokens of a sequence the router may not have seen yet."
    )
    prefix_cache: bool = Field(default=True, description="Share the KV blocks of equal prompt beginnings.")
    max_in_flight: int = Field(
        default=0, ge=0, description="Microbatches in flight; 0: chosen by what steps cost."
    )
    itl_target_ms: float = Field(
        default=0.0,
        ge=0,
        description="Inter-token time for 95% of tokens over 10 s; prefill gives way for it. 0: none.",
    )
    step_timeout_s: float = Field(
        default=60.0, gt=0, description="A step unanswered for longer means a lost stage."
    )
    link_timeout_s: float = Field(default=20.0, gt=0, description="Seconds a link may take to open.")
    link_transport: Literal["auto", "nccl", "unix", "grpc"] = Field(
        default="auto",
        description="Transport of every link; auto: the best that both ends of a link have.",
    )
    heartbeat_timeout_s: float = Field(default=5.0, gt=0, description="A stage silent for longer is lost.")
    insecure: bool = Field(default=False, description="Listen beyond loopback without TLS.")
    trace: Literal["requests", "full"] = Field(
        default="requests",
        description="Spans of a sampled request; full: one for each of its decode steps on each stage too.",
    )
    metrics: str | None = Field(
        default=None, description="Address of an HTTP server for /metrics, /healthz and /readyz; unset: none."
    )
    debug_logits: bool = Field(default=False, description="For tests: step results carry logits.")
    event_log: str | None = Field(
        default=None,
        description="A file that gets every event of the scheduler, from which its steps can be made again.",
    )
    step_log: str | None = Field(
        default=None, description="For tests and debugging: a file that gets a JSON line a step."
    )
    log_level: str = Field(default="info", description="debug, info, warning or error.")
    log_json: bool = Field(default=False, description="Log JSON lines.")


def load_yaml(path: str | Path) -> Any:
    """What a file says, unchecked; one that cannot be read, or is no YAML in UTF-8, is a ConfigError."""
    try:
        return yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: not UTF-8: {error.reason} at byte {error.start}") from error
    except yaml.YAMLError as error:
        raise ConfigError(f"{path}: not YAML: {' '.join(str(error).split())}") from error


def first_problem(error: ValidationError) -> str:
    """The first finding of pydantic in one line, naming the key."""
    finding = error.errors()[0]
    key = ".".join(str(part) for part in finding["loc"]) or "(top level)"
    if finding["type"] == "extra_forbidden":
        return f"unknown key '{key}'"
    return f"{key}: {finding['msg']} (got {finding.get('input')!r})"
