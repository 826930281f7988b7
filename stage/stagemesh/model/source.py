"""Finds a model and says what it is, without reading its weights."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from stagemesh.model.config import ModelConfig
from stagemesh.model.fingerprint import fingerprint_config, fingerprint_file, fingerprint_index
from stagemesh.model.gguf_config import read_gguf_config
from stagemesh.model.gguf_file import open_gguf
from stagemesh.model.hf_config import read_hf_config, read_json
from stagemesh.model.hub import find_in_hub_cache, is_hub_name
from stagemesh.model.safetensors_header import read_safetensors_header
from stagemesh.wire.errors import ModelError

_SINGLE = "model.safetensors"
_INDEX = "model.safetensors.index.json"


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelSource:
    """A model on disk. Holds no open file."""

    path: Path
    """The GGUF file, or the Hugging Face folder."""
    kind: Literal["gguf", "safetensors", "none"]
    """none: a folder with config.json only, for random weights."""
    config: ModelConfig
    fingerprint: str
    """64 hex digits. Equal for equal models wherever they lie, and with only some shard files there; of two
    sharded models with the same shape and index it cannot tell which is which."""
    name: str
    """What the model goes by: the folder's or the file's name, or ORG/NAME."""
    weight_files: Mapping[str, Path]
    """Of a safetensors folder: tensor name to its file. Files of other stages' tensors may be missing."""


def open_model(path: str | Path, *, weights: bool = True) -> ModelSource:
    """Opens a Hugging Face folder (safetensors, one file or sharded), a .gguf file, or ORG/NAME.

    Args:
        path: Where it is; ORG/NAME, where no such path exists, is looked up in the local hub cache.
        weights: False accepts a folder with config.json alone, for random weights.

    Raises:
        ModelError: Nothing there, an unknown format, a damaged file, or a model that is not supported.
    """
    if not str(path):
        raise ModelError("--model is empty; expected a Hugging Face folder, a .gguf file, or ORG/NAME")
    found = Path(path).expanduser()
    name = found.resolve().name
    if not found.exists():
        if not is_hub_name(str(path)):
            raise ModelError(
                f"model {path} does not exist; expected a Hugging Face folder, a .gguf file, "
                "or ORG/NAME of a model in the local hub cache"
            )
        found, name = find_in_hub_cache(str(path)), str(path)
    if found.is_dir():
        return _open_folder(found, name, weights=weights)
    if found.suffix != ".gguf":
        raise ModelError(
            f"model {found} is of an unknown format {found.suffix or 'without suffix'!r}; "
            "expected a .gguf file or a folder with config.json and safetensors"
        )
    file = open_gguf(found, tokenizer=False)
    config = read_gguf_config(file)
    table = sorted((tensor.name, tensor.type_name, tensor.shape) for tensor in file.tensors.values())
    return ModelSource(
        path=found,
        kind="gguf",
        config=config,
        fingerprint=fingerprint_file(config, table, found, file.data_offset),
        name=found.stem,
        weight_files={},
    )


def _open_folder(folder: Path, name: str, *, weights: bool) -> ModelSource:
    if not (folder / "config.json").exists():
        gguf = sorted(folder.glob("*.gguf"))
        hint = f"; it has {gguf[0].name}: give that file's path" if gguf else ""
        raise ModelError(f"model folder {folder} has no config.json, expected a Hugging Face folder{hint}")
    config = read_hf_config(folder)
    kind: Literal["safetensors", "none"] = "safetensors"
    files: dict[str, Path] = {}
    if (folder / _INDEX).exists():
        files = _read_index(folder)
        fingerprint = fingerprint_index(config, {tensor: file.name for tensor, file in files.items()})
    elif (folder / _SINGLE).exists():
        header = read_safetensors_header(folder / _SINGLE)
        files = dict.fromkeys(header, folder / _SINGLE)
        table = sorted((tensor, info.dtype, info.shape) for tensor, info in header.items())
        begin = min((info.begin for info in header.values()), default=0)
        fingerprint = fingerprint_file(config, table, folder / _SINGLE, begin)
    elif weights:
        raise _no_weights(folder)
    else:
        kind, fingerprint = "none", fingerprint_config(config)
    return ModelSource(
        path=folder, kind=kind, config=config, fingerprint=fingerprint, name=name, weight_files=files
    )


def _read_index(folder: Path) -> dict[str, Path]:
    path = folder / _INDEX
    table = read_json(path).get("weight_map")
    if not isinstance(table, dict) or not all(isinstance(file, str) for file in table.values()):
        raise ModelError(f"{path} is damaged: weight_map is missing or not tensor names to file names")
    for file in set(table.values()):
        # A name with a folder in it could point anywhere on this host.
        if Path(file).name != file or not file.endswith(".safetensors"):
            raise ModelError(
                f"{path}: weight_map names {file!r}, expected a .safetensors file in the same folder"
            )
    return {str(tensor): folder / file for tensor, file in table.items()}


def _no_weights(folder: Path) -> ModelError:
    names = sorted(path.name for path in folder.iterdir())
    pickled = [name for name in names if name.endswith((".bin", ".pt", ".pth"))]
    if pickled:
        return ModelError(
            f"model folder {folder} has {pickled[0]} but no safetensors; pickled weights are never loaded: "
            "convert them with transformers' save_pretrained"
        )
    other = [name for name in names if name.endswith((".safetensors", ".gguf"))]
    hint = f"; it has {other[0]}" if other else ""
    return ModelError(f"model folder {folder} has no weights, expected {_SINGLE} or {_INDEX}{hint}")
