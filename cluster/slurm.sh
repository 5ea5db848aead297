#!/usr/bin/env bash
# Collects one run on N whole nodes of a SLURM cluster, with all their GPUs, as one Ray cluster:
#
#     sbatch --nodes=4 --gpus-per-node=8 cluster/slurm.sh --out /shared/runs/olmoe --model … --data …
#
# All arguments are passed to `collector collect`. The same command resumes a run; shortly before the time limit the
# job stops cleanly and requeues itself. Environment variables: VENV (with the pinned packages, visible to all nodes),
# HF_HOME (model cache), HEAD_IP (if the other nodes cannot reach the first address of the first node), MAX_RESTARTS.
#
# `ray symmetric-run` fails on a node where Ray is already running, and its `ray stop` would end the Ray of every
# other job of the same user there, so nodes are exclusive. To share nodes with other jobs, use slurm-array.sh.

#SBATCH --job-name=moe-routing
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --exclusive
#SBATCH --no-kill
#SBATCH --time=12:00:00
#SBATCH --signal=B:USR1@120
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.log

set -euo pipefail

: "${SLURM_JOB_ID:?submit this script with sbatch}"
# SLURM runs a copy of this file, so the checkout is the folder in which the job was submitted.
export PATH="${VENV:-$SLURM_SUBMIT_DIR/.venv}/bin:$PATH"
export HF_HOME="${HF_HOME:-/tmp/hf-$USER}"
# Ray creates sockets below this folder, and their paths must not exceed 107 characters.
export RAY_TMPDIR="/tmp/ray-$SLURM_JOB_ID"

# Without a token, anyone who can reach Ray's ports could run code in this job. It is in the environment, because
# other users of a node can see command lines.
RAY_AUTH_TOKEN="$(head --bytes=32 /dev/urandom | od -An -vtx1 | tr -d ' \n')"
export RAY_AUTH_MODE=token RAY_AUTH_TOKEN
export RAY_SYMMETRIC_RUN_CLUSTER_WAIT_TIMEOUT="${RAY_SYMMETRIC_RUN_CLUSTER_WAIT_TIMEOUT:-300}"
# srun does not inherit the number of cores per task from sbatch.
export SRUN_CPUS_PER_TASK="${SLURM_CPUS_PER_TASK:-$SLURM_CPUS_ON_NODE}"

# Ray's fixed ports, four per job: 20000 – 31999 is below the ports that Linux uses for outgoing connections.
port=$((20000 + 4 * (SLURM_JOB_ID % 3000)))
# An address, because on many nodes the own name resolves to 127.0.1.1. The batch script runs on the first node.
head_ip="${HEAD_IP:-$(hostname -I | cut -d ' ' -f 1)}"

state="$(mktemp -d)"
trap 'rm -rf "$state"' EXIT

model=demo revision=
arguments=("$@")
for ((i = 0; i < $#; i++)); do
    case "${arguments[i]}" in
        --model) model="${arguments[i + 1]:-}" ;;
        --model=*) model="${arguments[i]#*=}" ;;
        --revision) revision="${arguments[i + 1]:-}" ;;
        --revision=*) revision="${arguments[i]#*=}" ;;
    esac
done
if [[ "$model" == */* && ! -d "$model" && -z "${HF_HUB_OFFLINE:-}" ]]; then
    # Once per node, before all its replicas ask for the same files at once.
    srun --ntasks-per-node=1 hf download "$model" ${revision:+--revision "$revision"} > /dev/null
fi

# The first node starts the head and then the command; the others join. The driver's process id lets the batch script,
# which runs on the same node, signal only the driver.
# shellcheck disable=SC2016  # expanded by the inner shell
srun --ntasks-per-node=1 --no-kill \
    ray symmetric-run --address "$head_ip:$port" --min-nodes "$SLURM_JOB_NUM_NODES" \
    --dashboard-host 127.0.0.1 --dashboard-port "$((port + 1))" --dashboard-agent-listen-port "$((port + 2))" \
    --ray-client-server-port "$((port + 3))" \
    --num-cpus "$SRUN_CPUS_PER_TASK" --num-gpus "${SLURM_GPUS_ON_NODE:-0}" \
    -- bash -c 'echo $$ > "$0" && exec "$@"' "$state/driver" \
    collector collect --ray-address "$head_ip:$port" "$@" &
step=$!

# shellcheck disable=SC2317,SC2329  # the traps call it
stop_driver() {
    kill -TERM "$(cat "$state/driver" 2> /dev/null || echo "$step")" 2> /dev/null || true
}
time_is_up=
trap 'time_is_up=yes; stop_driver' USR1
trap stop_driver TERM INT

status=0
wait "$step" || status=$?
while kill -0 "$step" 2> /dev/null; do # a signal ends `wait`, not the step
    status=0
    wait "$step" || status=$?
done

if [[ ! -e "$state/driver" ]]; then
    # symmetric-run exits with 0 if Ray does not start.
    echo "slurm.sh: the Ray cluster did not come up; see above, and $RAY_TMPDIR on the nodes" >&2
    exit 1
fi
# Status 2 is unusable input, which another try does not change.
if [[ -n "$time_is_up" && "$status" -ne 0 && "$status" -ne 2 ]] && ((${SLURM_RESTART_COUNT:-0} < ${MAX_RESTARTS:-50})); then
    echo "slurm.sh: the time limit is near; requeued, the run resumes" >&2
    scontrol requeue "$SLURM_JOB_ID"
fi
exit "$status"
