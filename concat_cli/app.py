"""The command line: `concat`. Heavy packages are imported inside the commands only."""

from __future__ import annotations

import errno
import os
import signal
import sys
import traceback
from collections.abc import Generator
from contextlib import contextmanager, suppress
from functools import cached_property
from pathlib import Path
from types import FrameType
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from concat_cli import __version__
from concat_cli.commands import train, weights
from concat_cli.commands.compare import compare
from concat_cli.commands.doctor import doctor
from concat_cli.commands.evaluate import evaluate
from concat_cli.commands.export import export
from concat_cli.commands.options import epilog, say_repeats
from concat_cli.commands.predict import predict
from concat_cli.commands.report import report
from concat_cli.commands.serve import serve
from concat_cli.commands.texts import texts
from concat_cli.console import LAUNCHED, is_verbose, level_kept, rank, show_error, shown
from concat_cli.core.errors import Stopped, UserError, exit_code
from concat_cli.core.files import write_error

_USAGE: Any = typer.BadParameter.__mro__[1]  # what all errors of the parser are


@contextmanager
def _escaped() -> Generator[None]:
    """The parser's own errors repeat what was typed, which is shown as a terminal may have it."""
    try:
        yield
    except _USAGE as error:
        error.message = shown(error.message)
        raise


class _InOrder(TyperGroup):
    """The commands in the order in which one comes to use them."""

    def get_params(self, ctx: Any) -> list[Any]:
        """Those for a shell's completion are not listed: they are used once."""
        found: list[Any] = super().get_params(ctx)
        for one in found:
            one.hidden = one.hidden or one.name in ("install_completion", "show_completion")
        return found

    def list_commands(self, ctx: Any) -> list[str]:
        """As they were registered; groups, which Typer puts last, after the first."""
        first, *others = super().list_commands(ctx)
        groups = ("weights", "prepare-data")
        return [first, *groups, *(name for name in others if name not in groups)]

    def make_context(self, *given: Any, **how: Any) -> Any:
        """As the parser makes it."""
        with _escaped():
            return super().make_context(*given, **how)

    def invoke(self, ctx: Any) -> Any:
        """Runs the command, whose own words are parsed here."""
        with _escaped():
            return super().invoke(ctx)

    def get_help_option(self, ctx: Any) -> Any:
        """Not listed, or the help would not fit one screen: its first line tells of it."""
        option = super().get_help_option(ctx)
        if option is not None:
            option.hidden = True
        return option


class _PrepareData(TyperGroup):
    """The commands of `prepare-data`, whose recipes are imported for them alone."""

    @cached_property
    def _loaded(self) -> TyperGroup:
        from concat_cli.commands import data

        say_repeats(data.app)
        return typer.main.get_group(data.app)

    def list_commands(self, ctx: Any) -> list[str]:
        """The world of shapes first, then the recipes."""
        return self._loaded.list_commands(ctx)

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        """A command by its name; None where there is none."""
        return self._loaded.get_command(ctx, cmd_name)


app = typer.Typer(
    cls=_InOrder,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["--help", "-h"]},
)
_COMMANDS = {
    "predict": predict,
    "serve": serve,
    **train.training_commands(),
    "evaluate": evaluate,
    "report": report,
    "compare": compare,
    "export": export,
    "texts": texts,
    "doctor": doctor,
}
_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EPERM, errno.EROFS, errno.EMFILE)
_MEMORY_HINT = (
    "Lower one of: optim.per_device (images at a time), data.crop, model.queries, loss.points; "
    "for evaluate and predict: infer.batch, infer.max_size."
)
_GONE = UserError(
    "Another process of this group has ended, so this one cannot go on.",
    "The same command goes on from the last saved step.",
)

app.add_typer(weights.app, name="weights", epilog=epilog("weights"))
app.add_typer(
    typer.Typer(cls=_PrepareData, rich_markup_mode="rich", no_args_is_help=True),
    name="prepare-data",
    help="Draw the built-in world, or check a data set on disk.",
    epilog=epilog("prepare-data"),
)
for _name, _function in _COMMANDS.items():
    app.command(_name, epilog=epilog(_name))(_function)
say_repeats(app)


def _version(asked: bool) -> None:
    if asked:
        typer.echo(f"concat {__version__}")
        raise typer.Exit


@app.callback(
    help=f"Zero-shot panoptic and semantic segmentation ({__version__}; --help, --version).",
    epilog=epilog(""),
    invoke_without_command=True,
)
def concat(
    context: typer.Context,
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, hidden=True)
    ] = False,
) -> None:
    """What `concat` alone does."""
    if context.invoked_subcommand is None:
        typer.echo(context.get_help())


def main(argv: list[str] | None = None) -> int:
    """Runs a command line; see `_main`."""
    with level_kept():
        return _main(argv)


def _main(argv: list[str] | None) -> int:
    """The exit code is 0, 1 (a fault of ours), 2 (a mistake), 130 (^C) or 143
    (SIGTERM)."""
    # OpenMP threads that spin while they wait make everything slow on a machine that is shared
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    try:
        with _signals_raise():
            app(argv, prog_name="concat")
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else int(end.code is not None)
    except (Stopped, KeyboardInterrupt) as stop:
        if not rank():
            typer.echo(
                "stopped; the same command goes on from what was last saved, where it saves "
                "anything",
                err=True,
            )
        return exit_code(stop)
    except Exception as error:
        mistake = _as_user_error(error)
        if os.environ.get("CONCAT_DEBUG"):
            raise
        if is_verbose() and mistake is not None:
            traceback.print_exc()
        if mistake is None and _is_of_another_process(error):
            if not rank() and LAUNCHED not in os.environ:
                show_error(_GONE)
            return 1
        if mistake is None:
            raise
        show_error(mistake)
        return 2
    finally:  # leaves the process group of `torchrun`, if a command joined it
        distributed = sys.modules.get("concat_cli.core.train.distributed")
        if distributed is not None and "WORLD_SIZE" in os.environ:
            distributed.leave()
    return 0


@contextmanager
def _signals_raise() -> Generator[None]:
    """Both signals end the work as an error would, so that what is half done is cleared away."""

    def stop(number: int, _: FrameType | None) -> None:
        raise Stopped(number)

    before: dict[int, Any] = {}
    with suppress(ValueError):  # not in the main thread: nobody sends us signals there
        for number in (signal.SIGTERM, signal.SIGINT):
            before[number] = signal.signal(number, stop)
    try:
        yield
    finally:
        for number, previous in before.items():
            signal.signal(number, previous)


def _is_of_another_process(error: Exception) -> bool:
    """Whether this process lost another one of its group, which has said why or was killed."""
    if "WORLD_SIZE" not in os.environ or not isinstance(error, RuntimeError):
        return False
    from torch.distributed import DistError  # NCCL's, and those of the store; gloo's have no type

    return isinstance(error, DistError) or "/gloo/" in str(error)


def _as_user_error(error: Exception) -> UserError | None:
    """What the user can do something about: mistakes, a full disk, missing rights, no memory."""
    if isinstance(error, UserError):
        return error
    if isinstance(error, OSError) and error.errno in _DISK:
        return write_error(Path(error.filename or "."), error)
    short = "out of memory" in str(error).lower() or "can't allocate memory" in str(error)
    if isinstance(error, MemoryError) or (isinstance(error, RuntimeError) and short):
        return UserError(f"Out of memory: {str(error).splitlines()[0][:160]}", _MEMORY_HINT)
    return None
