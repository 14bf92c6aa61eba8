"""How a Megatron checkpoint lies on disk, whatever the format of its steps, and what this program keeps beside them."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path

from megatron_bpdg.checkpoint.files import copy_sidecars
from megatron_bpdg.tracking.files import write_text

TRACKER_FILE = "latest_checkpointed_iteration.txt"
METADATA_FILE = ".metadata"
RELEASE = "release"
HF_FOLDER = "hf"
SOURCE_FILE = "bpdg_source.json"
# Where a training run keeps its checkpoints.
_OF_A_RUN = "checkpoints"


class StepDirectory:
    """One step of a Megatron checkpoint.

    Attributes:
        root: the directory with the tracker (the parent, where a step's own directory was given).
        directory: the step's directory.

    Raises:
        FileNotFoundError, ValueError: see `step_directory`.
    """

    def __init__(self, path: str | Path) -> None:
        self.root, self.directory = step_directory(Path(path))

    @property
    def iteration(self) -> int | None:
        """Number of the step; None for a release."""
        digits = self.directory.name.removeprefix("iter_")
        return int(digits) if digits.isdecimal() else None

    @property
    def hf_folder(self) -> Path | None:
        """The hf folder beside the steps, where it exists."""
        folder = self.root / HF_FOLDER
        return folder if (folder / "config.json").is_file() else None


def checkpoints_of(path: Path) -> Path:
    """``RUN/checkpoints`` for the directory of a training run, else `path` itself."""
    inner = path / _OF_A_RUN
    return inner if (inner / TRACKER_FILE).is_file() else path


def step_directory(path: Path) -> tuple[Path, Path]:
    """(DIR, the step's directory) of a Megatron checkpoint in any format.

    Args:
        path: DIR with its tracker, which names the newest step; the directory of a run with such a DIR; or a step.

    Raises:
        FileNotFoundError: there is no checkpoint.
        ValueError: a tracker that holds something else.
    """
    path = checkpoints_of(path)
    tracker = path / TRACKER_FILE
    if not tracker.is_file():
        if _is_step(path):
            return path.parent, path
        raise FileNotFoundError(
            f"{path} is no Megatron checkpoint: it has neither {TRACKER_FILE} nor the name of a step"
        )
    step = tracker.read_text(encoding="utf-8").strip()
    if step != RELEASE and not step.isdecimal():
        raise ValueError(f"{tracker} holds {step!r}; expected 'release' or an iteration number")
    directory = path / (RELEASE if step == RELEASE else f"iter_{int(step):07d}")
    if not directory.is_dir():
        raise FileNotFoundError(f"{tracker} points at {directory}, which does not exist")
    return path, directory


def hf_folder(path: Path) -> Path:
    """Where a checkpoint's config.json and tokenizer lie: in it (HF), or in the hf folder beside its steps (Megatron).

    Args:
        path: HF directory, or what `step_directory` takes.

    Raises:
        FileNotFoundError: there is no config.json in either place.
    """
    root = checkpoints_of(path)
    folders = [path, root / HF_FOLDER, *([root.parent / HF_FOLDER] if _is_step(root) else [])]
    for folder in folders:
        if (folder / "config.json").is_file():
            return folder
    raise FileNotFoundError(
        f"{path} has neither config.json (an HF checkpoint) nor hf/config.json (a bpdg checkpoint or run)"
    )


def _is_step(path: Path) -> bool:
    """Whether `path` is one step's directory, complete or not."""
    named = path.name == RELEASE or path.name.startswith("iter_")
    return (path / METADATA_FILE).is_file() or (named and path.is_dir())


@dataclass(frozen=True)
class Source:
    """What the weights alone do not tell about the HF checkpoint they came from.

    Attributes:
        has_lm_head: whether `lm_head.weight` was stored (some tied releases carry it).
        vocab_size: true vocabulary rows.
        dtype: torch dtype of the weights, without "torch.".
    """

    has_lm_head: bool
    vocab_size: int
    dtype: str
    format: int = 1


def read_source(hf_folder: Path) -> Source | None:
    """`Source` kept in an hf folder, or None where there is none (a checkpoint of another program)."""
    file = hf_folder / SOURCE_FILE
    if not file.is_file():
        return None
    try:
        return Source(**json.loads(file.read_text(encoding="utf-8")))
    except TypeError as error:
        raise ValueError(f"{file} was not written by this program: {error}") from error


def write_hf_folder(directory: Path, source_model: Path, source: Source) -> None:
    """Make DIR/hf: config and tokenizer files from `source_model`, and what `Source` keeps."""
    folder = directory / HF_FOLDER
    copy_sidecars(source_model, folder)
    write_text(folder / SOURCE_FILE, json.dumps(asdict(source), indent=2) + "\n")
