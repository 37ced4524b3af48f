#!/usr/bin/env bash
# One node, 8 GPUs, inside an NGC container (see the Dockerfile). From the repository's root; extra arguments override
# distill.yaml: --a.b=c
set -euo pipefail
config="$(dirname "$0")/distill.yaml"
gpus=8
# One hardware queue, so that communication and kernels start in the order in which they were launched.
export CUDA_DEVICE_MAX_CONNECTIONS=1
# Sequences differ in length: segments that grow fragment less than blocks of fixed size.
export PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True
launch=(torchrun --standalone --nproc-per-node "$gpus" -m megatron_tropd)
# The teacher's own cache is larger than the student's, which distill.yaml sizes the engine for.
generate=(generate "$config" "$@" --rollout.max_batch_size=192)

# Everything that would stop either, and the memory they take, before a GPU is touched.
python -m megatron_tropd train "$config" "$@" --dry-run --world-size="$gpus"
python -m megatron_tropd "${generate[@]}" --dry-run --world-size="$gpus"
# The teacher answers the training prompts once; an interrupted run continues where it stopped.
"${launch[@]}" "${generate[@]}"
"${launch[@]}" train "$config" "$@"
