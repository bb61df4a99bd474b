"""The command line's root: what all commands share in how they are called and how they fail.

Contract: a user's mistake is one line on stderr and exit status 2, never a traceback. Flags are vLLM's
names first, other engines' spellings as aliases; dashes and underscores are the same. Every environment
variable mirrors a flag, and an unknown one with our prefix is a mistake like a misspelt flag.
"""

from __future__ import annotations

import sys
from typing import Any

import click

from fourfold import __version__
from fourfold.core.env import check_variables
from fourfold.core.errors import FourfoldError


class UserGroup(click.Group):
    """Turns `FourfoldError`s into one line and their exit status."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except FourfoldError as error:
            click.echo(f"fourfold: error: {error}", err=True)
            ctx.exit(error.exit_status)
        except BrokenPipeError:
            # The reader of our output left; nothing more can be said to it.
            sys.stderr.close()
            ctx.exit(1)


def same_spelling(name: str) -> str:
    """An option's name, or a value, with dashes throughout."""
    return name.replace("_", "-")


@click.group(
    cls=UserGroup,
    context_settings={
        "token_normalize_func": same_spelling,
        "help_option_names": ["-h", "--help"],
        "max_content_width": 100,
    },
)
@click.version_option(__version__, prog_name="fourfold")
@click.pass_context
def main(context: click.Context) -> None:
    """fourfold: an inference engine for the DeepSeek-V4 model family."""
    check_variables(known_variables(context.command))


def known_variables(command: click.Command) -> set[str]:
    """The environment variables that the flags of a command, or of those below it, have."""
    found: set[str] = set()
    for each in command.commands.values() if isinstance(command, click.Group) else ():
        found |= known_variables(each)
    for parameter in command.params:
        names = parameter.envvar or ()
        found |= {names} if isinstance(names, str) else set(names)
    return found
