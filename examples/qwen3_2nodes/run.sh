#!/usr/bin/env bash
# Two nodes of 8 GPUs, inside an NGC container on both (see the Dockerfile). On each node, with the same paths:
#   NODE_RANK=0 MASTER_ADDR=first-node bash examples/qwen3_2nodes/run.sh      (NODE_RANK=1 on the second)
# Extra arguments override distill.yaml: --a.b=c
set -euo pipefail
config="$(dirname "$0")/distill.yaml"
nodes=2 gpus=8
: "${NODE_RANK:?0 on the first node, 1 on the second}" "${MASTER_ADDR:?name or address of the first node}"
export MASTER_ADDR MASTER_PORT="${MASTER_PORT:-29500}"
# One hardware queue, so that communication and kernels start in the order in which they were launched.
export CUDA_DEVICE_MAX_CONNECTIONS=1
# Sequences differ in length: segments that grow fragment less than blocks of fixed size.
export PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True
# Where nodes have several networks, name the one between them: export NCCL_SOCKET_IFNAME=eth0 NCCL_IB_HCA=mlx5
# `NCCL_DEBUG=INFO` says which one NCCL took.
launch=(torchrun --nnodes "$nodes" --node-rank "$NODE_RANK" --nproc-per-node "$gpus"
  --master-addr "$MASTER_ADDR" --master-port "$MASTER_PORT" -m megatron_tropd)

# Everything that would stop the run, before a GPU is touched.
python -m megatron_tropd train "$config" "$@" --dry-run --world-size="$((nodes * gpus))"
# The teacher answers the training prompts once; an interrupted run continues where it stopped. Its own cache is larger
# than the student's, which distill.yaml sizes the engine for.
"${launch[@]}" generate "$config" "$@" --rollout.max_batch_size=16
"${launch[@]}" train "$config" "$@"
