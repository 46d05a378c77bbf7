"""The `clsa` program: finds the named command, runs it, and turns errors into exit codes."""

import os
import sys
import traceback

from clsa import __version__
from clsa.cli.command import Command, complain
from clsa.cli.pictures.pack import pack
from clsa.cli.pictures.scenes import scenes
from clsa.cli.show.protocols import protocols
from clsa.cli.show.recipes import recipes
from clsa.cli.train.demo import demo
from clsa.cli.train.extend import extend
from clsa.cli.train.pretrain import pretrain
from clsa.cli.train.replay import replay
from clsa.cli.train.sweep import sweep
from clsa.cli.use.diagnose import diagnose
from clsa.cli.use.digest import digest
from clsa.cli.use.embed import embed
from clsa.cli.use.evaluate import evaluate
from clsa.cli.use.export import export
from clsa.cli.use.predict import predict
from clsa.cli.use.preview import preview
from clsa.options.config import nearest
from clsa.system import slurm
from clsa.system.errors import ClsaError, Exit, memory_errors

COMMANDS: dict[str, Command] = {
    command.__name__: command
    for command in (
        demo, pretrain, extend, evaluate, protocols, predict, diagnose, embed, preview, scenes,
        pack, sweep, recipes, export, digest, replay,
    )
}  # fmt: skip


def main(argv: list[str] | None = None) -> int:
    """Run a command and return its exit code (see `errors.Exit`)."""
    args = list(sys.argv[1:] if argv is None else argv)
    debug = "--debug" in args
    args = [arg for arg in args if arg != "--debug"]
    if args[:1] == ["help"]:
        args = [*args[1:2], "--help"]
    try:
        if not args or args[0] in ("-h", "--help", "--version"):
            print(__version__ if args[:1] == ["--version"] else overview(), flush=True)
            return Exit.OK if args else Exit.USAGE
        if args[0] not in COMMANDS:
            close = nearest(args[0], list(COMMANDS))
            hint = f"did you mean {close}?" if close else f"use one of {', '.join(COMMANDS)}"
            raise ClsaError(f"command {args[0]}", "no such command", hint)
        slurm.require_one_task(args[0])
        with memory_errors():
            COMMANDS[args[0]](args[1:])
        sys.stdout.flush()
    except ClsaError as error:
        if debug:
            traceback.print_exc()
        if slurm.is_first_task() or error.code != Exit.USAGE:
            complain(str(error))
        return error.code
    except KeyboardInterrupt as error:
        why = f"stopped by {error}" if str(error) else "interrupted"
        complain(f"{why} - nothing more was written - run it again")
        return Exit.PREEMPTED
    except BrokenPipeError:  # the reader of our output has closed it, as `head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return Exit.IO
    return Exit.OK


def overview() -> str:
    """What `clsa --help` prints."""
    lines = [f"  {name:9} {(run.__doc__ or '').strip()}" for name, run in COMMANDS.items()]
    return "\n".join(
        [
            "clsa: learn to see from pictures without labels.",
            "",
            "usage: clsa COMMAND [options]      clsa help COMMAND lists the options",
            "       clsa --version              clsa COMMAND --debug: errors with a traceback",
            "",
            *lines,
            "",
            "Start: clsa demo, then: clsa pretrain --data MY/PICTURES --out runs/mine",
        ]
    )
