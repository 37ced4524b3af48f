"""Whether a response solves its task: one verifier by name for each kind of answer. Imports no torch."""

from megatron_tropd.verify.tasks import VERIFIERS, Verdict, VerifierOptions, check_task, verify

__all__ = ["VERIFIERS", "Verdict", "VerifierOptions", "check_task", "verify"]
