#!/usr/bin/env bash
# Installs this checkout on every worker of a TPU VM (a pod slice has many) and runs one command on all of them:
#
#     launch/tpu_vm.sh install NAME ZONE
#     launch/tpu_vm.sh run NAME ZONE cv2jax train speech_tokenizer_base --corpus /mnt/data/prepared --workdir /mnt/runs/a
#
# Paths must be the same and shared on all workers (Filestore, or a bucket mounted with gcsfuse). PROJECT may name the
# Google Cloud project, PYTHON_VERSION (default 3.12) the Python that uv installs there.
set -euo pipefail
cd "$(dirname "$0")/.."

refuse() { echo "tpu_vm.sh: $1; usage: launch/tpu_vm.sh install NAME ZONE | run NAME ZONE COMMAND..." >&2; exit 2; }

[[ $# -ge 3 ]] || refuse "expected a verb, NAME and ZONE"
verb=$1 name=$2 zone=$3
shift 3
command -v gcloud >/dev/null || refuse "gcloud is not installed"
where=(--zone "$zone" --worker=all)
[[ -z ${PROJECT:-} ]] || where+=(--project "$PROJECT")

on_all_workers() { gcloud compute tpus tpu-vm ssh "$name" "${where[@]}" --command "$1"; }

case $verb in
install)
    [[ $# -eq 0 ]] || refuse "install takes nothing behind ZONE"
    wheels=$(mktemp -d)
    trap 'rm -rf "$wheels"' EXIT
    "${PYTHON:-python3}" -m pip wheel --quiet --no-deps --wheel-dir "$wheels" .
    wheel=$(basename "$wheels"/cv2jax-*.whl)
    gcloud compute tpus tpu-vm scp "$wheels/$wheel" "$name:$wheel" "${where[@]}"
    # The system Python of TPU images may be older than 3.11, so uv brings its own.
    on_all_workers "set -e; python3 -m pip install --quiet --user uv; \
~/.local/bin/uv venv --quiet --clear --python ${PYTHON_VERSION:-3.12} ~/cv2jax-venv; \
~/.local/bin/uv pip install --quiet --python ~/cv2jax-venv/bin/python \"\$HOME/$wheel[tpu]\""
    ;;
run)
    [[ $# -gt 0 ]] || refuse "run needs a COMMAND behind ZONE"
    # JAX finds the other workers by itself on a TPU VM; CV2JAX_DISTRIBUTED=1 tells cv2jax to ask it.
    on_all_workers "export PATH=~/cv2jax-venv/bin:\$PATH CV2JAX_DISTRIBUTED=1; $(printf '%q ' "$@")"
    ;;
*) refuse "there is no verb '$verb'" ;;
esac
