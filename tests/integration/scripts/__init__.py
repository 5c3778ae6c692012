"""Check scripts, run by ``integration.launch``: importing this package comes before any heavy library."""

from searchrl.environment import prepare_environment

prepare_environment("cpu")
