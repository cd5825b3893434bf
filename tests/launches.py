"""Commands that start several ranks, as far as their options are understood."""

from collections.abc import Sequence
from typing import Any

import typer

from featcal_fast import cli


def check_calibrate(arguments: Sequence[str]) -> None:
    """Raises what a command line of `featcal-fast calibrate` raises that it does not take; nothing is run."""
    command: Any = typer.main.get_command(cli.app)
    command.commands["calibrate"].make_context("calibrate", list(arguments))


def check_torchrun(arguments: Sequence[str]) -> Any:
    """A command line of torchrun that runs `featcal-fast calibrate`, likewise.

    Returns:
        What torchrun makes of it.
    """
    from torch.distributed.run import get_args_parser

    found = get_args_parser().parse_args(list(arguments))
    assert found.module
    assert found.training_script == "featcal_fast"
    assert found.training_script_args[0] == "calibrate"
    check_calibrate(found.training_script_args[1:])
    return found
