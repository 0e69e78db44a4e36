"""``blip3o-fast COMMAND``: each command is a module of this package, with ``run(args) -> int``.

What it takes is in the module of the same name in ``blip3o_fast.options``. Only that of the command
that was typed is imported, and the command itself, which needs torch, when all flags are right.

Exit status: 0 done, 1 failed with one line that says why, 2 bad arguments, 130 interrupted,
143 stopped by SIGTERM after saving.
"""

# PYTHON_ARGCOMPLETE_OK (argcomplete looks for these words where it is active for all programs)

import argparse
import importlib
import os
import sys
from collections.abc import Mapping, Sequence

from blip3o_fast import __version__
from blip3o_fast.checked import question
from blip3o_fast.errors import OptionError
from blip3o_fast.flags import Help
from blip3o_fast.untrusted import one_line

COMMANDS = {
    "demo": "real photos to a trained translator and its report, on any machine",
    "train": "train a model on shards of paired embeddings",
    "evaluate": "measure a model beside its baselines, and write a report",
    "fit-solver": "fit solvers of few evaluations to a model",
    "generate": "translate a directory of EVA shards into CLIP shards",
    "extract": "turn images into shards of paired embeddings",
    "convert": "read published pickles and other formats into shards",
    "bench": "time the library against its limits and its peers",
    "doctor": "show what would run here, and why",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit status."""
    argv = list(sys.argv[1:] if argv is None else argv)
    completing = "_ARGCOMPLETE" in os.environ  # the place of our name in a line that is being typed
    if completing:
        argv = os.environ["COMP_LINE"].split()[int(os.environ["_ARGCOMPLETE"]) :]
    chosen = next((word for word in argv if not word.startswith("-")), None)
    parsers: dict[str, argparse.ArgumentParser] = {}
    parser = argparse.ArgumentParser(
        prog="blip3o-fast",
        description="EVA-CLIP patch embeddings to CLIP patch embeddings by rectified flow.",
        epilog="blip3o-fast COMMAND --help explains every option with its default and unit.",
    )
    parser.add_argument("--version", action="version", version=f"blip3o-fast {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    answers: dict[str, str] = {}
    for name, summary in COMMANDS.items():
        parsers[name] = command = commands.add_parser(
            name,
            help=summary,
            description=summary[0].upper() + summary[1:] + ".",
            formatter_class=Help,
        )
        if name == chosen:
            options = importlib.import_module(f"blip3o_fast.options.{module_name(name)}")
            options.add_arguments(command)
            answers = getattr(options, "ANSWERS", answers)
    if completing:
        import argcomplete  # pyright: ignore[reportMissingImports]

        argcomplete.autocomplete(parser)  # answers the shell and ends the process
    if chosen is not None and chosen not in COMMANDS:
        hint = question(chosen, COMMANDS) or f"; choose from {', '.join(COMMANDS)}"
        parser.error(f"unknown command {chosen!r}{hint}")
    if chosen is not None:
        refuse_unknown_flags(parsers[chosen], argv[argv.index(chosen) + 1 :], answers)
    args, surplus = parser.parse_known_args(argv)
    if surplus:
        parsers[args.command].error(f"unrecognized arguments: {' '.join(surplus)}")
    module = importlib.import_module(f"blip3o_fast.cli.{module_name(args.command)}")
    return guarded(lambda: module.run(args), f"blip3o-fast {args.command}")


def refuse_unknown_flags(
    parser: argparse.ArgumentParser, words: Sequence[str], answers: Mapping[str, str]
) -> None:
    """Exit if ``words`` hold a long flag that ``parser`` lacks, with the nearest or its answer.

    Before parsing, because argparse would only say that the flag meant is missing.
    """
    flags = parser._option_string_actions  # pyright: ignore[reportPrivateUsage]
    typed = {word: word.partition("=")[0] for word in words if word.startswith("--")}
    unknown = {w: flag for w, flag in typed.items() if not any(f.startswith(flag) for f in flags)}
    if unknown:
        hints = (
            f"; {answers[flag]}" if flag in answers else question(flag, flags)
            for flag in unknown.values()
        )
        hint = next(filter(None, hints), "")
        parser.error(f"unrecognized arguments: {' '.join(unknown)}{hint}")


def module_name(command: str) -> str:
    """The name of a command's two modules."""
    return command.replace("-", "_")


def guarded(body, name: str) -> int:  # noqa: ANN001
    """Run ``body``; turn errors that a user can fix into one line and an exit status.

    Any other error is a defect of the library and keeps its traceback.
    """
    try:
        return body()
    except OptionError as error:
        return _report(name, error, 2)
    except (ValueError, OSError, ImportError, MemoryError) as error:
        return _report(name, error, 1)
    except KeyboardInterrupt:
        print(f"{name}: interrupted", file=sys.stderr)
        return 130


def _report(name: str, error: BaseException, status: int) -> int:
    message = one_line(str(error)) or type(error).__name__
    print(f"{name}: error: {message}", file=sys.stderr)
    return status


if __name__ == "__main__":
    sys.exit(main())
