#!/usr/bin/env bash
# Train on several nodes; on one `searchrl train` starts a process per GPU by itself. Every argument goes to Hydra.
# Run the same line on each node, with NODES, NODE_RANK and MASTER_ADDR set:
#   NODES=2 NODE_RANK=0 MASTER_ADDR=node0 launch/torchrun.sh +experiment=NAME
# SIGTERM and SIGUSR1 go on to the ranks, which save and end; torchrun would give them half a minute for it.
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
stopping=(--signals-to-handle SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1 --shutdown-timeout 3600)
exec torchrun "${rendezvous[@]}" "${stopping[@]}" --nproc-per-node "${GPUS_PER_NODE:-gpu}" \
    -m searchrl.cli train "$@"
