"""Training of LoRA ensembles: thin subclasses of transformers' ``Trainer`` for SFT and DPO in TRL's formats."""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from vifamily.errors import ConfigError, NonFiniteLossError
from vifamily.llm._after_step import AfterStep, step_callback
from vifamily.llm._arguments import check_arguments, check_draws, check_engines, check_reference
from vifamily.llm._batches import Collator, GroupedRows, Inputs, blocks_of
from vifamily.llm._checkpoints import check_complete, last_checkpoint, tell_changes
from vifamily.llm._extra import require
from vifamily.llm._passes import PaddedRows, stacked_pass, two_pass
from vifamily.llm._prior import normal_prior
from vifamily.llm._progress import PlainCheckpoints
from vifamily.llm._ranks import own_members, ranks_pass, whole_batch
from vifamily.llm._routed import Tally, pair_loss, supervised_loss
from vifamily.llm._stacked import StackedCausalLM
from vifamily.llm.adapter_files import SavedAdapter
from vifamily.llm.data import check_tokenizer, prepare_pairs, prepare_sft
from vifamily.llm.options import EnsembleOptions
from vifamily.llm.rows import Rows
from vifamily.llm.saving import save_members
from vifamily.rng import scoped

__all__ = ["DPOEnsembleTrainer", "SFTEnsembleTrainer", "last_checkpoint"]

_transformers = require("transformers", "training an ensemble")

_REFERENCE = ("ref_chosen_logps", "ref_rejected_logps")


class _EnsembleTrainer(PlainCheckpoints, _transformers.Trainer):  # type: ignore[misc, name-defined]
    """What both kinds of training share; see :class:`SFTEnsembleTrainer`."""

    pairs = False
    data_collator: Collator

    def __init__(
        self,
        model: StackedCausalLM,
        args: Any = None,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        processing_class: Any = None,
        *,
        options: EnsembleOptions | None = None,
        **more: Any,
    ) -> None:
        if not isinstance(model, StackedCausalLM):
            raise ConfigError(
                f"model must be a StackedCausalLM, got {type(model).__name__}: wrap the base with "
                "StackedCausalLM(base, peft_config, num_members)."
            )
        args = args if args is not None else _transformers.TrainingArguments("trainer_output")
        check_arguments(args)
        self.options = options or EnsembleOptions()
        check_draws(model, self.options)
        if self.pairs and self.options.unit not in ("sequence", "group"):
            raise ConfigError(f"preferences are routed by 'sequence' or 'group', got unit={self.options.unit!r}.")
        tokenizer = check_tokenizer(processing_class)
        self._reference: dict[str, Any] = {}
        train = self._prepared(train_dataset, tokenizer, "train")
        evaluation = self._prepared(eval_dataset, tokenizer, "eval")
        self._tally = {"train": Tally(), "eval": Tally()}
        check_reference(self.options, pairs=self.pairs, known=bool(self._reference))
        folder = self.options.reference_adapter
        self._reference_adapter = None if folder is None else SavedAdapter(folder, model)
        self._after_step = AfterStep(self.options, model.num_members, args.seed)
        with scoped(args.seed):
            super().__init__(
                model=model,
                args=args,
                train_dataset=train,
                eval_dataset=evaluation,
                processing_class=processing_class,
                data_collator=Collator(int(tokenizer.pad_token_id), self.pairs, self._reference.get("train")),
                **more,
            )
        check_engines(self, sharded=model.known_digest is not None, options=self.options)
        self.add_callback(step_callback(self._act_after_step))

    # --- data ---

    def _prepared(self, data: Any, tokenizer: Any, what: str) -> Any:
        if data is None:
            return None
        if isinstance(data, Mapping):
            raise ConfigError("several evaluation sets at once are not supported: call evaluate() with each.")
        if not isinstance(data, Rows):
            records = list(data)
            shared: dict[str, Any] = {
                "max_length": self.options.max_length,
                "overlong": self.options.overlong,
                "group_column": self.options.group_column,
            }
            if self.pairs:
                data = prepare_pairs(records, tokenizer, **shared)
                if records and all(set(_REFERENCE) <= set(record) for record in records):
                    known = [(float(r[_REFERENCE[0]]), float(r[_REFERENCE[1]])) for r in records]
                    self._reference[what] = known
            else:
                only = self.options.completion_only_loss
                data = prepare_sft(records, tokenizer, completion_only_loss=only, **shared)
        if what == "train":
            self.prepared: Rows[Any] = data
        return GroupedRows(data) if self.options.unit == "group" else data

    def get_eval_dataloader(self, eval_dataset: Any = None) -> Any:
        """Return a loader of rows or records; see transformers."""
        known = self.data_collator
        if eval_dataset is not None and not isinstance(eval_dataset, (str, Rows, GroupedRows)):
            eval_dataset = self._prepared(eval_dataset, self.processing_class, "eval")
        try:
            self.data_collator = Collator(known.pad_token_id, known.pairs, self._reference.get("eval"))
            return super().get_eval_dataloader(eval_dataset)
        finally:
            self.data_collator = known

    def _get_num_items_in_batch(self, batch_samples: list[Any], device: torch.device) -> Tensor | None:
        """Count what the loss is averaged over, over all batches of a step and all processes."""
        if not batch_samples:
            return None
        count = sum(Inputs.from_dict(batch, pairs=self.pairs).items() for batch in batch_samples)
        total = torch.tensor(count, device=device)
        if self.args.world_size > 1:
            total = self.accelerator.gather(total.reshape(1)).sum()
        return total

    # --- loss ---

    def _loss_of(self, inputs: Inputs, scale: float, tally: Tally, score: Any) -> Any:
        """The loss of some rows, as the passes call it."""
        alpha = self._after_step.alpha.at(self.state.global_step)
        log_weight = self._ensemble.log_weight

        def loss(log_prob: Tensor, index: Tensor) -> Tensor:
            part = inputs.rows.take(index)
            item = index[: len(index) // 2] if self.pairs else index
            group = torch.unique(inputs.group[item], return_inverse=True)[1]
            if self.pairs:
                reference = self._reference_of(inputs, part, index, score)
                total, found = pair_loss(
                    log_prob,
                    part.token_row,
                    group,
                    reference,
                    self.options.unit,
                    alpha,
                    log_weight,
                    self.options.beta,
                )
            else:
                total, found = supervised_loss(log_prob, part.token_row, group, self.options.unit, alpha, log_weight)
            tally.add(found)
            return total * scale

        return loss

    @torch.no_grad()
    def _reference_of(self, inputs: Inputs, part: PaddedRows, index: Tensor, score: Any) -> Tensor:
        if inputs.reference is not None:
            return inputs.reference[index]
        if self._reference_adapter is None:
            value = score(part, None, adapters=False)
        else:
            with self._reference_adapter.on(self._ensemble):
                value = score(part, (0, 1))
        out: Tensor = value.new_zeros(len(part)).index_add(0, part.token_row, value[0])
        return out

    @property
    def _ensemble(self) -> StackedCausalLM:
        found = self.accelerator.unwrap_model(self.model)
        if not isinstance(found, StackedCausalLM):
            raise ConfigError(f"the model that is trained is a {type(found).__name__}, not a StackedCausalLM.")
        return found

    def _evaluate_loss(
        self,
        model: nn.Module,
        batch: dict[str, Tensor],
        items: Any,
        backward: Any,
        tally: Tally,
        *,
        route: str,
    ) -> Tensor:
        """Walk over a batch, with a call of ``backward`` for each part."""
        inputs = Inputs.from_dict(batch, pairs=self.pairs)
        members, processes = self._ensemble.num_members, self.args.world_size if route == "ranks" else 1
        if processes > 1:
            inputs = whole_batch(inputs, self.accelerator.gather)
        count = inputs.items() if items is None else float(items)
        # gradients are averaged over processes, and the count is over all of them
        scale = (self.args.world_size if items is not None else 1) / max(count, 1)

        def score(part: PaddedRows, members: tuple[int, int] | None, *, adapters: bool = True) -> Tensor:
            found: Tensor = model(part.input_ids, part.attention_mask, part.completion_mask, members, adapters=adapters)
            return found

        loss_of = self._loss_of(inputs, scale, tally, score)
        # each process has its part of the members on all rows, or all members on its part of the rows
        at_once = len(inputs.group) // processes // math.ceil(members / processes)
        size = self.options.micro_batch_rows or max(1, at_once)
        blocks, fits = blocks_of(inputs.group, size, whole_groups=self.options.unit == "group")
        if route == "two_pass" or (route == "auto" and not fits):
            item = torch.arange(len(inputs.group), device=inputs.group.device)
            # of preferences, the two answers must stand in one part, and all parts in the order of the whole
            parts = [inputs.model_rows(item)] if self.pairs else list(item.split(size * members))
            return two_pass(score, inputs.rows, parts, loss_of, backward, num_members=members)
        indices = [inputs.model_rows(block) for block in blocks]
        if processes > 1:
            own = own_members(members, self.args.process_index, processes)
            reduce = functools.partial(self.accelerator.reduce, reduction="sum")
            return ranks_pass(score, inputs.rows, indices, loss_of, backward, own, members, reduce) / processes
        return stacked_pass(score, inputs.rows, indices, loss_of, backward)

    def training_step(self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Any = None) -> Tensor:
        """Add the gradient of one batch, in micro-batches; see transformers."""
        model.train()
        self._after_step.draw(self._ensemble, self.state.global_step)
        batch = self._prepare_inputs(inputs)
        tally = Tally()
        with self.compute_loss_context_manager():
            loss = self._evaluate_loss(
                model, batch, num_items_in_batch, self.accelerator.backward, tally, route=self.options.route
            )
        if self.options.prior_weight:
            steps = getattr(self, "current_gradient_accumulation_steps", 1)
            prior = normal_prior(self._ensemble, self.options) / steps
            self.accelerator.backward(prior)
            loss = loss + prior.detach().to(loss)
        if not math.isfinite(float(loss)):
            raise NonFiniteLossError(
                f"the loss is {float(loss)} at step {self.state.global_step}; nothing was stepped. Resume from the "
                "last checkpoint with a smaller learning rate, and look at the data of this step.",
                step=self.state.global_step,
                term="loss",
            )
        self._tally["train"].add(tally)
        self._after_step.add(tally)
        return loss.detach()

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,  # noqa: FBT001, FBT002
        num_items_in_batch: Any = None,
    ) -> Any:
        """Return the loss of a batch, differentiable; see transformers."""
        parts: list[Tensor] = []
        batch = self._prepare_inputs(inputs)
        self._evaluate_loss(model, batch, num_items_in_batch, parts.append, self._tally["eval"], route="stacked")
        loss = torch.stack(parts).sum()
        return (loss, {}) if return_outputs else loss

    def prediction_step(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        prediction_loss_only: bool,  # noqa: FBT001
        ignore_keys: Any = None,
    ) -> tuple[Tensor, None, None]:
        """Return the loss of a batch without a gradient; see transformers."""
        with torch.no_grad(), self.compute_loss_context_manager():
            return self.compute_loss(model, inputs).detach(), None, None

    # --- optimiser ---

    def _clip_grad_norm(self, model: nn.Module) -> Tensor:
        """Clip each member's gradient by its own norm; members would be coupled by a common one."""
        self.accelerator.unscale_gradients()
        gradients = [p.grad for p in self._ensemble.adapter_parameters() if p.grad is not None]
        norm = torch.stack([g.float().flatten(1).square().sum(1) for g in gradients]).sum(0).sqrt()
        factor = (self.args.max_grad_norm / (norm + 1e-6)).clamp(max=1.0)
        for g in gradients:
            g.mul_(factor.to(g)[:, None, None])
        return norm.max()

    def _act_after_step(self) -> None:
        """Move weights and alpha, and reseed members, as the options say."""
        several = self.args.world_size > 1
        reduce = (lambda value: self.accelerator.reduce(value, "sum")) if several else None
        self._after_step.act(self._ensemble, self.optimizer, reduce, self.state.global_step)

    # --- log ---

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add what routing does to the log; see transformers."""
        mode = "eval" if any(key.startswith("eval_") for key in logs) else "train"
        means = self._tally[mode].means()
        self._tally[mode] = Tally()
        if mode == "train" and means and "loss" in logs:
            means["renyi_alpha"] = self._after_step.alpha.at(self.state.global_step)
            if self.options.learn_weights:
                weights = self._ensemble.log_weight.exp().tolist()
                means |= {f"routing/weight_{k}": w for k, w in enumerate(weights)}
            if self.options.reseed_below is not None:
                means["routing/reseeded"] = float(self._after_step.reseeded)
            usage = [means[f"routing/usage_{k}"] for k in range(self._ensemble.num_members)]
            self._after_step.dead.tell(usage, self.state.global_step)
        prefix = "eval_" if mode == "eval" else ""
        super().log({**logs, **{prefix + key: value for key, value in means.items()}}, start_time)

    # --- running, saving ---

    def train(self, resume_from_checkpoint: str | bool | None = None, **more: Any) -> Any:  # noqa: FBT001
        """Train; ``resume_from_checkpoint=True`` goes on from the newest complete checkpoint. See transformers.

        Raises:
            CheckpointError: If the checkpoint is half-written, damaged, or of another base or form.
            ConfigError: If there is no checkpoint to go on from.
        """
        if resume_from_checkpoint is True:
            resume_from_checkpoint = str(last_checkpoint(self.args.output_dir))
        elif resume_from_checkpoint:
            check_complete(Path(str(resume_from_checkpoint)))
        with scoped(self.args.seed):
            return super().train(resume_from_checkpoint=resume_from_checkpoint, **more)

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """Evaluate; see transformers. Returned with the routed figures of the log."""
        self._after_step.draw(self._ensemble, None)
        with scoped(self.args.seed):
            found: dict[str, float] = super().evaluate(*args, **kwargs)
        last = self.state.log_history[-1] if self.state.log_history else {}
        return {**found, **{key: value for key, value in last.items() if key.startswith("eval_")}}

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        folder = Path(output_dir or self.args.output_dir)
        training = {"objective": "dpo" if self.pairs else "sft", "step": self.state.global_step, **self.options.plain()}
        training |= {"family": getattr(self._ensemble, "family", "points"), "routing_state": self._after_step.plain()}
        self._after_step.save(self._ensemble, folder)
        save_members(self._ensemble, folder, training=training)
        if self.processing_class is not None:
            self.processing_class.save_pretrained(folder)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        self._after_step.load(self._ensemble, Path(resume_from_checkpoint))
        tell_changes(Path(resume_from_checkpoint), self.options)

    def _load_best_model(self) -> None:
        self._after_step.load(self._ensemble, Path(str(self.state.best_model_checkpoint)), state=False)


class SFTEnsembleTrainer(_EnsembleTrainer):
    """Supervised fine-tuning of an ensemble, with the arguments of ``Trainer``.

    Data are TRL's: ``messages``, ``prompt`` and ``completion``, or ``text``. The loss is the routed negative log
    likelihood per scored token of the whole step; with one member it is TRL's SFT loss.

    Args:
        model: A :class:`~vifamily.llm.StackedCausalLM`.
        args: ``transformers.TrainingArguments``.
        train_dataset: Records, or :class:`~vifamily.llm.rows.Rows`.
        eval_dataset: The same.
        processing_class: The tokenizer.
        options: :class:`~vifamily.llm.options.EnsembleOptions`.
        more: Further arguments of ``Trainer``.

    Raises:
        ConfigError: If something is asked for that an ensemble cannot have.
        DataError: If the data cannot be used.
    """


class DPOEnsembleTrainer(_EnsembleTrainer):
    """Direct preference optimisation of an ensemble, with the arguments of ``Trainer``.

    Data are TRL's: ``prompt``, ``chosen`` and ``rejected``. The reference is shared by all members: the base without
    adapters, or a trained adapter (``EnsembleOptions(reference_adapter=folder)``), or what columns
    ``ref_chosen_logps`` and ``ref_rejected_logps`` say. The loss is the mean over pairs; with
    one member it is TRL's DPO loss.

    Args:
        model: A :class:`~vifamily.llm.StackedCausalLM`.
        args: ``transformers.TrainingArguments``.
        train_dataset: Records, or :class:`~vifamily.llm.rows.Rows`.
        eval_dataset: The same.
        processing_class: The tokenizer.
        options: :class:`~vifamily.llm.options.EnsembleOptions`.
        more: Further arguments of ``Trainer``.

    Raises:
        ConfigError: If something is asked for that an ensemble cannot have.
        DataError: If the data cannot be used.
    """

    pairs = True
