"""What the command line says about a server; imports nothing, so that `bpdg --help` is quick."""

from __future__ import annotations

from enum import StrEnum


class Role(StrEnum):
    """What a server is for: rollouts with changing weights, or scores of given text."""

    STUDENT = "student"
    TEACHER = "teacher"


class Device(StrEnum):
    CPU = "cpu"
    CUDA = "cuda"
