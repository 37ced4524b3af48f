"""Trust Region On-Policy Distillation (TrOPD) on Megatron-Core."""

__version__ = "0.1.0"
