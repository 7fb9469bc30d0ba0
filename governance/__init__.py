"""The use cases: catalogue, identification, planning, patching, evaluation, auditing, reporting."""
