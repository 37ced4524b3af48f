#!/usr/bin/env bash
# Two nodes of 8 GPUs, inside an NGC container on both (see the Dockerfile). On each node, from the repository's root, which
# with `checkpoints`, `data` and `runs` in it is on a file system that both see under the same path:
#   NODE_RANK=0 MASTER_ADDR=first-node bash examples/qwen3_2nodes/run.sh      (NODE_RANK=1 on the second)
# Extra arguments override distill.yaml, the same on both: --a.b=c
set -euo pipefail
config="$(dirname "$0")/distill.yaml"
nodes=2 gpus=8
: "${NODE_RANK:?0 on the first node, 1 on the second}" "${MASTER_ADDR:?name or address of the first node}"
port="${MASTER_PORT:-29500}"
# One hardware queue, so that communication and kernels start in the order in which they were launched.
export CUDA_DEVICE_MAX_CONNECTIONS=1
# Sequences differ in length: segments that grow fragment less than blocks of fixed size.
export PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True
# Where nodes have several networks, name the one between them: export NCCL_SOCKET_IFNAME=eth0 NCCL_IB_HCA=mlx5
# `NCCL_DEBUG=INFO` says which one NCCL took.
launch() { # the first argument is the port: one for each start, or the second node may find the first one's last store
  torchrun --nnodes "$nodes" --node-rank "$NODE_RANK" --nproc-per-node "$gpus" \
    --master-addr "$MASTER_ADDR" --master-port "$1" -m megatron_tropd "${@:2}"
}
# The teacher's own cache is larger than the student's, which distill.yaml sizes the engine for.
generate=(generate "$config" "$@" --rollout.max_batch_size=16)

# Everything that would stop either, and the memory they take, before a GPU is touched.
python -m megatron_tropd train "$config" "$@" --dry-run --world-size="$((nodes * gpus))"
python -m megatron_tropd "${generate[@]}" --dry-run --world-size="$((nodes * gpus))"
# The teacher answers the training prompts once; an interrupted run continues where it stopped.
launch "$port" "${generate[@]}"
launch "$((port + 1))" train "$config" "$@"
