"""The command line: one module a subcommand, each with a `run` that typer reads."""

import os
import sys
from importlib import import_module

import typer

COMMANDS = ("convert", "export", "verify", "inspect", "generate", "serve", "keygen", "demo")

app = typer.Typer(
    name="deepstack-jax",
    help="Qwen3-VL-MoE in JAX. Every command has --help with an example; --debug shows a failure's traceback.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


def main(args: list[str] | None = None) -> None:
    """Runs one command: exit code 0 done, 1 a failure told in one line, 2 a usage error."""
    args = list(sys.argv[1:] if args is None else args)
    debug = "--debug" in args
    args = [arg for arg in args if arg != "--debug"]
    # transformers announces that it found no PyTorch, which it doesn't need here
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    wanted = next((arg for arg in args if not arg.startswith("-")), None)
    # only the command that runs is imported: `--help` answers at once
    for name in COMMANDS if wanted not in COMMANDS else (wanted,):
        app.command(name)(import_module(f"deepstack_jax.cli.{name}").run)
    app.callback()(lambda: None)  # keeps the command's name needed when only one is registered
    try:
        app(args, prog_name="deepstack-jax")
    except KeyboardInterrupt:
        sys.exit(130)
    except Exception as error:
        if debug:
            raise
        from deepstack_jax.processing.sources import one_line

        message = one_line(error)
        expected = isinstance(error, ValueError | OSError)
        print(f"error: {message if expected else f'{type(error).__name__}: {message}'}", file=sys.stderr)
        sys.exit(1)
