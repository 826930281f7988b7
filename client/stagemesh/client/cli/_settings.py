"""Options made from the fields of a settings model, so that defaults and help are written once, there.

Every option is None unless its flag or its STAGEMESH_* variable was given; what is None comes from the
file, and then from the model: flag, variable, file, default.
"""

from __future__ import annotations

import inspect
import types
import typing
from collections.abc import Iterable, Mapping
from typing import Any, TypeVar

import typer
from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from stagemesh.client.cli._sizes import format_size, parse_size
from stagemesh.wire.errors import ConfigError

ModelT = TypeVar("ModelT", bound=BaseModel)

_SIZE_FIELDS = frozenset({"kv_memory"})
_EXTRA_FLAGS = {"stages": ("--stage",)}
"""Further names of an option: one stage of the list is as good as the list."""


def options_of(
    model: type[BaseModel], names: Iterable[str] | None = None, *, skip: Iterable[str] = ()
) -> list[inspect.Parameter]:
    """A keyword parameter with a typer option for each field of the model, or for those named."""
    skipped = set(skip)
    wanted = [name for name in (names or model.model_fields) if name not in skipped]
    return [_option(name, model.model_fields[name]) for name in wanted]


def with_options(function: typing.Callable[..., None], parameters: Iterable[inspect.Parameter]) -> Any:
    """The function, as typer sees it: with these parameters for its **values."""
    own = [
        p for p in inspect.signature(function, eval_str=True).parameters.values() if p.kind != p.VAR_KEYWORD
    ]
    signature = inspect.Signature([*own, *parameters])

    def command(**values: Any) -> None:
        function(**values)

    command.__doc__ = function.__doc__
    command.__signature__ = signature  # type: ignore[attr-defined]
    command.__annotations__ = {p.name: p.annotation for p in signature.parameters.values()}
    return command


def make_config(
    model: type[ModelT], given: Mapping[str, Any], file: Mapping[str, Any] | None = None
) -> ModelT:
    """The settings from what was given, what the file says, and the defaults; ConfigError names the flag."""
    values = {name: value for name, value in (file or {}).items() if value is not None}
    for name, value in given.items():
        if value is None or (value == [] and name in model.model_fields):
            continue
        try:
            values[name] = _parsed(name, value)
        except ValueError as error:
            raise ConfigError(f"{flag(name)}: {error}") from error
    try:
        return model.model_validate(values)
    except ValidationError as error:
        raise ConfigError(_problem(error)) from error


def flag(name: str) -> str:
    """The option of a field."""
    return "--" + name.replace("_", "-")


def variable(name: str) -> str:
    """The environment variable of a field."""
    return "STAGEMESH_" + name.upper()


def _option(name: str, field: FieldInfo) -> inspect.Parameter:
    kind = _plain_type(field.annotation)
    size = name in _SIZE_FIELDS
    choices = _choices(field.annotation)
    help_text = (field.description or "") + (" Such as 512MiB or 2GiB." if size else "")
    arguments: dict[str, Any] = {
        "help": help_text,
        "envvar": variable(name),
        "show_default": _default(name, field),
    }
    if choices:
        arguments |= {"metavar": "[" + "|".join(choices) + "]", "autocompletion": lambda: list(choices)}
    elif size:
        arguments |= {"metavar": "SIZE"}
    if kind is bool:
        flags = (f"{flag(name)}/--no-{name.replace('_', '-')}",)
    else:
        flags = (flag(name), *_EXTRA_FLAGS.get(name, ()))
    annotation: Any = typing.Optional[str if size else kind]  # noqa: UP045 - kind is a value, not a type here
    return inspect.Parameter(
        name,
        inspect.Parameter.KEYWORD_ONLY,
        default=None,
        annotation=typing.Annotated[annotation, typer.Option(*flags, **arguments)],
    )


def _plain_type(annotation: Any) -> Any:
    """What typer parses: int, float, bool, str, or a list of str."""
    options = [option for option in _union(annotation) if option is not type(None)]
    plain = options[0]
    origin = typing.get_origin(plain)
    if origin is typing.Literal:
        return str
    if origin is tuple:
        return list[str]
    return plain


def _choices(annotation: Any) -> tuple[str, ...]:
    return tuple(
        choice
        for option in _union(annotation)
        if typing.get_origin(option) is typing.Literal
        for choice in typing.get_args(option)
    )


def _union(annotation: Any) -> tuple[Any, ...]:
    if typing.get_origin(annotation) in (typing.Union, types.UnionType):
        return typing.get_args(annotation)
    return (annotation,)


def _default(name: str, field: FieldInfo) -> str | bool:
    if field.default is PydanticUndefined or field.default is None:
        return False
    if isinstance(field.default, bool):
        return "on" if field.default else False
    return format_size(field.default) if name in _SIZE_FIELDS else str(field.default)


def _parsed(name: str, value: Any) -> Any:
    if name in _SIZE_FIELDS and isinstance(value, str):
        return parse_size(value)
    if isinstance(value, list):  # --stages a,b --stage c
        return tuple(item.strip() for text in value for item in text.split(",") if item.strip())
    return value


def _problem(error: ValidationError) -> str:
    finding = error.errors()[0]
    name = str(finding["loc"][0]) if finding["loc"] else ""
    if finding["type"] == "missing":
        return f"{flag(name)} is missing; give it, set {variable(name)}, or name a file with it by --config"
    if finding["type"] == "too_short":
        return f"{flag(name)}: empty; expected one at least"
    return f"{flag(name)}: {finding['msg']} (got {finding.get('input')!r})"
