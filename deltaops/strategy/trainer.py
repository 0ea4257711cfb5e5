"""The controller in a transformers Trainer, which calls it at each moment of a run.

A Trainer tells its callbacks no loss, and calls them when it has clipped the gradients. Both are
found out by hooks: the loss of a step is Σ lossᵢ · gᵢ over its micro-batches, where gᵢ is the
gradient that reached lossᵢ (a Trainer divides by their number, or not); how far gradients were
clipped is their norm now by their norm when they had been accumulated.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers import TrainerCallback

from deltaops.errors import CheckpointError

from .saved import FILE, ahead_of, state_of, tidy

if TYPE_CHECKING:
    from .controller import Controller

NO_LOSS = "the model returns no loss, and none is seen (a loss that the Trainer computes by itself)"


class ControllerCallback(TrainerCallback):
    """One for each controller; a checkpoint has its state in ``controller.safetensors``."""

    def __init__(self, controller: Controller) -> None:
        """For one Trainer."""
        self.controller = controller
        self._forward: Any = None
        self._loads: Any = None
        self._recalled = False
        self._clips = False
        self._hooked: list[Any] = []
        self._losses: list[tuple[Tensor, Tensor]] = []
        self._norms: dict[nn.Parameter, Tensor] = {}

    # ------------------------------------------------------------------------- Trainer's calls

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Bind to the run, or go on with the one whose checkpoint was loaded."""
        from .controller import handle_on

        self._release()  # of a run that was broken off
        self.controller.close()
        model = kwargs["model"]
        resume = None
        if state.global_step:
            resume = state_of(_checkpoint(args, state))
            if not resume.is_file():
                raise CheckpointError(
                    f"Controller: {resume} does not exist, and the decisions before step "
                    f"{state.global_step} are not known. Resume from a checkpoint in output_dir "
                    "that was written with this callback."
                )
        self.controller.begin(
            handle_on(model), _plain(kwargs["optimizer"]), steps=state.max_steps, resume=resume
        )
        self._forward = model.register_forward_hook(self._see_loss)
        if args.load_best_model_at_end:
            self._recalled = False
            self._loads = model.register_load_state_dict_pre_hook(
                lambda *_: self._recall(state, control)
            )
        self._clips = args.max_grad_norm is not None and args.max_grad_norm > 0

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """The first micro-batch of a step comes."""
        self._losses.clear()
        self._norms.clear()
        self._unhook_gradients()
        self._hook_gradients()

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Gradients are whole, and clipped."""
        self._unhook_gradients()
        loss, scale = None, _scale(kwargs["optimizer"])
        if self._losses:
            loss = sum(float(value) * float(weight) for value, weight in self._losses) / scale
        elif NO_LOSS not in self.controller.notes:
            self.controller.notes.append(NO_LOSS)
        self.controller.after_backward(loss, clipped=self._clipped(scale))

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """The optimizer has stepped."""
        self.controller.after_step()
        self._save_ahead(args, state, control.should_save)

    def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """A checkpoint of the epoch may come."""
        self._save_ahead(args, state, control.should_save)

    def on_evaluate(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Validation metrics; those of another set than the validation's are not its business."""
        metrics = {k: v for k, v in kwargs["metrics"].items() if k.startswith("eval_")}
        numbers = {k: v for k, v in metrics.items() if isinstance(v, (int, float))}
        if self.controller.run is not None and numbers:
            self.controller.after_evaluation(numbers)
            # a Trainer says whether it is the best only as it begins that checkpoint
            self._save_ahead(args, state, control.should_save or args.save_strategy == "best")

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Put the state beside the checkpoint that has just been written."""
        checkpoint = _checkpoint(args, state)
        self.controller.save(checkpoint / FILE)
        ahead_of(checkpoint).unlink(missing_ok=True)
        tidy(checkpoint.parent)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Take the hooks away."""
        self._release()
        self.controller.close()
        tidy(Path(args.output_dir))

    def _save_ahead(self, args: Any, state: Any, due: bool) -> None:
        """The state of the checkpoint that comes next, if one does; see :func:`ahead_of`."""
        if due:
            checkpoint = _checkpoint(args, state)
            self.controller.save(ahead_of(checkpoint))
            tidy(checkpoint.parent, but=checkpoint)

    # --------------------------------------------------------------------------------- hooks

    def _release(self) -> None:
        self._unhook_gradients()
        if self._forward is not None:
            self._forward.remove()
            self._forward = None
        if self._loads is not None:
            self._loads.remove()
            self._loads = None

    def _recall(self, state: Any, control: Any) -> None:
        """Before a Trainer puts the best checkpoint into the model, which must be as it was then:
        what is off now would have the base's parameters in the places that the file fills."""
        best = state.best_model_checkpoint
        over = control.should_training_stop or state.global_step >= state.max_steps
        if over and best is not None and self.controller.run is not None and not self._recalled:
            self._recalled = True  # of several files the first
            self.controller.recall(state_of(Path(best)))

    def _see_loss(self, module: nn.Module, inputs: Any, output: Any) -> None:
        """Of a forward pass in training."""
        loss = output.get("loss") if isinstance(output, Mapping) else output
        if isinstance(loss, tuple):  # return_dict=False
            loss = loss[0]
        if not isinstance(loss, Tensor) or not loss.requires_grad or loss.dim():
            return
        value, losses = loss.detach(), self._losses
        hook: Any = loss.register_hook
        hook(lambda gradient: losses.append((value, gradient.detach())))

    def _hook_gradients(self) -> None:
        """Have each trained tensor tell its gradient's norm, until the step's gradients are whole:
        a part that resizes it later must find it without hooks."""
        run = self.controller.run
        if run is not None and self._clips:
            trained = (p for _, p in run.handle.named_parameters() if p.requires_grad)
            see = self._see_gradient
            self._hooked = [_hook(p, see) for p in trained]

    def _unhook_gradients(self) -> None:
        for hook in self._hooked:
            hook.remove()
        self._hooked.clear()

    def _see_gradient(self, parameter: Tensor) -> None:
        """Micro-batches add up, so that the last call of a step has the whole gradient."""
        assert isinstance(parameter, nn.Parameter)
        assert parameter.grad is not None
        self._norms[parameter] = torch.linalg.vector_norm(parameter.grad, dtype=torch.float32)

    def _clipped(self, scale: float) -> float:
        """See :attr:`Run.clipped`; 1 exactly where nothing was clipped.

        Args:
            scale: of the loss, which gradients had when they were seen, and have no more.
        """
        pairs = [(p.grad, norm) for p, norm in self._norms.items() if p.grad is not None]
        if not pairs:
            return 1.0
        after = [torch.linalg.vector_norm(g, dtype=torch.float32) for g, _ in pairs]
        whole = _length([norm for _, norm in pairs]) / scale
        found = _length(after)
        return found / whole if whole > 0 and math.isfinite(whole) and found > 0 else 1.0


def _length(norms: list[Tensor]) -> float:
    """Of all together, wherever layers lie."""
    first = norms[0].device
    return float(torch.linalg.vector_norm(torch.stack([norm.to(first) for norm in norms])))


def _hook(parameter: nn.Parameter, see: Any) -> Any:
    register: Any = parameter.register_post_accumulate_grad_hook  # torch has no types for it
    return register(see)


def _checkpoint(args: Any, state: Any) -> Path:
    """The folder that a Trainer writes at this step."""
    return Path(args.output_dir, f"checkpoint-{state.global_step}")


def _plain(optimizer: Any) -> torch.optim.Optimizer:
    """Without accelerate's wrapper."""
    found: torch.optim.Optimizer = getattr(optimizer, "optimizer", optimizer)
    return found


def _scale(optimizer: Any) -> float:
    """What mixed precision in float16 multiplies a loss by."""
    scaler = getattr(optimizer, "scaler", None)
    return 1.0 if scaler is None else float(scaler.get_scale())
