"""``searchrl completion bash``: what the Tab key offers, as a script for the shell.

Hydra's own completion needs ``hydra.main`` and starts Python at every press. All words are known beforehand,
so they stand in the script, which a shell evaluates once when it starts.
"""

from __future__ import annotations

from collections.abc import Sequence

from searchrl.compose import config_folder
from searchrl.config.reference import group_options, sections

_BASH = """\
# Completion of searchrl's commands, settings and options: eval "$(searchrl completion bash)"
_searchrl_words='@words@'
_searchrl() {
    # bash splits words at = as well, so the word is taken from the line itself.
    local line=${COMP_LINE:0:COMP_POINT} word candidate rest head
    local -a before=()
    local -A offered=()
    word=${line##*[[:space:]]}
    read -ra before <<< "${line%"$word"}"
    COMPREPLY=()
    if ((${#before[@]} < 2)); then
        COMPREPLY=($(compgen -W '@commands@' -- "$word"))
        return
    fi
    case ${before[1]} in
        @overriding@) ;;
        completion) COMPREPLY=($(compgen -W bash -- "$word")); return ;;
        *) mapfile -t COMPREPLY < <(compgen -f -- "$word"); compopt -o filenames; return ;;
    esac
    # One level at a time: a key up to its next . or its =, then a whole option.
    for candidate in $_searchrl_words; do
        [[ $candidate == "$word"?* || ( $candidate == "$word" && $word != *= ) ]] || continue
        rest=${candidate#"$word"}
        head=${rest%%[.=]*}
        [[ $word == *=* || $head == "$rest" ]] || candidate=$word$head${rest:${#head}:1}
        offered[$candidate]=1
    done
    COMPREPLY=("${!offered[@]}")
    if [[ $word != *=* ]]; then
        [[ ${#COMPREPLY[@]} == 1 && ${COMPREPLY[0]} == *[.=] ]] && compopt -o nospace
        return
    fi
    if ((${#COMPREPLY[@]} == 0)); then
        mapfile -t COMPREPLY < <(compgen -f -- "${word#*=}")
        compopt -o filenames
    elif [[ $COMP_WORDBREAKS == *=* ]]; then  # to the shell the word begins behind =
        COMPREPLY=("${COMPREPLY[@]#"${word%%=*}="}")
    fi
}
complete -F _searchrl searchrl
"""


def bash(commands: Sequence[str], overriding: Sequence[str]) -> str:
    """The script.

    Args:
        commands: all of the program.
        overriding: those of them that take overrides.
    """
    script = _BASH.replace("@words@", "\n".join(words()))
    return script.replace("@commands@", " ".join(commands)).replace("@overriding@", " | ".join(overriding))


def words() -> list[str]:
    """Everything that an override can begin with: ``key=``, and ``key=option`` where options are known."""
    found = []
    for section in sections():
        for setting in section.settings:
            options = list(setting.options) or (["false", "true"] if setting.type == "bool" else [""])
            found += [f"{setting.key}={option}" for option in options]
    for group, names in group_options(config_folder()).items():
        plus = "+" if group == "experiment" else ""
        found += [f"{plus}{group}={name}" for name in names]
    return sorted(found)
