"""The command ``inferpool``.

Each subcommand imports what it needs when it runs, so that ``--help`` is quick.
"""

from __future__ import annotations

import click

from inferpool.cli.chat import chat
from inferpool.cli.console import EPILOG, Commands
from inferpool.cli.demo import demo
from inferpool.cli.doctor import doctor
from inferpool.cli.embed import embed

__all__ = ["main"]


@click.group(cls=Commands, epilog=EPILOG, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="inferpool", message="%(prog)s %(version)s")
def main() -> None:
    """Local models, each in its own worker process.

    Data goes to stdout, everything else to stderr.
    """


for command in (demo, chat, embed, doctor):
    main.add_command(command)
