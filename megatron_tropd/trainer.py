"""The training loop. `train` distils, `sft` learns reference answers: the same step on other trajectories."""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from dataclasses import asdict, replace
from time import perf_counter
from typing import Any

import torch.distributed as dist
from tqdm import tqdm

from megatron_tropd.answers import AnswerStore
from megatron_tropd.apart import TeacherApart
from megatron_tropd.batch import answers_as_rollouts, split_for_rank
from megatron_tropd.building import batch_of_step, build_learner
from megatron_tropd.config import Config, resolved_schedule
from megatron_tropd.engines import Engines, training_engines
from megatron_tropd.evaluate import Evaluator, check_prompts, verifier_options
from megatron_tropd.exports import exports
from megatron_tropd.generator import serve
from megatron_tropd.guard import RefusedStepError
from megatron_tropd.metrics import MetricsLog, padding_share, rollout_metrics
from megatron_tropd.mixture import Mixture
from megatron_tropd.objectives import Objective, preset
from megatron_tropd.one_step_off import OneStepOff
from megatron_tropd.prompt import Prompt
from megatron_tropd.prompt_sources import read_training_prompts, refuse_unshared
from megatron_tropd.refit import Refit
from megatron_tropd.report import plot_runs
from megatron_tropd.rollout_records import runs
from megatron_tropd.rollout_source import build_source
from megatron_tropd.run import Run, export, open_run, resume, save
from megatron_tropd.selection import top_entropy_tokens
from megatron_tropd.step import Learner, LogProbGapError, train_step
from megatron_tropd.task_reward import task_advantages
from megatron_tropd.token_log import TokenLog
from megatron_tropd.training_requests import Requests, longest_prefix
from megatron_tropd.trajectories import Trajectories, TrajectoryQueue, TrajectorySource
from megatron_tropd.types import Rollout

logger = logging.getLogger(__name__)
PPO_CLIP = {"clip_ratio_low": 0.2, "clip_ratio_high": 0.28}
"""Where rollouts are older than the weights (METHOD 2; the two bounds are DAPO's, arXiv 2503.14476)."""


def train(config: Config) -> None:
    """Distil the teacher into the student: each step generates, is judged by the teacher, and moves the weights once.

    Starting again with the same ``output_dir`` continues from its newest checkpoint.
    """
    objective = _objective(config)
    with open_run(config, "train") as run:
        mixture = _read_prompts(run, samples_per_prompt=config.rollout.samples_per_prompt, for_teacher=True)
        if objective.task_reward:
            check_prompts(mixture.prompts, run.layout, verifier_options(config.evaluation))
        refuse_unshared(mixture.prompts, run.tokenizer, run.teacher_tokenizer)
        requests = Requests(config, mixture, _read_answers(run, mixture.prompts))
        link = run.layout.link
        if link is not None and link.side.is_generator:
            serve(run, requests)
            return
        learner = build_learner(run, objective, with_teacher=objective.needs_teacher)
        engines = training_engines(run, learner)
        if link is not None:
            source = _from_generators(run, learner, requests)
            run_steps(run, learner, source, mixture, engines)
            source.close()
            return
        engine = engines.build(
            config.rollout,
            vocab_size=learner.vocab_size,
            eos_id=run.tokenizer.eos_id,
            seed=config.training.seed,
            with_entropies=objective.entropy_share < 1,
        )
        generated = build_source(
            config, run.layout, engine, requests, before_generating=learner.gather.finish, racing=engines.racing
        )
        run_steps(run, learner, generated, mixture, engines)


def _from_generators(run: Run, learner: Learner, requests: Requests) -> OneStepOff:
    config, layout = run.config, run.layout
    assert layout.link is not None and isinstance(learner.ahead, TeacherApart)
    trained = learner.students, layout
    return OneStepOff(
        layout,
        requests,
        Refit(trained, None, layout.link, check_interval=config.rollout.refit_check_interval),
        learner.ahead,
        train_iters=config.training.train_iters,
        version=lambda: int(learner.scheduler.num_steps),
        before_sending=learner.gather.finish,
        stop=run.request_stop,
    )


def _objective(config: Config) -> Objective:
    options = {name: value for name, value in asdict(config.objective_options).items() if value is not None}
    partial = config.rollout.partial_tokens is not None and config.rollout.partial_learn_from == "finished"
    is_stale = config.training.steps_per_rollout > 1 or config.training.one_step_off or partial
    if is_stale and preset(config.objective, **options).has_policy_gradient:
        options = PPO_CLIP | options
    return preset(config.objective, **options)


def sft(config: Config) -> None:
    """Train ``config.student`` on the reference answers of ``data.train`` by negative log-likelihood."""
    with open_run(config, "sft") as run:
        mixture = _read_prompts(run, samples_per_prompt=1, max_answer_length=config.rollout.max_response_length)
        learner = build_learner(run, preset("sft"), with_teacher=False)

        def answers(_step: int, batch: int) -> Trajectories:
            rollouts = answers_as_rollouts(
                mixture.of_batch(batch),
                encode=run.tokenizer.encode,
                eos_id=run.tokenizer.eos_id,
                first_sample_id=batch * config.training.global_batch_size,
            )
            lengths = [len(rollout.request.prompt.tokens) + len(rollout.request.prefix) for rollout in rollouts]
            mine = split_for_rank(
                rollouts, lengths, rank=run.layout.data_parallel_rank, size=run.layout.data_parallel_size
            )
            return Trajectories(mine, mixture.epochs(batch))

        queue = TrajectoryQueue(answers, config.training.steps_per_rollout, config.training.train_iters)
        run_steps(run, learner, queue, mixture, training_engines(run, learner))


def run_steps(run: Run, learner: Learner, source: TrajectorySource, mixture: Mixture, engines: Engines) -> None:
    """Steps from where the run folder stands to ``training.train_iters``, with evaluations, logs and checkpoints.

    After SIGTERM on any rank the step in hand is finished and saved, and the function returns. What follows a refused
    step is ``guard.on_refused``.
    """
    training, layout = run.config.training, run.layout
    first_step = resume(run, learner, source.restore)
    run.keep_config()
    monitor = run.monitor
    trackers = monitor.open_trackers(run.config, run.folder)
    log = MetricsLog(run.folder, is_main=layout.is_main, first_step=first_step, trackers=trackers)
    learner = replace(learner, observe=_token_log(run))
    evaluator = Evaluator(run, engines, vocab_size=learner.vocab_size, num_prompts=training.eval_samples)
    bar = tqdm(
        total=training.train_iters,
        initial=first_step,
        desc=learner.objective.name,
        disable=not layout.is_main,
        unit="step",
    )
    step = saved_step = first_step
    while step < training.train_iters:
        monitor.begin_step(step)
        metrics = _evaluate(run, learner, evaluator) if _evaluates(training.eval_interval, step) else {}
        if training.target_accuracy is not None and metrics.get("accuracy", -1.0) >= training.target_accuracy:
            break
        try:
            metrics |= _one_step(run, learner, source, mixture, step)
            metrics |= engines.refit_metrics(monitor.phases)
        except RefusedStepError as error:
            metrics["refused_steps"] = _count_refusal(learner, error)
            if run.config.guard.on_refused == "rollback":
                refused_step, step = step, _roll_back(run, learner, step, error)
                source.clear()
                bar.update(step - refused_step)
                log.close()
                log = MetricsLog(run.folder, is_main=layout.is_main, first_step=step, trackers=trackers)
                continue
            source.refused()
        log.write({"step": step, **metrics})
        shown = [name for name in ("loss", "grad_norm", "outlier_share") if name in metrics]
        bar.set_postfix({name: f"{metrics[name]:.3g}" for name in shown}, refresh=False)
        bar.update()
        if run.background is not None:
            run.background.poll()
        stop = run.should_stop() and source.can_pause()
        done = step + 1
        if stop or done == training.train_iters or (training.save_interval and done % training.save_interval == 0):
            monitor.phases.begin("save")
            save(run, learner, done, source.files(last=stop))
            saved_step = done
            if run.background is not None and (stop or done == training.train_iters):
                run.background.finish()
        log.write_scalars(step, monitor.end_step(metrics))
        if stop:
            monitor.journal.outcome = "sigterm"
            log.close()
            logger.warning("SIGTERM: saved after step %d; start again with the same command to continue", step)
            return
        step = done
    if step > saved_step:  # training.target_accuracy is reached between two checkpoints
        save(run, learner, step, source.files(last=True))
        if run.background is not None:
            run.background.finish()
    log.write({"step": step, **_evaluate(run, learner, evaluator)})
    bar.close()
    log.close()
    if exports(run.config):
        export(run, learner, step)
    if layout.is_main:
        plot_runs({learner.objective.name: run.folder}, run.folder / "report" / "training.png")


def _evaluate(run: Run, learner: Learner, evaluator: Evaluator) -> dict[str, float]:
    learner.gather.finish()
    run.monitor.phases.begin("evaluate")
    return evaluator()


def _one_step(run: Run, learner: Learner, source: TrajectorySource, mixture: Mixture, step: int) -> dict[str, float]:
    training, layout = run.config.training, run.layout
    started = perf_counter()
    phases = run.monitor.phases
    phases.begin("rollout")
    batch_index = step + learner.guard.batches_ahead
    trajectories = source.take(step, batch_index)
    rollouts = trajectories.rollouts
    started -= trajectories.seconds_before
    phases.begin("batch")
    seconds_rollout = perf_counter() - started
    objective = learner.objective.at(step / training.train_iters)
    learner = replace(learner, objective=objective)
    selected, extra_metrics = None, {}
    if objective.entropy_share < 1:
        selected, threshold = top_entropy_tokens(rollouts, objective.entropy_share, layout.groups.dp)
        extra_metrics["entropy_threshold"] = threshold
    advantages = None
    if objective.task_reward:
        assert dist.group.WORLD is not None
        advantages, extra_metrics["task_reward"] = task_advantages(
            rollouts,
            run.tokenizer.decode,
            eos_id=run.tokenizer.eos_id,
            samples_per_prompt=run.config.rollout.samples_per_prompt,
            coefficient=objective.task_reward,
            options=verifier_options(run.config.evaluation),
            judges=layout.is_model_replica_leader,
            group=dist.group.WORLD,
        )
    batch = batch_of_step(
        run,
        rollouts,
        step,
        data_parallel_size=layout.data_parallel_size,
        pad_to_multiple_of=learner.sequence_multiple,
        context_parallel_size=layout.context_parallel_size,
        selected=selected,
        advantages=advantages,
        source_names=mixture.source_names,
        device=layout.device,
    )
    if learner.observe is not None:
        learner.observe.choose(step, rollouts)
    try:
        metrics = train_step(learner, batch)
    except RefusedStepError as error:
        name = f"step_{step:06d}_batch_{batch_index:06d}"
        _write_refused(run, name, [r for r in rollouts if not error.samples or r.request.sample_id in error.samples])
        raise
    seconds = perf_counter() - started
    phases.begin("log")
    _write_samples(run, step, rollouts[: training.log_rollouts])
    if learner.observe is not None:
        learner.observe.write(step)
    return {
        **metrics,
        **extra_metrics,
        **rollout_metrics(rollouts, layout),
        "padding_share": padding_share(rollouts, batch, layout),
        **trajectories.metrics,
        "max_prefix_length": float(longest_prefix(run.config, step)),
        "tokens_per_second": metrics["response_tokens"] / seconds,
        "seconds_rollout": seconds_rollout,
    }


def _count_refusal(learner: Learner, error: RefusedStepError) -> float:
    """Refused steps of the run so far; raises where this one ends it."""
    if isinstance(error, LogProbGapError):  # no fault of the samples: the next ones would be as wrong
        raise error
    learner.guard.count_refusal(error)
    if learner.layout.is_main:
        logger.warning("refused (guard.on_refused=%s): %s", learner.guard.config.on_refused, error)
    return float(learner.guard.num_refused)


def _roll_back(run: Run, learner: Learner, step: int, error: RefusedStepError) -> int:
    """Reload the newest checkpoint, to go on with the prompts after those of the refused step; returns its step.

    A run that dies before the next checkpoint meets the same step, refuses it and rolls back as before.
    """
    guard = learner.guard
    num_refused, next_batch = guard.num_refused, step + guard.batches_ahead + 1
    steps_done = resume(run, learner, lambda _: None)  # paused samples are dropped
    if not steps_done:
        raise RefusedStepError(
            f"{error} There is no checkpoint yet to roll back to: lower training.save_interval, or use "
            "guard.on_refused=skip",
            error.samples,
        ) from error
    guard.num_refused, guard.batches_ahead = num_refused, next_batch - steps_done
    return steps_done


def _token_log(run: Run) -> TokenLog | None:
    """Where this run records tokens: on the one rank of the first replica that sees the loss; None elsewhere."""
    training, layout = run.config.training, run.layout
    if not training.log_tokens or not layout.is_model_replica_leader or layout.data_parallel_rank:
        return None
    return TokenLog(
        run.folder / "tokens",
        run.tokenizer,
        interval=training.log_tokens_interval,
        num_samples=training.log_tokens,
    )


def _evaluates(interval: int, step: int) -> bool:
    """Before the first step and every ``interval`` steps; the end of a run is evaluated apart."""
    return bool(interval) and step % interval == 0


def _read_prompts(
    run: Run, *, samples_per_prompt: int, max_answer_length: int | None = None, for_teacher: bool = False
) -> Mixture:
    mixture, skipped = read_training_prompts(
        run.config,
        run.tokenizer,
        samples_per_prompt=samples_per_prompt,
        max_answer_length=max_answer_length,
        for_teacher=for_teacher,
    )
    for path, number in skipped.items():
        if number and run.layout.is_main:
            logger.warning("%s: skipped %d prompts over their length budget", path, number)
    return mixture


def _read_answers(run: Run, prompts: Sequence[Prompt]) -> AnswerStore | None:
    if resolved_schedule(run.config) == "none":
        return None
    assert run.config.guidance.answers is not None  # validate() has refused a schedule without a store
    shared_size = min(run.tokenizer.vocab_size, run.teacher_tokenizer.vocab_size)
    store = AnswerStore.read(run.config.guidance.answers, run.tokenizer.fingerprint, shared_size)
    store.require(prompts)  # a prompt without an answer is found now, not at the step that meets it
    return store


def _write_samples(run: Run, step: int, rollouts: Sequence[Rollout]) -> None:
    if not run.layout.is_main or not rollouts:
        return
    folder = run.folder / "rollouts"
    folder.mkdir(exist_ok=True)
    lines = [json.dumps(_readable(run, rollout), ensure_ascii=False) for rollout in rollouts]
    (folder / f"step_{step:06d}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")


def _write_refused(run: Run, name: str, rollouts: Sequence[Rollout]) -> None:
    """The samples of a step that was refused, each by the data-parallel replica that has it."""
    if not run.layout.is_model_replica_leader or not rollouts:
        return
    folder = run.folder / "refused"
    folder.mkdir(parents=True, exist_ok=True)
    lines = [json.dumps(_readable(run, rollout), ensure_ascii=False) for rollout in rollouts]
    path = folder / f"{name}_replica_{run.layout.data_parallel_rank}.jsonl"
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


def _readable(run: Run, rollout: Rollout) -> dict[str, Any]:
    decode = run.tokenizer.decode
    return {
        "sample_id": rollout.request.sample_id,
        "prompt": rollout.request.prompt.text,
        "prefix": decode(rollout.request.prefix),
        **({"earlier": decode(rollout.request.earlier)} if rollout.request.earlier else {}),
        "response": decode(rollout.response),
        **({"versions": runs(rollout.versions)} if rollout.versions else {}),
        "finished": rollout.finished,
        "answer": rollout.request.prompt.answer,
    }
