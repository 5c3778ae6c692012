#!/usr/bin/env bash
# Train on several nodes; on one `searchrl train` starts a process per GPU by itself. Every argument goes to Hydra.
# Run the same line on each node, with NODES, NODE_RANK and MASTER_ADDR set:
#   NODES=2 NODE_RANK=0 MASTER_ADDR=node0 launch/torchrun.sh +experiment=NAME
set -euo pipefail

nodes=${NODES:-1}
rendezvous=(--standalone)
if ((nodes > 1)); then
    rendezvous=(
        --nnodes "$nodes"
        --node-rank "${NODE_RANK:?set NODE_RANK to 0..$((nodes - 1))}"
        --master-addr "${MASTER_ADDR:?set MASTER_ADDR to the first node}"
        --master-port "${MASTER_PORT:-29500}"
    )
fi
exec torchrun "${rendezvous[@]}" --nproc-per-node "${GPUS_PER_NODE:-gpu}" -m searchrl.cli train "$@"
