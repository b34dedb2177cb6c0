"""The command line: parses, runs a command, and says in one line what went wrong."""

import contextlib
import errno
import io
import os
import sys
import warnings
from collections.abc import Iterator, Sequence
from typing import Any

import tyro

from evalp_fast.commands import (
    Demo,
    Evaluate,
    Info,
    Interrupted,
    Sample,
    TrainClassifier,
    TrainPrior,
    TrainVAE,
    one_line,
)

_SIMPLE: dict[str, Any] = {"sample": Sample, "evaluate": Evaluate, "info": Info, "demo": Demo}
_TRAINING: dict[str, Any] = {"vae": TrainVAE, "prior": TrainPrior, "classifier": TrainClassifier}


def _usage() -> str:
    commands = {**_SIMPLE, **{f"train {name}": kind for name, kind in _TRAINING.items()}}
    lines = [
        "usage: evalp-fast COMMAND [OPTIONS]",
        "",
        "Latent-variable models with energy-based priors.",
        "",
    ]
    lines += [f"  {name:<18}{(kind.__doc__ or '').splitlines()[0]}" for name, kind in commands.items()]
    lines += [
        "",
        "evalp-fast COMMAND --help shows its options; evalp-fast --version shows the version.",
    ]
    return "\n".join(lines)


def _parse(arguments: list[str]) -> Any:
    """The command that the arguments ask for."""
    name = arguments[0]
    if name in _SIMPLE:
        return _cli(_SIMPLE[name], f"evalp-fast {name}", arguments[1:])
    if name != "train":
        raise ValueError(f"unknown command {name!r}: pass one of {', '.join([*_SIMPLE, 'train'])}")
    kinds = ", ".join(_TRAINING)
    if len(arguments) == 1 or arguments[1] not in _TRAINING:
        raise ValueError(f"train needs one of {kinds}" + (f", got {arguments[1]!r}" if arguments[1:] else ""))
    return _parse_training(arguments[1], arguments[2:])


def _parse_training(name: str, arguments: list[str]) -> Any:
    """Two passes: the preset first, then all options with its values as their defaults."""
    program = f"evalp-fast train {name}"
    if name == "classifier":
        from evalp_fast.training.classifier import ClassifierConfig

        default = TrainClassifier(config=ClassifierConfig())
        return _cli(TrainClassifier[ClassifierConfig], program, arguments, default=default)
    from evalp_fast.training.presets import PRIOR_PRESETS, VAE_PRESETS

    presets: dict[str, Any] = dict(VAE_PRESETS if name == "vae" else PRIOR_PRESETS)
    preset = _option(arguments, "--preset", "mnist")
    if preset not in presets:
        raise ValueError(f"preset must be one of {', '.join(presets)}, got {preset!r}")
    config = presets[preset]
    kind = _TRAINING[name]
    needed = {"vae": tyro.MISSING} if name == "prior" else {}
    return _cli(
        kind[type(config)],
        program,
        arguments,
        default=kind(config=config, preset=preset, **needed),
        description=f"{kind.__doc__}\n\nPresets: {', '.join(presets)}. Shown below: the values of {preset}.",
    )


def _option(arguments: Sequence[str], option: str, default: str) -> str:
    value = default
    for at, argument in enumerate(arguments):
        if argument == option and at + 1 < len(arguments):
            value = arguments[at + 1]
        elif argument.startswith(f"{option}="):
            value = argument.partition("=")[2]
    return value


def _cli(kind: Any, program: str, arguments: list[str], **options: Any) -> Any:
    """tyro, with its errors as one line."""
    printed = io.StringIO()
    try:
        with contextlib.redirect_stderr(printed):
            return tyro.cli(kind, prog=program, args=arguments, **options)
    except SystemExit as stop:
        if not stop.code:
            raise
        raise ValueError(_unboxed(printed.getvalue())) from stop


def _unboxed(text: str) -> str:
    """What tyro says in a box, drawn in Unicode or in ASCII, on one line, without its copy of the help."""
    sections: list[str] = [""]
    for line in text.splitlines():
        content = line.strip("│╭╮╰╯─| ")
        if line.startswith("╭"):
            sections += [content, ""]
        elif content.strip("-"):
            sections[-1] += " " + content
        else:
            sections.append("")
    title_and_said = [section.strip() for section in sections if section.strip()]
    kept = [
        part for part in title_and_said[1:] if not part.startswith(("For full helptext", "Argument helptext"))
    ]
    # A suggestion comes with its help text: its name will do.
    kept = [" ".join(s.split()[:4]) + "?" if s.startswith("Perhaps you meant") else s for s in kept]
    return "; ".join(kept) or "these arguments cannot be parsed"


def _explain(error: Exception, arguments: Sequence[str]) -> str | None:
    """An error that a user can do something about, in one line; None for any other."""
    text = one_line(error)
    if isinstance(error, MemoryError) or "out of memory" in text or "can't allocate memory" in text:
        return f"out of memory: lower --batch-size or --proposals ({text[:200]})"
    if isinstance(error, OSError) and error.strerror:
        where = "" if error.filename is None else f"{error.filename}: "
        hint = ""
        if error.errno in (errno.ENOSPC, errno.EDQUOT) and "free some space" not in error.strerror:
            hint = "; free some space or write elsewhere"
        elif error.errno in (errno.EACCES, errno.EROFS, errno.ENOTDIR, errno.EISDIR, errno.EEXIST):
            hint = "; pass another path"
        return f"{where}{error.strerror}{hint}"
    if isinstance(error, OSError | ImportError) or type(error).__name__ == "DivergenceError":
        return text
    if isinstance(error, ValueError | TypeError):
        if type(error) not in (ValueError, TypeError):
            return text  # FileError and DataError say what to do
        words = [a for a in arguments[:2] if a in _SIMPLE or a == "train" or a in _TRAINING]
        return f"{text} (see {' '.join(['evalp-fast', *words, '--help'])})"
    return None


@contextlib.contextmanager
def _short_warnings() -> Iterator[None]:
    """Warnings on one line, without the source line that Python shows."""

    def show(message: Warning | str, *_: Any, **__: Any) -> None:
        print(f"evalp-fast: warning: {' '.join(str(message).split())}", file=sys.stderr)

    with warnings.catch_warnings():
        warnings.showwarning = show
        yield


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; `argv` without the program's name, by default the process's.

    Returns:
        The exit code: 0, 2 for an error that the user can do something about (one line on stderr), 130 for
        Ctrl-C, 1 for a fault of the program.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    words = [argument for argument in arguments if argument not in ("-h", "--help")]
    if words in ([], ["train"]):
        print(_usage())
        return 0 if len(words) < len(arguments) else 2
    if arguments == ["--version"]:
        from evalp_fast import __version__

        print(__version__)
        return 0
    try:
        with _short_warnings():
            _parse(arguments).run()
        sys.stdout.flush()
        return 0
    except BrokenPipeError:  # the reader of a pipe, such as head, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except KeyboardInterrupt as interrupt:
        if "--debug" in arguments:
            raise
        detail = one_line(interrupt) if isinstance(interrupt, Interrupted) else "what was finished stays"
        print(f"evalp-fast: interrupted: {detail}", file=sys.stderr)
        return 130
    except SystemExit as stop:  # --help
        return int(stop.code or 0)
    except Exception as error:
        if "--debug" in arguments:
            raise
        known = _explain(error, arguments)
        if known is not None:
            print(f"evalp-fast: error: {known}", file=sys.stderr)
            return 2
        fault = f"{type(error).__name__}: {one_line(error)} (--debug shows the traceback)"
        print(f"evalp-fast: internal error: {fault}", file=sys.stderr)
        return 1
