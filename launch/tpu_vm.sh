#!/usr/bin/env bash
# A TPU VM, one host or a slice of many, or several slices, from creation to deletion; every verb goes on where it was cut off:
#
#     launch/tpu_vm.sh create  NAME ZONE TYPE [--spot | --reserved]   asks for it (a queued resource), waits until it is there
#     launch/tpu_vm.sh install NAME ZONE                              this checkout, on every worker
#     launch/tpu_vm.sh run     NAME ZONE COMMAND...                   starts it on every worker and follows it
#     launch/tpu_vm.sh tail    NAME ZONE                              follows what runs or ran; ends with its exit code
#     launch/tpu_vm.sh stop    NAME ZONE                              SIGTERM: saves and ends with 75
#     launch/tpu_vm.sh status  NAME ZONE                              ACTIVE, WAITING_FOR_RESOURCES, ...; NONE
#     launch/tpu_vm.sh delete  NAME ZONE
#     launch/tpu_vm.sh train   NAME ZONE TYPE [--spot | --reserved] -- COMMAND...
#         all of it: create, install, run; after a preemption or a failure again, at most RESTARTS times; delete at the end
#
# For example `train pod europe-west4-b v5litepod-16 --spot -- cv2jax train speech_tokenizer_base --corpus /mnt/data/prepared
# --workdir /mnt/runs/a`. Paths must be the same and shared on all workers (Filestore, or a bucket mounted with gcsfuse by
# the script in MOUNT, which runs on every worker after each install).
#
# On a worker the command runs under nohup in ~/cv2jax-run, where `log` is its output and `exit`, once it has ended, its
# exit code: it outlives the ssh session and this script. `--dry-run` before the verb prints the commands and runs none.
# From the environment: PROJECT, SLICES (default 1), RUNTIME (default: of the TYPE), RESTARTS (20), WAIT_MINUTES (1440),
# PYTHON_VERSION (3.12, which uv installs there), CV2JAX_* of the command.
set -euo pipefail
cd "$(dirname "$0")/.."

refuse() { echo "tpu_vm.sh: $1" >&2; exit "${2:-2}"; }
note() { echo "tpu_vm.sh: $1" >&2; }

dry=
if [[ ${1:-} == --dry-run ]]; then dry=1; shift; fi
[[ $# -ge 3 ]] || refuse "expected a verb, NAME and ZONE; the first lines of launch/tpu_vm.sh show the verbs"
verb=$1 name=$2 zone=$3
shift 3
[[ -n $dry ]] || command -v gcloud >/dev/null || refuse "gcloud is not installed"
slices=${SLICES:-1} restarts=${RESTARTS:-20} wait_minutes=${WAIT_MINUTES:-1440}
for number in "$slices" "$restarts" "$wait_minutes"; do
    [[ $number =~ ^[0-9]+$ ]] || refuse "SLICES, RESTARTS and WAIT_MINUTES must be whole numbers, not '$number'"
done
[[ $slices -ge 1 ]] || refuse "SLICES=$slices: must be at least 1"
where=(--zone "$zone" --quiet)
[[ -z ${PROJECT:-} ]] || where+=(--project "$PROJECT")
nodes=("$name")
if [[ $slices -gt 1 ]]; then
    nodes=()
    for ((i = 0; i < slices; i++)); do nodes+=("$name-$i"); done
fi

exec 3>&1
show() { printf '%q ' "$@" | sed 's/ $//' >&3; echo >&3; }
perform() { if [[ -n $dry ]]; then show "$@"; else "$@" 3>&-; fi; }
# ask ANSWER COMMAND...: the command's output; ANSWER in a dry run.
ask() {
    local answer=$1
    shift
    if [[ -n $dry ]]; then show "$@"; echo "$answer"; else "$@" 3>&-; fi
}

# ssh_all SCRIPT: on every worker of every slice; fails with the first code that is not 0.
ssh_all() {
    local node code=0
    for node in "${nodes[@]}"; do
        perform gcloud compute tpus tpu-vm ssh "$node" "${where[@]}" --worker=all --command "$1" || code=$?
    done
    return "$code"
}

# state EXPECTED: the queued resource's state, NONE where there is none; EXPECTED in a dry run.
state() {
    local found
    if found=$(ask "$1" gcloud compute tpus queued-resources describe "$name" "${where[@]}" \
        --format "value(state.state)" 2>&1); then
        echo "${found:-UNKNOWN}"
    elif [[ $found == *NOT_FOUND* || $found == *"not found"* ]]; then
        echo NONE
    else
        refuse "the state of $name cannot be asked: ${found##*$'\n'}" 1
    fi
}

runtime_of() {
    case $1 in
    v5litepod-*) echo v2-alpha-tpuv5-lite ;;
    v5p-*) echo v2-alpha-tpuv5 ;;
    v6e-*) echo v2-alpha-tpuv6e ;;
    v2-* | v3-* | v4-*) echo tpu-ubuntu2204-base ;;
    *) refuse "the runtime of $1 is not known here; give it as RUNTIME" ;;
    esac
}

# create TYPE [--spot | --reserved]
create() {
    local type=${1:-} tier=${2:-} runtime found deadline
    [[ -n $type && $type != -* ]] || refuse "create needs a TYPE such as v5litepod-16"
    [[ $tier =~ ^(--spot|--reserved|)$ && $# -le 2 ]] || refuse "behind TYPE only --spot or --reserved, not '${*:2}'"
    runtime=${RUNTIME:-$(runtime_of "$type")} || exit
    found=$(state NONE) || exit
    if [[ $found == NONE ]]; then
        local node=(--node-id "$name")
        [[ $slices -eq 1 ]] || node=(--node-count "$slices" --node-prefix "$name")
        perform gcloud compute tpus queued-resources create "$name" "${where[@]}" --accelerator-type "$type" \
            --runtime-version "$runtime" "${node[@]}" ${tier:+"$tier"} || refuse "$name could not be asked for" 1
    fi
    deadline=$((SECONDS + 60 * wait_minutes))
    while found=$(state ACTIVE) || exit; [[ $found != ACTIVE ]]; do
        case $found in
        FAILED | SUSPEND* | DELETING | NONE) refuse "$name is $found and will not come; \`delete\` it and create it again" 1 ;;
        esac
        [[ $SECONDS -lt $deadline ]] ||
            refuse "$name is still $found after $wait_minutes minutes (WAIT_MINUTES); it stays queued" 1
        note "$name is $found; waiting"
        sleep "${POLL_SECONDS:-30}"
    done
}

delete() {
    perform gcloud compute tpus queued-resources delete "$name" "${where[@]}" --force ||
        refuse "$name could not be deleted" 1
}

install() {
    local version wheel node
    version=$(sed -n 's/^ *version="\(.*\)",$/\1/p' setup.py)
    wheel=cv2jax-$version-py3-none-any.whl
    perform "${PYTHON:-python3}" -m pip wheel --quiet --no-deps --wheel-dir build/wheel .
    for node in "${nodes[@]}"; do
        perform gcloud compute tpus tpu-vm scp "build/wheel/$wheel" "$node:$wheel" "${where[@]}" --worker=all ||
            refuse "the package could not be copied to $node" 1
        [[ -z ${MOUNT:-} ]] ||
            perform gcloud compute tpus tpu-vm scp "$MOUNT" "$node:cv2jax-mount.sh" "${where[@]}" --worker=all ||
            refuse "$MOUNT could not be copied to $node" 1
    done
    # The system Python of TPU images may be older than 3.11, so uv brings its own.
    ssh_all "set -e; python3 -m pip install --quiet --user uv; \
~/.local/bin/uv venv --quiet --clear --python ${PYTHON_VERSION:-3.12} ~/cv2jax-venv; \
~/.local/bin/uv pip install --quiet --python ~/cv2jax-venv/bin/python \"\$HOME/${wheel}[tpu]\"\
${MOUNT:+; bash ~/cv2jax-mount.sh}" ||
        refuse "the package could not be installed on every worker of $name" 1
}

# start COMMAND...: on every worker, in the background.
start() {
    [[ $# -gt 0 ]] || refuse "a COMMAND is missing, for example cv2jax train speech_tokenizer_base --workdir /mnt/runs/a"
    # JAX finds the other workers by itself on a TPU VM; CV2JAX_DISTRIBUTED=1 tells cv2jax to ask it.
    local settings="PATH=~/cv2jax-venv/bin:\$PATH CV2JAX_DISTRIBUTED=1" variable script
    for variable in $(compgen -v CV2JAX_); do
        [[ $variable == CV2JAX_DISTRIBUTED ]] || settings+=" $variable=$(printf %q "${!variable}")"
    done
    script="export $settings; $(printf '%q ' "$@"); echo \$? > exit.new; mv exit.new exit"
    ssh_all "set -e; mkdir -p ~/cv2jax-run; cd ~/cv2jax-run; if kill -0 \$(cat pid 2>/dev/null) 2>/dev/null; \
then echo 'a command is at work here: stop it, or tail it' >&2; exit 2; fi; \
rm -f exit; nohup bash -c $(printf %q "$script") > log 2>&1 < /dev/null & echo \$! > ~/cv2jax-run/pid" ||
        refuse "the command could not be started on every worker of $name (\`stop\` ends what runs)" $?
}

# follow: the first worker's log until its command ends, then the exit code of all: 2 before another failure, that before
# 75, and 0 only if every worker has it; 69 where a worker has none, because it was lost or its command goes on.
follow() {
    local node code=0 codes="" worst=0 lines=+1
    until perform gcloud compute tpus tpu-vm ssh "${nodes[0]}" "${where[@]}" --worker=0 --command \
        "cd ~/cv2jax-run 2>/dev/null || { echo 'nothing was started here' >&2; exit 2; }; \
tail -n $lines --pid \$(cat pid) -F log"; do
        code=$? lines=20
        [[ $code -ne 2 ]] || refuse "there is no command to follow on $name" 2
        note "the log of ${nodes[0]} broke off ($code); the command goes on if the machine does"
        [[ $(state ACTIVE) == ACTIVE ]] || break
        sleep "${POLL_SECONDS:-30}"
    done
    for node in "${nodes[@]}"; do # processes end together, but not in the same second
        codes+=" $(ask 0 gcloud compute tpus tpu-vm ssh "$node" "${where[@]}" --worker=all --command \
            "cd ~/cv2jax-run; for i in \$(seq 120); do [ ! -e exit ] || break; kill -0 \$(cat pid) 2>/dev/null || break; \
sleep 1; done; cat exit 2>/dev/null || echo none")" || codes+=" none"
    done
    for code in $codes; do
        case $code in
        0) ;;
        75) [[ $worst -ne 0 ]] || worst=75 ;;
        69 | *[!0-9]*) [[ $worst -ne 0 && $worst -ne 75 ]] || worst=69 ;;
        *) [[ $worst -eq 2 ]] || worst=$code ;;
        esac
    done
    note "exit codes of the workers: $(tr -s ' \n' ' ' <<<"${codes# }")"
    return "$worst"
}

run() { start "$@"; follow; }

# train TYPE [--spot | --reserved] -- COMMAND...
train() {
    local resource=() code=0 tries=0 found
    while [[ $# -gt 0 && $1 != -- ]]; do resource+=("$1"); shift; done
    [[ ${1:-} == -- && $# -gt 1 ]] || refuse "train needs -- and a COMMAND behind TYPE"
    shift
    while :; do
        create "${resource[@]}"
        install
        code=0
        run "$@" || code=$?
        [[ $code -ne 0 && $code -ne 2 ]] || break
        if [[ $tries -ge $restarts ]]; then
            note "ended with $code after $tries restarts (RESTARTS); $name is kept: look into it, then \`delete\` it"
            return "$code"
        fi
        tries=$((tries + 1))
        found=$(state ACTIVE) || exit
        note "ended with $code and is started again ($tries of at most $restarts); $name is $found"
        [[ $found == ACTIVE || $found == NONE ]] || delete
    done
    delete
    return "$code"
}

case $verb in
create | start | run | train) "$verb" "$@" ;;
install | follow | tail | stop | status | delete)
    [[ $# -eq 0 ]] || refuse "$verb takes nothing behind ZONE, not '$*'"
    case $verb in
    tail) follow ;;
    status) state ACTIVE ;;
    # The wrapper's child: the training process, whose own children end with it.
    stop) ssh_all "pkill -TERM -P \$(cat ~/cv2jax-run/pid)" || refuse "not every worker of $name had a command to stop" 1 ;;
    *) "$verb" ;;
    esac
    ;;
*) refuse "there is no verb '$verb'; the first lines of launch/tpu_vm.sh show them" ;;
esac
