"""`bpdg train`: a run from its YAML file, one process per rank."""

from __future__ import annotations

import os
from contextlib import nullcontext
from pathlib import Path
from typing import Annotated

import typer

from megatron_bpdg.cli.common import console, quiet_libraries
from megatron_bpdg.parallel.launch import launch, launched, stay_with_launcher


def train(
    config: Annotated[Path, typer.Argument(help="YAML file; see `bpdg schema` for every field.")],
    overrides: Annotated[
        list[str] | None,
        typer.Argument(help="Changes to the config, e.g. `training.lr=1e-6 gate.partition.size=32 gate=null`."),
    ] = None,
    overwrite: Annotated[bool, typer.Option(help="Delete the files of an earlier run in the output.")] = False,
    check: Annotated[bool, typer.Option(help="Only validate the config and the paths it names.")] = False,
) -> None:
    """Train as a config says.

    Started as a plain command, it launches one process per rank of `layout` on this machine. Under torchrun
    (WORLD_SIZE is set) it is one of the ranks.
    """
    if launched():
        stay_with_launcher()
    from megatron_bpdg.config import check_paths, load_config
    from megatron_bpdg.config.load import input_paths
    from megatron_bpdg.tracking.run_directory import check_output, claimed
    from megatron_bpdg.training.fits import check_objective
    from megatron_bpdg.training.method import build_objective

    cfg = load_config(config, overrides or [])
    check_paths(cfg)
    check_objective(cfg, build_objective(cfg.objective))
    inputs = {"the config file": config, "the working directory": Path.cwd(), **input_paths(cfg)}
    leads = int(os.environ.get("RANK", "0")) == 0 and not launched()
    if leads:
        check_output(cfg.output, inputs, overwrite=overwrite)
    if check:
        console.print(f"{config}: valid; needs {cfg.layout.world_size} process(es)")
        return
    with claimed(cfg.output) if leads else nullcontext():
        if "WORLD_SIZE" not in os.environ and cfg.layout.world_size > 1:
            arguments = ["train", str(config), *(overrides or []), *(["--overwrite"] if overwrite else [])]
            launch("megatron_bpdg.cli", arguments, cfg.layout.world_size)
            return
        quiet_libraries()
        from megatron_bpdg.training.loop import TRAINERS

        TRAINERS[cfg.kind](cfg, overwrite=overwrite)
