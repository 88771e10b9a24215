# Bash completion of saslquotactl.py's commands and options. Install it as
# /etc/bash_completion.d/saslquotactl; it asks saslquotactl.py --help, so it needs no update.

_saslquotactl() {
    local word command="" help current=${COMP_WORDS[COMP_CWORD]} previous=${COMP_WORDS[COMP_CWORD - 1]}
    COMPREPLY=()
    case $previous in
    -c | --rules | --log)
        compopt -o default
        return
        ;;
    --config-dir)
        compopt -o dirnames
        return
        ;;
    esac
    for ((word = 1; word < COMP_CWORD; word++)); do
        case ${COMP_WORDS[word]} in
        -c) ((word++)) ;;
        -*) ;;
        *)
            command=${COMP_WORDS[word]}
            break
            ;;
        esac
    done
    if [[ -z $command && $current != -* ]]; then
        help=$("${COMP_WORDS[0]}" --help 2>/dev/null | sed -n 's/^    \([a-z]\{1,\}\).*/\1/p')
    elif [[ $current == -* ]]; then
        help=$("${COMP_WORDS[0]}" $command --help 2>/dev/null | grep -oE '(^|[[ ,])--?[a-z][a-z-]*' | tr -d '[ ,')
    fi
    mapfile -t COMPREPLY < <(compgen -W "$help" -- "$current")
}

complete -F _saslquotactl saslquotactl.py saslquotactl
