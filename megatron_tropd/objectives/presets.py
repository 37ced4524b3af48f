"""The published objectives by name, as one table over `options.Objective`, and the refusal of what means nothing.

S student, T teacher, x the sampled token, R = log pi_T(x) - log pi_S(x), sg stop-gradient; sums over the vocabulary
both models share. Losses of an on-policy token, to be minimised; K1 = -sg(R) log pi_S(x), TopK = the teacher's ids.

``tropd``: K1 with probability min(e^R, 1), else sum_TopK pi_T log(pi_T / pi_S). METHOD 1; arXiv 2606.01249.

``tropd-exact``: KL(S||T) with probability min(e^R, 1), else KL(T||S), over the full vocabulary: the same gate, both
terms in expectation over x. Ours; METHOD 1. The draw still depends on x. [choice]

``tropd-aopd``: tropd, whose trusted tokens take K1 where R > 0 and the top-k forward KL where R <= 0. arXiv 2606.01249,
"TrOPD + AOPD"; METHOD gives one line, we read its "positive samples" as the trusted tokens [choice]. R > 0 is always
trusted, so with outlier fkl every on-policy token gets what ``aopd`` gives it, and guidance is what TrOPD adds; with
outlier mask or clip the two differ.

``aopd``: K1 where R > 0, else the top-k forward KL: the static gate at tau = 0. arXiv 2605.06387.

``opd``: K1. METHOD 2.

``fkl``: sum_TopK pi_T log(pi_T / pi_S). METHOD 2.

``rkl-exact``, ``fkl-exact``, ``jsd-exact``: KL(S||T), KL(T||S), beta KL(T||m) + (1 - beta) KL(S||m) with
m = beta pi_T + (1 - beta) pi_S. GKD, arXiv 2306.13649.

``gkd``: the same JSD on whole teacher answers too, which `guidance.fraction` (1 - lambda) of the samples are; the rest
are the student's. arXiv 2306.13649.

``jsd``: beta sum_TopK pi_T log(pi_T / m) - (1 - beta) sg(log m(x) - log pi_S(x)) log pi_S(x). METHOD 2. The first term
is differentiated through m, the second is a reward [choice]: detached as well, the first would have no gradient.

``skew-fkl``, ``skew-rkl``: KL(T || a T + (1 - a) S), KL(S || a S + (1 - a) T). DistiLLM, arXiv 2402.03898.

``eopd``: K1 + alpha 1[H(pi_T) > tau] sum_TopK q log(q / pi_S), q = pi_T scaled to mass 1 on TopK. arXiv 2603.07079.
Divided by all tokens: `training.normalization=tokens`, the default. H(pi_T) runs over the full vocabulary. [choice]

``entropy-opd``: K1 on the fifth of the global batch's on-policy tokens where H(pi_S), over the full vocabulary, is
highest; divided by these tokens. METHOD 2.

``reopold``: -sg(max(R, tau)) log pi_S(x), tau = log(l) / (1 - l), l = 0.3: one stage. arXiv 2603.11137. It divides by
the tokens it keeps, `training.normalization=kept`, where a token at the floor counts as an outlier, not as kept; with
the default, `tokens`, all are counted.

``reopold-two-stage``: K1 where R > tau, nothing elsewhere, for the first half of the training; then ``reopold`` on the
fifth of the tokens where H(pi_S) is highest. arXiv 2603.11137, METHOD 2.

``top-d``: -sg(log(alpha e^R + 1 - alpha)) log pi_S(x): K1 against the proximal teacher alpha pi_T + (1 - alpha) pi_S.
METHOD 2. Its own paper calls the method TROPD: it is not Trust Region On-Policy Distillation.

``mopd``: sum_TopK pi_S log(pi_S / pi_T) - pi_S + pi_T, differentiable and >= 0 at every id. METHOD 2.

``seq-kd``: nothing on-policy; -log pi_S(x) on teacher answers (guidance tokens). Kim & Rush, arXiv 1606.07947.

``sft``: the same on reference answers; what the command `sft` runs.
"""

from __future__ import annotations

import difflib
import math
from dataclasses import fields, replace
from typing import Any, get_args, get_type_hints

from megatron_tropd.objectives.options import Objective

PRESETS = {
    objective.name: objective
    for objective in (
        Objective("tropd", gate="bernoulli"),
        Objective("tropd-exact", on_policy="gated_kl", gate="bernoulli"),
        Objective("tropd-aopd", on_policy="asymmetric", gate="bernoulli"),
        Objective("aopd", gate="static", tau=0.0),
        Objective("opd"),
        Objective("fkl", gate="reject"),
        Objective("rkl-exact", on_policy="reverse_kl"),
        Objective("fkl-exact", on_policy="forward_kl"),
        Objective("jsd-exact", on_policy="jsd"),
        Objective("jsd", on_policy="mixture"),
        Objective("gkd", on_policy="jsd", guidance_loss="divergence", guidance_beta=1.0),
        Objective("skew-fkl", on_policy="skew_forward_kl"),
        Objective("skew-rkl", on_policy="skew_reverse_kl"),
        Objective("eopd", on_policy="entropy", top_k=16, renormalize="teacher"),
        Objective("reopold", gate="static", outlier="clip", tau=math.log(0.3) / 0.7),
        Objective("entropy-opd", entropy_share=0.2),
        Objective(
            "reopold-two-stage", gate="static", outlier="clip", tau=math.log(0.3) / 0.7, entropy_share=0.2, switch=0.5
        ),
        Objective("top-d", on_policy="proximal"),
        Objective("mopd", on_policy="top_k_reverse_kl"),
        Objective("seq-kd", on_policy="none", guidance_beta=1.0),
        Objective("sft", on_policy="none", guidance_beta=1.0),
    )
}
"""Every objective by name; the module's docstring has their equations."""
_FIXED = ("name", "on_policy")
# The symbol of the row's own equation, and the field it stands for.
_SYMBOLS = {
    ("beta", "jsd"): "jsd_beta",
    ("beta", "mixture"): "jsd_beta",
    ("alpha", "proximal"): "proximal_alpha",
    ("alpha", "entropy"): "entropy_alpha",
}


def preset(name: str, **overrides: Any) -> Objective:
    """A named objective of METHOD section 2, with options replaced.

    ``beta`` and ``alpha`` are the symbols of the row's own equation: beta the mixing weight of ``jsd`` and
    ``jsd-exact`` and the guidance coefficient of every other preset, alpha that of ``top-d`` or ``eopd``; the fields
    behind them (``jsd_beta``, ``guidance_beta``, ``proximal_alpha``, ``entropy_alpha``) say the same by their own
    names. ``gate``, ``outlier``, ``alpha``, ``guidance_loss`` and the variants of the top-k forward KL are refused
    where they could not act but would read as if they did; parameters of a treatment in use elsewhere (``top_k``,
    ``tau``, ...) are accepted by every preset, so that one configuration can be run under several.

    Raises ValueError for unknown names, values out of range and combinations without meaning.
    """
    _check_name("objective", name, PRESETS)
    base = PRESETS[name]
    for symbol in ("beta", "alpha"):
        overrides = _expand_symbol(base, symbol, overrides)
    options = [field.name for field in fields(Objective) if field.name not in _FIXED]
    for key in overrides:
        _check_name(f"option of objective {name!r}", key, [*options, "beta", "alpha"])
    objective = replace(base, **overrides)
    _check_choices(objective)
    _check_numbers(objective)
    _check_gate(objective, overrides)
    _check_terms(objective, overrides)
    return objective


def _expand_symbol(base: Objective, symbol: str, overrides: dict[str, Any]) -> dict[str, Any]:
    if symbol not in overrides:
        return overrides
    field = _SYMBOLS.get((symbol, base.on_policy), "guidance_beta" if symbol == "beta" else None)
    if field is None:
        raise ValueError(f"objective {base.name!r} has no alpha: leave it out; 'top-d' and 'eopd' have one")
    if field in overrides:
        raise ValueError(f"objective {base.name!r}: {symbol} and {field} are the same option here; give one of them")
    rest = {key: value for key, value in overrides.items() if key != symbol}
    return {**rest, field: overrides[symbol]}


def _check_name(what: str, name: str, valid: Any) -> None:
    if name not in valid:
        near = difflib.get_close_matches(str(name), list(valid), n=1, cutoff=0.0)[0]
        raise ValueError(f"unknown {what}: {name!r}; did you mean {near!r}? Valid: {', '.join(valid)}")


def _check_choices(objective: Objective) -> None:
    for key, hint in get_type_hints(Objective).items():
        choices = [choice for choice in get_args(hint) if isinstance(choice, str)]
        if choices:
            _check_name(f"{key} of objective {objective.name!r}", getattr(objective, key), choices)


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _check_numbers(objective: Objective) -> None:
    def is_share(value: float) -> bool:
        return _is_number(value) and 0 < value < 1

    floor = objective.student_log_prob_min
    requirements = [
        ("top_k", isinstance(objective.top_k, int) and _is_number(objective.top_k) and objective.top_k >= 1,
         "an integer >= 1"),
        ("tau", _is_number(objective.tau), "a finite number of nats"),
        ("guidance_beta", _is_number(objective.guidance_beta) and objective.guidance_beta >= 0, "finite and >= 0"),
        ("jsd_beta", is_share(objective.jsd_beta),
         "strictly between 0 and 1 (the limits are the presets 'rkl-exact' and 'fkl-exact')"),
        ("proximal_alpha", is_share(objective.proximal_alpha), "strictly between 0 and 1 (1 is the preset 'opd')"),
        ("skew", is_share(objective.skew),
         "strictly between 0 and 1 (0 is the preset 'rkl-exact' or 'fkl-exact')"),
        ("entropy_alpha", _is_number(objective.entropy_alpha) and objective.entropy_alpha > 0,
         "finite and > 0 (0 is the preset 'opd')"),
        ("entropy_tau", _is_number(objective.entropy_tau) and objective.entropy_tau >= 0,
         "a finite number of nats >= 0"),
        ("task_reward", _is_number(objective.task_reward) and objective.task_reward >= 0, "finite and >= 0"),
        ("importance_cap", objective.importance_cap is None
         or (_is_number(objective.importance_cap) and objective.importance_cap >= 1), "None or at least 1"),
        *((key, value is None or is_share(value), "None or strictly between 0 and 1")
          for key, value in (("clip_ratio_low", objective.clip_ratio_low),
                             ("clip_ratio_high", objective.clip_ratio_high))),
        ("entropy_share", _is_number(objective.entropy_share) and 0 < objective.entropy_share <= 1,
         "above 0 and at most 1 (1 is every token)"),
        ("switch", _is_number(objective.switch) and 0 <= objective.switch < 1, "at least 0 and below 1"),
        ("student_log_prob_min", floor is None or (_is_number(floor) and floor < 0), "None or a negative number"),
    ]  # fmt: skip
    for key, holds, wanted in requirements:
        if not holds:
            value = getattr(objective, key)
            raise ValueError(f"objective {objective.name!r}: {key} must be {wanted}, found {value!r}")


def _check_gate(objective: Objective, overrides: dict[str, Any]) -> None:
    name = objective.name
    if not objective.has_gate and (given := [key for key in ("gate", "outlier") if key in overrides]):
        raise ValueError(f"objective {name!r} has no trust gate, so {given[0]} has no effect; use preset 'tropd'")
    if "outlier" in overrides and objective.gate == "none" and "gate" not in overrides:
        raise ValueError(f"objective {name!r} trusts every token, so outlier has no effect; give gate='static' too")
    if objective.gate == "reject" and objective.outlier == "mask":
        raise ValueError(f"objective {name!r}: gate 'reject' with outlier 'mask' leaves no loss; use outlier 'fkl'")
    if objective.on_policy == "none" and objective.entropy_share < 1:
        raise ValueError(f"objective {name!r} learns from no on-policy token: leave entropy_share out")
    if objective.switch > 0 and (not objective.has_gate or objective.gate == "none"):
        raise ValueError(
            f"objective {name!r} has no outliers to mask before switch; give gate='static' too, or switch=0"
        )
    if objective.on_policy == "gated_kl" and objective.outlier == "clip":
        raise ValueError(
            f"objective {name!r} has no reward to clip: its terms are exact; use outlier 'fkl' or 'mask', or "
            "preset 'tropd'"
        )


def _check_terms(objective: Objective, overrides: dict[str, Any]) -> None:
    name = objective.name
    if objective.tail == "bucket" and objective.renormalize != "none":
        raise ValueError(f"objective {name!r}: tail 'bucket' already sums to 1; use renormalize='none' with it")
    variants = ("renormalize", "tail", "student_log_prob_min", "fkl_as")
    if objective.on_policy in ("mixture", "top_k_reverse_kl") and (given := [k for k in variants if k in overrides]):
        raise ValueError(
            f"objective {name!r}: {given[0]} is a variant of the top-k forward KL, which this objective does not "
            "take; leave it out, or use preset 'fkl'"
        )
    if objective.guidance_loss == "divergence" and objective.exact_divergence in (None, "gated_kl"):
        raise ValueError(
            f"objective {name!r}: guidance_loss 'divergence' needs one full-vocabulary divergence for every token; use "
            "preset 'gkd', 'fkl-exact', 'rkl-exact' or a skew one, or guidance_loss 'nll'"
        )
    if objective.on_policy == "none" and (objective.task_reward or objective.importance_cap is not None):
        raise ValueError(f"objective {name!r} learns from no on-policy token: leave task_reward and importance_cap out")
    if (objective.clip_ratio_low is None) != (objective.clip_ratio_high is None):
        raise ValueError(f"objective {name!r}: clip_ratio_low and clip_ratio_high belong together; set both or neither")
    if objective.clips_ratio and not objective.has_policy_gradient:
        raise ValueError(
            f"objective {name!r} has no term on the sampled token, so there is no ratio to clip: leave clip_ratio_low "
            "and clip_ratio_high out; importance_cap weights by the ratio what is differentiated directly"
        )
    if objective.guidance_loss == "forward_kl" and objective.on_policy != "gated_kl":
        raise ValueError(
            f"objective {name!r}: guidance_loss 'forward_kl' needs the full-vocabulary terms of preset "
            "'tropd-exact'; use it, or guidance_loss 'nll'"
        )
