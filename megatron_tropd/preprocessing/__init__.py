"""From whatever a user has (JSON lines, Parquet, ``datasets`` folders, Megatron corpora) to prompt files.

Imports torch only where Megatron's format is read or written (``indexed``).
"""
