# Shared by .ci/run and .ci/full: a fresh virtual environment, the README's commands, timed stages, one last line.
# Sourced from the root of the repository.

exec </dev/null
export CI=true JAX_PLATFORMS=cpu MPLBACKEND=agg
export PIP_QUIET=2 PIP_NO_INPUT=1 PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_ROOT_USER_ACTION=ignore
# libtpu compiles for TPUs on a machine that has none; several test processes may load it at once.
export TPU_SKIP_MDS_QUERY=1 ALLOW_MULTIPLE_LIBTPU_LOAD=1
unset PYTHONPATH PYTHONHOME

scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
timings=()
passed=0
failed=0

# fresh_environment NAME: makes an empty virtual environment and puts it first on PATH.
fresh_environment() {
    "${PYTHON:-python3}" -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed: set PYTHON")' || return
    "${PYTHON:-python3}" -m venv "$scratch/$1" || return
    export VIRTUAL_ENV="$scratch/$1" PATH="$scratch/$1/bin:$PATH"
    hash -r
}

# readme_command NAME: prints the ```bash block that follows `<!-- NAME-command -->` in README.md.
readme_command() {
    local block
    block=$(awk -v mark="<!-- $1-command -->" '
        $0 == mark { found = 1 }
        found && /^```$/ { exit }
        inside { print }
        found && /^```bash$/ { inside = 1 }' README.md)
    [[ -n $block ]] || { echo "README.md has no \`\`\`bash block behind <!-- $1-command -->" >&2; return 1; }
    printf '%s\n' "$block"
}

# from_readme NAME: runs that block as it stands there.
from_readme() {
    local block
    block=$(readme_command "$1") || return
    printf '%s\n' "$block"
    bash -euo pipefail -c "$block"
}

# install_official: the extra [official] with PyTorch's CPU build, where an index or a folder that pip knows has it (one more
# index can be given in TORCH_INDEX). Pinned: a range would take a CUDA build of gigabytes.
install_official() {
    python -m pip install torch==2.13.0 ${TORCH_INDEX:+--extra-index-url "$TORCH_INDEX"} || return
    python -m pip install -e '.[official]'
}

# stage NAME COMMAND...: runs and times a command; a failure is counted, and the other stages still run.
stage() {
    local name=$1 start=$SECONDS outcome=passed
    shift
    printf '\n===== %s\n' "$name"
    if "$@"; then passed=$((passed + 1)); else outcome="FAILED ($?)" failed=$((failed + 1)); fi
    timings+=("$(printf '%-12s %5d s  %s' "$name" $((SECONDS - start)) "$outcome")")
}

# finish: prints the timings and ends with a line like pytest's.
finish() {
    printf '\n===== stages\n'
    printf '%s\n' "${timings[@]}"
    if [[ $failed -gt 0 ]]; then
        echo "===== $failed failed, $passed passed in ${SECONDS}s ====="
        exit 1
    fi
    echo "===== $passed passed in ${SECONDS}s ====="
}
