"""The scheduler: a state machine without clock or I/O. Events go in, steps come out."""

from stagemesh.router.scheduler.deltas import StepDeltas
from stagemesh.router.scheduler.limits import Limits
from stagemesh.router.scheduler.request import Delta, Finish, Request, Sampling
from stagemesh.router.scheduler.scheduler import Scheduler
from stagemesh.router.scheduler.step import Step

__all__ = ["Delta", "Finish", "Limits", "Request", "Sampling", "Scheduler", "Step", "StepDeltas"]
