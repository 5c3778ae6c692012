"""Check scripts, run by ``integration.launch``: importing this package comes before any heavy library."""

import os

from searchrl.environment import prepare_environment

if "CHECKS_DEVICE" in os.environ:  # not where a test borrows something from here
    prepare_environment(os.environ["CHECKS_DEVICE"])
