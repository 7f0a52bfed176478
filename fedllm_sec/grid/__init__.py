"""Many runs: axes over a base recipe, cells, the workers that run them, the table of results.

Several processes, also on several machines with one file system, may work on one grid: cells are held by locks.
"""
