"""`optimum-cli edgekit`: the whole `edgekit` command, found by Optimum in its own namespace.

It is installed as `optimum/commands/register/register_edgekit.py`. No folder of that path has an
`__init__.py` of ours, or it would hide the files of other distributions. Optimum imports this file
whenever it starts, so that nothing heavy is imported here.
"""

import argparse
import sys

from optimum.commands.base import BaseOptimumCLICommand, CommandInfo

__all__ = ["REGISTER_COMMANDS", "EdgekitCommand"]


class EdgekitCommand(BaseOptimumCLICommand):  # type: ignore[misc]  # Optimum ships without types
    """Everything after `optimum-cli edgekit` is for `edgekit.cli.main`."""

    COMMAND = CommandInfo(
        name="edgekit",
        help="Convert models into bundles for Intel edge devices, run and measure them (edgekit).",
    )

    @staticmethod
    def parse_args(parser: argparse.ArgumentParser) -> None:
        """Take every argument as it is, `--help` too."""
        parser.prefix_chars = ""  # no argument is an option of this parser
        parser.add_argument("arguments", nargs=argparse.REMAINDER)

    def run(self) -> None:
        """Run the command.

        Raises:
            SystemExit: always, with its exit code.
        """
        from edgekit.cli.main import main

        sys.exit(main(self.args.arguments))


REGISTER_COMMANDS = [EdgekitCommand]
