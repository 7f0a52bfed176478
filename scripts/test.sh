#!/usr/bin/env bash
# Set-up (once), then the test suite, a process for each core. Further arguments go to pytest: bash scripts/test.sh -k krum,
# or -m slow; -n 0 runs everything in one process.
. "$(dirname "$0")/setup.sh"
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
exec python -m pytest -n auto --dist worksteal "$@"
