"""From a FedML security YAML to a recipe: `python -m fedllm_sec.recipe from-fedml config.yaml`.

FedML 0.9.6 is meant throughout. Every key of the file ends up in a note: translated, with a different meaning, ignored
for a reason, or without an equivalent. Start with `translate`; docs/migration.md lists the names.
"""
