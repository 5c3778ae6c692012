"""The numerics of the update as pure functions: advantages, losses, importance weights, log-probabilities."""
