#!/usr/bin/env bash
# One node, 8 GPUs, inside an NGC container (see the Dockerfile). Extra arguments override distill.yaml: --a.b=c
set -euo pipefail
config="$(dirname "$0")/distill.yaml"
# Megatron's tensor-parallel overlap wants one hardware queue.
export CUDA_DEVICE_MAX_CONNECTIONS=1
launch=(torchrun --standalone --nproc-per-node 8 -m megatron_tropd)

# The teacher answers the training prompts once; an interrupted run continues where it stopped.
"${launch[@]}" generate "$config" "$@"
"${launch[@]}" train "$config" "$@"
