"""Kernels that need a package, a compiler or a disk that may not be there: every rank has them, or none."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import TypeVar

import torch

from stagemesh.stage.group import RankGroup

log = logging.getLogger(__name__)

REASON_LENGTH = 200
"""Of what `status` says of an error; all of what a compiler said is in the log."""

T = TypeVar("T")


def on_every_rank(
    make: Callable[[], T], what: str, group: RankGroup, device: torch.device
) -> tuple[T | None, str]:
    """What `make` returns, and why there is none (empty: there is).

    Args:
        make: Compiles, loads and tries out; called on every rank.
        what: It makes, for people.
        group: The ranks.
        device: That they can sum on.
    """
    made, reason = None, ""
    try:
        made = make()
    except ModuleNotFoundError as error:
        reason = f"{error.name} is not installed"
    except Exception as error:
        # Whatever it is: a rank that left here would keep the others waiting for its vote.
        log.warning("%s cannot be had", what, exc_info=True)
        said = f"{type(error).__name__}: {error}".splitlines()[0]
        reason = f"{what} cannot be had: {said[:REASON_LENGTH]}"
    if not group.all_agree(made is not None, device):
        return None, reason or f"{what} cannot be had on another rank, whose log says why"
    return made, ""
