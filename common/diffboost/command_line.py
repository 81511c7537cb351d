"""Arguments of `diffboost`, looked at before fire reads them."""

import inspect
from collections.abc import Callable, Mapping

from diffboost.knobs import read_flags, refuse_unknown


def split_command(
    arguments: list[str], commands: Mapping
) -> tuple[list[str], Callable | Mapping, list[str]]:
    """The names of a command, what they stand for (more commands, if a name is missing), the rest.

    Args:
        arguments: behind the program's name.
        commands: functions, and mappings of more commands, by name.

    Raises:
        ValueError: there is no such command; names the nearest.

    Source: engineering choice
    """
    names, found = [], commands
    while isinstance(found, Mapping) and arguments and not arguments[0].startswith("-"):
        name, *arguments = arguments
        refuse_unknown({name: "command"}, found, " ".join(["diffboost", *names]))
        names, found = [*names, name], found[name]
    return names, found, arguments


def check_arguments(arguments: list[str], commands: Mapping) -> list[str]:
    """The arguments with yes-or-no flags spelled as fire reads them.

    fire takes `false` for a text, which counts as true, and prints its usage for a misspelt name.

    Args:
        arguments, commands: see ``split_command``.

    Raises:
        ValueError: a command or a flag does not exist (names the nearest), or a yes-or-no flag has
            another value.

    Source: engineering choice
    """
    names, found, rest = split_command(arguments, commands)
    if isinstance(found, Mapping):
        return arguments
    flags = {key.replace("-", "_"): value for key, value in read_flags(rest).items()}
    parameters = inspect.signature(found).parameters
    refuse_unknown(flags, [*parameters, "help"], " ".join(["diffboost", *names]))
    switches = {name for name, parameter in parameters.items() if parameter.annotation is bool}
    words = []
    for word in rest:
        before = words[-1] if words else ""
        if word.startswith("--") and "=" in word:
            flag, _, value = word.partition("=")
            words.append(f"{flag}={_spell(flag, value, switches)}")
        elif before.startswith("--") and "=" not in before and not word.startswith("-"):
            words.append(_spell(before, word, switches))
        else:
            words.append(word)
    return [*names, *words]


def _spell(flag: str, value: str, switches: set[str]) -> str:
    """The value of a flag, True or False where it is one of the switches."""
    name = flag.removeprefix("--").replace("-", "_")
    if name not in switches:
        return value
    if value.lower() not in ("true", "false"):
        raise ValueError(f"{name}: {value!r}; allowed: True, False")
    return value.title()
