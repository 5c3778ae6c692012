#!/usr/bin/env bash
# Train on one or more nodes. Every argument goes to Hydra:
#   launch/torchrun.sh +experiment=NAME
# On several nodes run the same line on each, with NODES, NODE_RANK and MASTER_ADDR set.
set -euo pipefail

nodes=${NODES:-1}
gpus=${GPUS_PER_NODE:-$(nvidia-smi --list-gpus | wc -l)}
rendezvous=(--standalone)
if ((nodes > 1)); then
    rendezvous=(
        --nnodes "$nodes"
        --node-rank "${NODE_RANK:?set NODE_RANK to 0..$((nodes - 1))}"
        --master-addr "${MASTER_ADDR:?set MASTER_ADDR to the first node}"
        --master-port "${MASTER_PORT:-29500}"
    )
fi
exec torchrun "${rendezvous[@]}" --nproc-per-node "$gpus" -m searchrl.cli train "$@"
