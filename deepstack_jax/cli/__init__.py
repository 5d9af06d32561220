"""The command line: one module per subcommand, with a `run` that typer reads, or several of them in `COMMANDS`."""

import functools
import os
import sys
from collections.abc import Callable
from importlib import import_module
from inspect import Parameter, signature
from typing import Annotated, Any

import typer

from deepstack_jax.cli import compile_cache, preflight

COMMANDS = ("convert", "export", "verify", "inspect", "plan", "generate", "serve", "bench", "keygen", "demo")
COMPILING = ("verify", "generate", "serve", "demo", "bench decode")
HELP = "Qwen3-VL-MoE in JAX. Every command has --help with an example; --debug shows a failure's traceback."


def main(args: list[str] | None = None) -> None:
    """Runs one command: exit code 0 done, 1 a failure told in one line, 2 a usage error."""
    is_own = args is None  # the whole process is this command
    if is_own and "verify" not in sys.argv:
        # a process of its own: where PyTorch is installed, transformers would import it, which takes seconds and 600 MB
        sys.modules.setdefault("torch", None)  # type: ignore[arg-type]
    args = list(sys.argv[1:] if args is None else args)
    # transformers announces that it found no PyTorch, which it doesn't need here
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    given = {"debug": False}
    try:
        if "--help" not in args:
            preflight.check(_wanted(args))
        _app(args)(args, prog_name="deepstack-jax", obj=given)
    except KeyboardInterrupt:
        sys.exit(130)
    except SystemExit:
        raise
    except BaseException as error:  # a panic of a library in Rust is not an Exception
        if given["debug"]:
            raise
        print(f"error: {_line_of(error)}", file=sys.stderr)
        if is_own:
            _exit_at_once()
        sys.exit(1)


def _exit_at_once() -> None:
    """Ends the process after a failure: Python's own exit joins threads, and a library's may then wait for ever.

    Returns where no such library was imported, or JAX has to part from the other processes of a mesh.
    """
    jax = sys.modules.get("jax")
    if jax is not None and hasattr(jax, "distributed") and not jax.distributed.is_initialized():
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(1)


def _line_of(error: BaseException) -> str:
    from deepstack_jax.errors import REMEDIES, one_line, shortage

    message = one_line(error)
    if lacking := shortage(error):
        return f"this process ran out of {lacking} ({message}): {REMEDIES[lacking]}"
    return message if isinstance(error, ValueError | OSError) else f"{type(error).__name__}: {message}"


def _app(args: list[str]) -> typer.Typer:
    app = typer.Typer(
        name="deepstack-jax", help=HELP, no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False
    )
    wanted = _wanted(args)
    # only the command that runs is imported: `--help` answers at once
    for name in COMMANDS if wanted not in COMMANDS else (wanted,):
        module = import_module(f"deepstack_jax.cli.{name}")
        if not hasattr(module, "COMMANDS"):
            app.command(name)(_command(module.run, name in COMPILING))
            continue
        group = typer.Typer(help=module.HELP, no_args_is_help=True)
        for part, run in module.COMMANDS.items():
            group.command(part)(_command(run, f"{name} {part}" in COMPILING))
        app.add_typer(group, name=name)

    def options(debug: Debug = False, version: Version = False) -> None: ...

    app.callback()(options)  # also keeps the command's name needed when only one is registered
    return app


def _wanted(args: list[str]) -> str | None:
    return next((arg for arg in args if not arg.startswith("-")), None)


def _show_debug(context: typer.Context, debug: bool) -> None:
    context.obj["debug"] |= debug


def _show_version(version: bool) -> None:
    if version:
        import deepstack_jax

        print(f"deepstack-jax {deepstack_jax.__version__}")
        raise typer.Exit


Debug = Annotated[bool, typer.Option("--debug", callback=_show_debug, help="show a failure's traceback")]
Version = Annotated[bool, typer.Option("--version", callback=_show_version, is_eager=True, help="show the version")]
CompileCache = Annotated[str | None, typer.Option(metavar="DIR", help=compile_cache.HELP)]


def _command(run: Callable[..., None], is_compiling: bool) -> Callable[..., None]:
    """`run` with the options that every command has, after its own."""

    @functools.wraps(run)
    def command(**given: Any) -> None:
        del given["debug"]  # its callback has taken it
        if is_compiling:
            compile_cache.use(given.pop("compile_cache"))
        run(**given)

    common = [Parameter("debug", Parameter.KEYWORD_ONLY, default=False, annotation=Debug)]
    if is_compiling:
        common.append(Parameter("compile_cache", Parameter.KEYWORD_ONLY, default=None, annotation=CompileCache))
    own = signature(run)
    command.__signature__ = own.replace(parameters=[*own.parameters.values(), *common])  # type: ignore
    return command
