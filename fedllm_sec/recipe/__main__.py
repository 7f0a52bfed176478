"""`python -m fedllm_sec.recipe`: translate another tool's settings into a recipe."""

import sys

from fedllm_sec.fedml.command import main

if __name__ == "__main__":
    sys.exit(main())
