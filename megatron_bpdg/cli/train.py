"""`bpdg train`: a run from its YAML file, one process per rank."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from megatron_bpdg.cli.common import console, quiet_libraries
from megatron_bpdg.parallel.launch import launch

if TYPE_CHECKING:
    from megatron_bpdg.config.schema import RunConfig


def train(
    config: Annotated[Path, typer.Argument(help="YAML file; see `bpdg schema` for every field.")],
    overrides: Annotated[
        list[str] | None,
        typer.Argument(help="Changes to the config, e.g. `training.lr=1e-6 gate.partition.size=32 gate=null`."),
    ] = None,
    overwrite: Annotated[bool, typer.Option(help="Delete the run directory first if it exists.")] = False,
    check: Annotated[bool, typer.Option(help="Only validate the config and the paths it names.")] = False,
) -> None:
    """Train as a config says.

    Started as a plain command, it launches one process per rank of `layout` on this machine. Under torchrun
    (WORLD_SIZE is set) it is one of the ranks.
    """
    from megatron_bpdg.config import check_paths, load_config
    from megatron_bpdg.training.fits import check_objective
    from megatron_bpdg.training.method import build_objective

    cfg = load_config(config, overrides or [])
    check_paths(cfg)
    check_objective(cfg, build_objective(cfg.objective))
    if check:
        console.print(f"{config}: valid; needs {cfg.layout.world_size} process(es)")
        return
    if int(os.environ.get("RANK", "0")) == 0:
        _clear_output(cfg, config, overwrite)
    if "WORLD_SIZE" not in os.environ and cfg.layout.world_size > 1:
        launch("megatron_bpdg.cli", ["train", str(config), *(overrides or [])], cfg.layout.world_size)
        return
    quiet_libraries()
    from megatron_bpdg.training.loop import TRAINERS

    TRAINERS[cfg.kind](cfg)


def _clear_output(cfg: RunConfig, config: Path, overwrite: bool) -> None:
    """Refuse an occupied run directory, or delete it if asked to and if it is nothing but an earlier run."""
    from megatron_bpdg.config.load import input_paths

    output = cfg.output
    if output.exists() and not output.is_dir():
        raise ValueError(f"output: {output} is a file; choose a directory")
    if output.exists() and any(output.iterdir()):
        if not overwrite:
            raise ValueError(f"output: {output} is not empty; choose another directory or pass --overwrite")
        if not (output / "config.yaml").is_file() and not (output / "init").is_dir():
            raise ValueError(f"output: {output} was not written by bpdg train; --overwrite does not delete it")
        needed = {"the config file": config, "the working directory": Path.cwd(), **input_paths(cfg)}
        if inside := [name for name, path in needed.items() if path.resolve().is_relative_to(output.resolve())]:
            raise ValueError(f"--overwrite would delete {', '.join(inside)}, inside output: {output}")
        shutil.rmtree(output)
