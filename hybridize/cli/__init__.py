"""The command line: one command a verb. It parses, calls and prints; the work is elsewhere.

Exit codes: 0 done, 1 a gate failed, 2 a user's error (one line, no traceback); anything else is a bug.
"""

import sys
import traceback
from types import TracebackType

import typer

from hybridize.cli import export, info, make, measure, publish, recipes, shared, speed, talk  # noqa: F401  each adds its commands
from hybridize.cli.shared import cli
from hybridize.console import Screen
from hybridize.errors import HybridizeError, StoppedError
from hybridize.redact import scrub


def app(arguments: list[str] | None = None) -> int:
    """Run a command; return its exit code. Global flags may stand anywhere."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    flags = [word for word in words if word in ("--json", "--quiet", "-v", "-vv")]
    words = [word for word in words if word not in flags]
    shared.screen = Screen("--json" in flags, "--quiet" in flags, 2 if "-vv" in flags else flags.count("-v"))
    _silence_libraries()
    try:
        # Outside standalone mode the exit code of typer.Exit comes back as the result.
        code = cli(args=words, prog_name="hybridize", standalone_mode=False)
        return code if isinstance(code, int) else 0
    except HybridizeError as error:
        shared.screen.close()
        print(scrub(f"hybridize: {error}"), file=sys.stderr)
        return 2
    except StoppedError as stop:
        shared.screen.close()
        print(f"hybridize: {stop.message}; the same command with --resume goes on", file=sys.stderr)
        return stop.code if isinstance(stop.code, int) else 1
    except (KeyboardInterrupt, typer.Abort):
        shared.screen.close()
        print(f"hybridize: stopped{_way_on(words)}", file=sys.stderr)
        return 130
    except Exception as error:
        return _usage_error(error)
    finally:
        shared.screen.close()


def _way_on(words: list[str]) -> str:
    """How a stopped command goes on; nothing for one that begins again."""
    command = getattr(typer.main.get_command(shared.cli), "commands", {}).get(words[0] if words else "")
    options = {parameter.name for parameter in getattr(command, "params", ())}
    if "resume" in options:
        return "; the same command with --resume goes on"
    return "; what --cache kept is not measured again" if "cache" in options else ""


def _usage_error(error: BaseException) -> int:
    """A wrong option or argument: click's message and exit code. Anything else is a bug and keeps its traceback."""
    show = getattr(error, "format_message", None)
    if show is None:
        raise error
    context = getattr(error, "ctx", None)
    hint = f" Try `{context.command_path} --help`." if context is not None else ""
    # An option in the wrong place may hold a token.
    print(scrub(f"hybridize: {show()}{hint}"), file=sys.stderr)
    return 2


def _silence_libraries() -> None:
    """Libraries' progress bars and advice would drown ours; their warnings stay with -v."""
    if "transformers" in sys.modules:
        from transformers.utils import logging as hf_logging

        hf_logging.disable_progress_bar()
        hf_logging.set_verbosity_error()


def _scrubbed_traceback(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """A bug's traceback, which may quote what a library was given."""
    print(scrub("".join(traceback.format_exception(kind, error, trace))), end="", file=sys.stderr)


def main() -> None:
    """What the `hybridize` script calls."""
    sys.excepthook = _scrubbed_traceback
    sys.exit(app())


if __name__ == "__main__":
    main()
