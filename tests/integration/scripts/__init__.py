"""Check scripts, run by ``integration.launch``: importing this package comes before any heavy library."""

import os

from searchrl.environment import prepare_environment

prepare_environment(os.environ["CHECKS_DEVICE"])
