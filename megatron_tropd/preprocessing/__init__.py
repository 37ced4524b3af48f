"""From whatever a user has (JSON lines, Parquet, ``datasets`` folders, Megatron corpora) to prompt files.

Nothing here imports torch but ``indexed``, which writes Megatron's format.
"""
