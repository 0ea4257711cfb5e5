"""The ``deltaops`` command: one file a subcommand; heavy packages are imported when one runs."""

from __future__ import annotations

import sys

import typer
from rich.console import Console

from deltaops.errors import DeltaopsError

from .bench import bench
from .combine import combine
from .compare import compare
from .convert import convert
from .demo import demo
from .doctor import doctor
from .inspect import inspect
from .intrinsic import intrinsic
from .search import search
from .suggest import suggest
from .traffic import traffic
from .tune import tune
from .tune_kernels import tune_kernels

app = typer.Typer(
    name="deltaops",
    help="Delta tuning at the speed of the frozen layers it sits on: LoRA (DoRA, PiSSA, OLoRA), "
    "adapters, Compacter, prefixes, prompts, few intrinsic numbers, BitFit, (IA)³, LN tuning, and "
    "several of them at once.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
)
for command in (
    demo,
    tune,
    compare,
    convert,
    combine,
    inspect,
    doctor,
    bench,
    tune_kernels,
    traffic,
    suggest,
):
    app.command()(command)
app.add_typer(intrinsic, name="intrinsic")
app.add_typer(search, name="search")


@app.callback()
def _options(
    debug: bool = typer.Option(False, "--debug", help="Show the traceback of an error."),
) -> None:
    pass  # main() reads --debug: an error may come before typer has parsed anything


def main() -> None:
    """Run the command. An error that deltaops foresaw is a message and exit code 2."""
    try:
        app()
    except DeltaopsError as error:
        if "--debug" in sys.argv:
            raise
        Console(stderr=True).print(f"[bold red]error[/]  {_plain(str(error))}", soft_wrap=True)
        sys.exit(2)


def _plain(text: str) -> str:
    """Text in which rich finds no markup: messages quote file names and shapes in brackets."""
    from rich.markup import escape

    return escape(text)
