"""What all scripts share with their user: reading options, and saying in one line what is wrong.

Options come from a dataclass through tyro (https://github.com/brentyi/tyro): --name=value or --name value, underscores
or dashes, --help. A TOML file of the same names can come first; the command line overrides it.
"""

import dataclasses
import difflib
import os
import signal
import sys
import tomllib
import typing
from pathlib import Path

import tyro

WORDS = {"true": True, "false": False}
NOT_FINITE = 3  # exit status by which ablate.py knows a run that diverged


# What nanoGPT's options are here, where no likeness of names would lead there.
NANOGPT = dict(
    batch_size="batch_tokens (batch_size * block_size * gradient_accumulation_steps)",
    gradient_accumulation_steps="batch_tokens, of a whole step, and micro_batch",
    init_from="resume",
    dataset="data",
    max_iters="max_steps",
    eval_iters="eval_tokens",
    lr_decay_iters="decay_steps",
    decay_lr="min_lr (1 for a constant rate)",
    start="prompt",
)


def nearest(name, known):
    if NANOGPT.get(name, "").split(" ")[0].rstrip(",") in known:
        return f"did you mean {NANOGPT[name]}?"
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    return f"did you mean {close[0]}?" if close else f"the options are {', '.join(known)}"


def load_toml(path, what="configuration"):
    """What is in a TOML file; ValueError if there is none, naming its neighbours, or if it is damaged."""
    try:
        with open(path, "rb") as file:
            return tomllib.load(file)
    except FileNotFoundError:
        others = sorted(str(p) for p in Path(path).parent.glob("*.toml"))
        raise ValueError(f"no {what} {path}; there are: {', '.join(others) or 'none in its folder'}") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not valid TOML: {error}") from None


def check_names(names, known, where, what="option"):
    """ValueError for the first of the names that is not known."""
    for name in names:
        if name not in known:
            raise ValueError(f"{where}: unknown {what} {name}; {nearest(name, known)}")


def read_toml(path, known):
    """The options of a TOML file as command-line arguments, so that both are checked by the same parser."""
    options = load_toml(path)
    check_names(options, known, path)
    return as_arguments(options)


def as_arguments(options):
    """A dictionary of options as command-line arguments."""
    arguments = []
    for key, value in options.items():
        arguments += [f"--{key}", *map(str, value)] if isinstance(value, list) else [f"--{key}={value}"]
    return arguments


def parse(kind, arguments, toml=False):
    """Make a `kind`, a dataclass, of command-line arguments; with toml=True the first may name a TOML file.

    Booleans may be bare flags (--resume, --no-resume) or --resume=True. Raises ValueError for names that do not exist;
    values of the wrong type make tyro print what it expects and exit with status 2.
    """
    fields = {field.name: field for field in dataclasses.fields(kind)}
    arguments = list(arguments)
    if toml and arguments and not arguments[0].startswith("-"):
        arguments = read_toml(arguments.pop(0), fields) + arguments
    cleaned = []
    while arguments:
        argument = arguments.pop(0)
        name, equals, value = argument.removeprefix("--").partition("=")
        name = name.replace("-", "_")
        if not argument.startswith("--") or name == "help" or (name.startswith("no_") and name[3:] in fields):
            cleaned.append(argument)
            continue
        if name not in fields:
            raise ValueError(f"unknown option --{name}; {nearest(name, fields)}")
        flag, several = fields[name].type is bool, typing.get_origin(fields[name].type) is tuple
        if not equals and arguments and not several and (not flag or arguments[0].lower() in WORDS):
            value, equals = arguments.pop(0), "="
        if flag and equals:
            if value.lower() not in WORDS:
                raise ValueError(f"--{name} is True or False, got {value!r}")
            argument = f"--{name}" if WORDS[value.lower()] else f"--no_{name}"
        elif equals:
            # A choice among words that includes "true" takes True too: --compile=False is what people type.
            wordy = "true" in typing.get_args(fields[name].type)
            argument = f"--{name}={value.lower() if wordy else value}"
        cleaned.append(argument)
    return tyro.cli(kind, args=cleaned)


def stop_signals():
    """The signals by which we are asked to stop: that of a terminal that closes too, unless nohup is to outlive it."""
    signals = [signal.SIGTERM, signal.SIGINT]
    if hasattr(signal, "SIGHUP") and signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:  # Windows has none
        signals.append(signal.SIGHUP)
    return signals


def read_text(path):
    """The text of a file; ValueError if it is not UTF-8."""
    try:
        return Path(path).read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text ({error.reason} at byte {error.start})") from None


def write_text(path, text):
    """Write a file whole or not at all, in a folder that is made if missing."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{os.getpid()}.{path.name}")
    try:
        temporary.write_text(text, encoding="utf-8")
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def run(main):
    """Call main(sys.argv[1:]); a person's mistake ends in one line on standard error and exit status 1, a loss that is
    not finite in the same and NOT_FINITE.

    SPLINEGPT_TRACEBACK=1 shows where it was raised, for whoever suspects the mistake is ours.
    """
    try:
        sys.exit(main(sys.argv[1:]))
    except BrokenPipeError:  # whoever read our output has had enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except (ValueError, OSError, FloatingPointError) as error:
        if os.environ.get("SPLINEGPT_TRACEBACK"):
            raise
        print(f"{Path(sys.argv[0]).name}: {error}", file=sys.stderr)
        sys.exit(NOT_FINITE if isinstance(error, FloatingPointError) else 1)
    except KeyboardInterrupt:
        sys.exit(130)
