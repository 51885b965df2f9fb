"""``cmi-lightning completion SHELL``: a script that completes commands and configurations."""

from __future__ import annotations

from cmi_lightning import configs
from cmi_lightning.errors import InputError

BASH = """\
_cmi_lightning() {{
  local word="${{COMP_WORDS[COMP_CWORD]}}" before="${{COMP_WORDS[COMP_CWORD-1]}}"
  if [ "$COMP_CWORD" = 1 ]; then
    COMPREPLY=($(compgen -W "{commands}" -- "$word"))
  elif [ "$before" = -c ] || [ "$before" = --config ]; then
    COMPREPLY=($(compgen -W "{configs}" -- "$word") $(compgen -f -X '!*.yaml' -- "$word"))
  else
    COMPREPLY=($(compgen -f -- "$word"))
  fi
}}
complete -o filenames -F _cmi_lightning cmi-lightning
"""
FISH = """\
complete -c cmi-lightning -n __fish_use_subcommand -f -a "{commands}"
complete -c cmi-lightning -s c -l config -x -a "{configs}"
"""
SCRIPTS = {
    "bash": BASH,
    "zsh": "autoload -U +X bashcompinit && bashcompinit\n" + BASH,
    "fish": FISH,
}


def completion(args: list[str]) -> int:
    """Print the script of a shell: ``source <(cmi-lightning completion bash)``."""
    from cmi_lightning.cli import COMMANDS

    if args[:1] in ([], ["-h"], ["--help"]):
        print(f"usage: source <(cmi-lightning completion {{{','.join(SCRIPTS)}}})")
        return 0
    if args[0] not in SCRIPTS or len(args) > 1:
        raise InputError(f"completion: there is no shell '{args[0]}'; use {', '.join(SCRIPTS)}.")
    words = " ".join([*COMMANDS, "configs"])
    print(SCRIPTS[args[0]].format(commands=words, configs=" ".join(configs.summaries())), end="")
    return 0
