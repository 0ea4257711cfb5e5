"""The handle of an attached delta: look at it, switch it off, merge it, save it, undo it."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

from torch import Tensor, nn

from deltaops.errors import AttachError, ConfigError
from deltaops.methods import Combined, Delta, parts_of
from deltaops.methods.base import BY_PARAMETER, MODEL, NORM, STACK, Site
from deltaops.modules import told_apart, unbecome

from .blocks import restore_blocks
from .gates import NO_MERGE, gate_tensors
from .losses import restore_losses
from .record import Disabled, Record, exchange, exchange_parameters, merged_parameters, read, write
from .tree import WHOLE, Leaf, draw


class Handle:
    """A delta attached to a model. The state lives on the model; any number of handles agree."""

    def __init__(self, model: nn.Module, record: Record) -> None:
        self.model = model
        self._record = record

    @property
    def delta(self) -> Delta | Combined:
        """Its settings: those it was attached with, and what resizing made of them."""
        return self._record.delta

    @property
    def parts(self) -> dict[str, Delta]:
        """Name → delta of each part of a combination; a single delta has the adapter's name."""
        return {part or self.name: delta for part, delta in parts_of(self.delta).items()}

    @property
    def name(self) -> str:
        """The adapter's name."""
        return self._record.name

    @property
    def sites(self) -> tuple[str, ...]:
        """Paths of the places that have the delta, each once."""
        return tuple(dict.fromkeys(site.path for site in self._record.sites))

    @property
    def places(self) -> tuple[Site, ...]:
        """The places themselves."""
        return self._record.sites

    @property
    def merged(self) -> bool:
        """Whether the delta is merged into the weights now."""
        return bool(self._record.merged)

    @property
    def attached(self) -> bool:
        """False after :meth:`revert` and :meth:`merge_and_unload`."""
        return read(self.model) is self._record

    def parameters(self) -> Iterator[nn.Parameter]:
        """What is trained: the delta's parameters, then those of ``modules_to_save``."""
        self._check_attached("parameters")
        for site in self._record.sites:
            yield from self._tensors(site).values()
        for path in self._record.saved:
            yield from self._module(path).parameters()

    def by_place(self) -> dict[Site, dict[str, nn.Parameter]]:
        """Each place → its trained tensors, by their suffix in a checkpoint."""
        self._check_attached("by_place")
        return {site: self._tensors(site) for site in self._record.sites}

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """What is trained, by the keys of :meth:`state`; also while switched off or frozen."""
        self._check_attached("named_parameters")
        for site in self._record.sites:
            for suffix, parameter in self._tensors(site).items():
                yield site.key(suffix), parameter
        for path in self._record.saved:
            for name, parameter in self._module(path).named_parameters():
                yield f"{path}.{name}", parameter

    def saved(self) -> dict[str, nn.Module]:
        """Path → module of what is trained whole."""
        self._check_attached("saved")
        return {path: self._module(path) for path in self._record.saved}

    @property
    def history(self) -> list[dict[str, Any]]:
        """What a controller did to the delta, in order; see :mod:`deltaops.strategy`."""
        return self._record.history

    def parameter_groups(self, lr: float) -> list[dict[str, Any]]:
        """What is trained, as groups for an optimizer: what learns faster than the rest apart.

        Args:
            lr: learning rate of all that has none of its own.
        Returns: a group for each rate, with "params", "lr" and "pace": its factor of ``lr``, for
            whoever sets rates anew in each step.
        """
        self._check_attached("parameter_groups")
        by_pace: dict[float, list[nn.Parameter]] = {}
        for site in self._record.sites:
            delta, _ = self._part(site)
            for suffix, parameter in self._tensors(site).items():
                by_pace.setdefault(delta.pace(suffix), []).append(parameter)
        for path in self._record.saved:
            by_pace.setdefault(1.0, []).extend(self._module(path).parameters())
        return [{"params": p, "lr": lr * pace, "pace": pace} for pace, p in by_pace.items()]

    def state(self) -> dict[str, Tensor]:
        """What a checkpoint holds, keys as ``<module>.<suffix>``, after ``<part>/`` of a part."""
        self._check_enabled("state")
        found: dict[str, Tensor] = {}
        for site in self._record.sites:
            for suffix, tensor in self._tensors(site).items():
                found[site.key(suffix)] = tensor
        for path in self._record.saved:
            for key, tensor in self._module(path).state_dict().items():
                found[f"{path}.{key}"] = tensor
        return found

    def __repr__(self) -> str:
        state = "" if self.attached else ", reverted"
        return f"<Handle {self.name!r} on {type(self.model).__name__}{state}>"

    def __str__(self) -> str:
        """A tree of what changed with parameter counts."""
        if not self.attached:
            return repr(self)
        sizes = {s: sum(t.numel() for t in self._tensors(s).values()) for s in self._record.sites}
        leaves = gathered(sizes, self._label, self._record.skipped)
        for path in self._record.saved:
            size = sum(p.numel() for p in self._module(path).parameters())
            leaves.append(Leaf(path, "trained whole", f"{size:,}"))
        trained = sum(p.numel() for p in self.model.parameters() if p.requires_grad)
        total = sum(p.numel() for p in self.model.parameters())
        share = 100 * trained / total if total else 0.0
        merged = ", merged" if self.merged else ""
        return (
            f"{self.delta}\n{self.name!r} on {type(self.model).__name__}{merged}\n{draw(leaves)}\n"
            f"trained: {trained:,} of {total:,} parameters ({share:.2f} %)"
        )

    # ------------------------------------------------------------------------------ switching

    def disable(self, *parts: str) -> None:
        """Switch parts off until :meth:`enable`: the model computes as if they were not there.

        Args:
            parts: their names in :attr:`parts`; all without any. ``modules_to_save``, which are no
                part's, stay as trained. A file holds what is off as well.
        Raises: ConfigError for an unknown name; AttachError while the delta is merged.
        """
        self._turn("disable", parts, False)

    def enable(self, *parts: str) -> None:
        """Undo :meth:`disable`, for all parts without a name. Raises: as there."""
        self._turn("enable", parts, True)

    @property
    def enabled(self) -> tuple[str, ...]:
        """Names of the parts that are not switched off."""
        return tuple(p or self.name for p in parts_of(self.delta) if p not in self._record.off)

    def weigh(self, part: str, factor: float) -> None:
        """Have ``part`` add ``factor`` times what it adds by itself; 1 undoes it.

        A file holds it: with alphas that are ``factor`` times those of the delta.

        Args:
            part: its name in :attr:`parts`.
            factor: dimensionless, also 0 or below.
        Raises: ConfigError for an unknown name, and for a method that does not just add;
            AttachError while the delta is merged.
        """
        self._check_attached("weigh")
        (chosen,) = self._chosen([part])
        self._check_unmerged("weigh")
        weighed = parts_of(self.delta)[chosen].weighed(factor)
        for site in self._record.sites:
            if site.part == chosen:
                weighed.reread(site, self._module(site.path), self._part(site)[1])
        self._record.weights[chosen] = factor

    @property
    def weights(self) -> dict[str, float]:
        """Name of each part → its factor; see :meth:`weigh`."""
        found = self._record.weights
        return {part or self.name: found.get(part, 1.0) for part in parts_of(self.delta)}

    @contextlib.contextmanager
    def disabled(self, *parts: str) -> Iterator[None]:
        """Inside, the model computes what it did before the delta was attached; also when nested.

        Inside, the delta can be reverted, and neither merged nor saved. A copy of the model that is
        made inside stays as it is there until :func:`handle_of` is asked for its handle.

        Args:
            parts: names in :attr:`parts`: only these are off inside, as by :meth:`disable`.
        Raises: AttachError when the delta is merged and the base weights were not kept, or is
            merged and ``parts`` are named; ConfigError for an unknown name.
        """
        if parts:
            on = [name for name in parts if name in self.enabled]
            self.disable(*parts)
            try:
                yield
            finally:
                if self.attached and on:  # not reverted inside
                    self.enable(*on)
            return
        self._check_attached("disabled")
        if self._record.disabled is not None:
            yield
            return
        merged = self._exchange_merged() if self.merged else {}
        self._activate(False)
        trained = {p: exchange(self._module(p), o) for p, o in self._record.originals.items()}
        taken = self._record.disabled = Disabled(trained, merged)
        try:
            yield
        finally:
            if self.attached:  # not reverted inside
                self._enable(taken)

    # -------------------------------------------------------------------------------- merging

    def merge(self, *, keep_base: bool = True) -> None:
        """Add the delta to the weights, so that inference costs what the base model costs.

        Each place gets a new weight; the original one is kept, in full, so that :meth:`unmerge`
        gives its bits back. That is the memory of all merged weights once more. With
        ``keep_base=False`` it is dropped, and neither unmerge nor revert is possible any more.

        Raises: AttachError when already merged, when the delta cannot become part of the weights
            (an adapter's activation stands in the way), or when a merged weight is not finite; the
            model is as it was then.
        """
        self._check_enabled("merge")
        if self.merged:
            raise AttachError("handle.merge: already merged. Call handle.unmerge() first.")
        if told_apart(self.model):
            raise AttachError(
                "handle.merge: adapters_by_sample is open, and one weight is for all samples. "
                "Leave it first."
            )
        if self._record.off:
            raise AttachError(
                f"handle.merge: {', '.join(sorted(set(self.parts) - set(self.enabled)))} is "
                "switched off, and would be lost. Call handle.enable() first."
            )
        bound: dict[str, list[tuple[Delta, str]]] = {}
        for site in self._record.sites:
            reason = self._part(site)[0].unmergeable(self._module(site.path))
            if isinstance(self.delta, Combined) and self.delta.gated:
                reason = reason or NO_MERGE
            if reason is not None:
                of = f"the part {site.part!r} at " if site.part else ""
                raise AttachError(
                    f"handle.merge: {of}{site.path or WHOLE!r}: {reason}. Keep the delta applied, "
                    "and save it with handle.save(path)."
                )
            bound.setdefault(site.path, []).append(self._part(site))
        values = {
            path: merged_parameters(deltas, self._module(path), path)
            for path, deltas in bound.items()
        }
        self._activate(False)
        done: dict[str, dict[str, nn.Parameter | None]] = {}
        for path, parameters in values.items():
            done[path] = exchange_parameters(self._module(path), dict(parameters))
        self._record.merged = dict(done) if keep_base else dict.fromkeys(done)

    def unmerge(self) -> None:
        """Undo :meth:`merge`: the base weights' own bits come back, nothing is subtracted.

        Raises: AttachError when not merged, or merged with ``keep_base=False``.
        """
        self._check_enabled("unmerge")
        if not self.merged:
            raise AttachError("handle.unmerge: the delta is not merged. Call handle.merge() first.")
        self._exchange_merged()
        self._activate(True)
        self._record.merged = {}

    def merge_and_unload(self) -> nn.Module:
        """Merge for good and take the delta off: a plain model of the original classes.

        What ``modules_to_save`` trained stays in. Returns the model; the handle is spent.
        Raises: AttachError when a merged weight is not finite.
        """
        self._check_enabled("merge_and_unload")
        if not self.merged:
            self.merge(keep_base=False)
        self._unbind()
        self._restore_flags()
        restore_losses(self.model)
        restore_blocks(self.model)
        write(self.model, None)
        return self.model

    # ---------------------------------------------------------------------- saving, undoing

    def save(
        self,
        path: str | os.PathLike[str],
        *,
        flat: bool = False,
        part: str | None = None,
        format: str = "auto",
    ) -> None:
        """Write the adapter, in PEFT's format where it can hold it: :func:`deltaops.surgery.save`.

        Args:
            path: a folder.
            flat: write what computes the same without what only training needs: of a
                reparameterised :class:`deltaops.Prefix` its keys and values, of a
                :class:`deltaops.IntrinsicPrompt` the prompt itself, of a
                :class:`deltaops.IntrinsicAdapter` the adapters.
            part: write this part of a combination alone, as the delta that it is; None writes all
                of them, in one file.
            format: "auto", or "peft" or "deltaops" to have that format or an error.
        Raises: CheckpointError when it cannot be written, or no file could say what is bound;
            ConfigError for an unknown part.
        """
        from .checkpoint import save  # checkpoint needs Handle for what load returns

        self._check_enabled("save")

        with self._applied():
            save(self, path, flat=flat, part=part, format=format)

    def revert(self) -> None:
        """Give the model back as it was: classes, keys, every bit and every requires_grad flag.

        Raises: AttachError when merged with ``keep_base=False``.
        """
        self._check_attached("revert")
        if self.merged:
            self._exchange_merged()
            self._record.merged = {}
        self._unbind()
        for path, tensors in self._record.originals.items():
            exchange(self._module(path), tensors)
        self._restore_flags()
        restore_losses(self.model)
        restore_blocks(self.model)
        write(self.model, None)

    # -------------------------------------------------------------------------------- details

    def _module(self, path: str) -> nn.Module:
        return self.model.get_submodule(path)

    def _part(self, site: Site) -> tuple[Delta, str]:
        """The delta that is bound at ``site``, and the name of its adapter."""
        return parts_of(self.delta)[site.part], site.part or self.name

    def _tensors(self, site: Site) -> dict[str, nn.Parameter]:
        delta, name = self._part(site)
        module = self._module(site.path)
        return delta.tensors(module, name) | gate_tensors(module, name)

    def _label(self, site: Site) -> str:
        """Of a site in the tree."""
        delta, name = self._part(site)
        own = f" {name!r}" if site.part not in ("", delta.kind) else ""
        factor = self._record.weights.get(site.part, 1.0)
        times = "" if factor == 1 else f" × {factor:g}"
        return f"{delta.kind}{own}{times}{' (off)' if site.part in self._record.off else ''}"

    def _chosen(self, parts: Iterable[str]) -> list[str]:
        """The parts of these names as sites have them, all without any. Raises: ConfigError."""
        known = {part or self.name: part for part in parts_of(self.delta)}
        wanted = list(parts) or list(known)
        for name in wanted:
            if name not in known:
                raise ConfigError(
                    f"handle: no part is called {name!r}; there are {', '.join(known)}."
                )
        return [known[name] for name in wanted]

    def _turn(self, action: str, parts: Iterable[str], active: bool) -> None:
        self._check_attached(action)
        chosen = self._chosen(parts)
        self._check_unmerged(action)
        if active:
            self._record.off.difference_update(chosen)
        else:
            self._record.off.update(chosen)
        if self._record.disabled is None:
            self._activate(True, chosen)

    def _check_attached(self, action: str) -> None:
        if not self.attached:
            raise AttachError(
                f"handle.{action}: the delta is no longer on the model. Attach it again with "
                "deltaops.attach or deltaops.load."
            )

    def _check_unmerged(self, action: str) -> None:
        if self.merged:
            raise AttachError(
                f"handle.{action}: the delta is merged, all parts in one weight. Call "
                "handle.unmerge() first."
            )

    def _check_enabled(self, action: str) -> None:
        self._check_attached(action)
        if self._record.disabled is not None:
            raise AttachError(
                f"handle.{action}: the delta is disabled here, and what it trained is not in the "
                "model. Call it outside of `with handle.disabled()`."
            )

    def _activate(self, active: bool, parts: Iterable[str] | None = None) -> None:
        """Switch ``parts``, all without: off, or on but for what is switched off by itself."""
        deltas = parts_of(self.delta)
        chosen = set(deltas if parts is None else parts)
        on = chosen - self._record.off if active else set()
        for site in self._record.sites:
            if site.part in chosen:
                delta, name = self._part(site)
                delta.activate(self._module(site.path), site.part in on, name)
        for part in chosen:
            deltas[part].switch(self.model, part in on)

    def _enable(self, taken: Disabled) -> None:
        """Put back what :meth:`disabled` took out."""
        for path, tensors in taken.trained.items():
            exchange(self._module(path), tensors)
        if taken.merged:
            for path, parameters in taken.merged.items():
                exchange_parameters(self._module(path), parameters)
        else:
            self._activate(True)
        self._record.disabled = None

    @contextlib.contextmanager
    def _applied(self) -> Iterator[None]:
        """Inside, what is merged is applied instead, where the base weights were kept, and every
        part is on."""
        off = set(self._record.off)
        if off:  # then nothing is merged
            self.enable()
            try:
                yield
            finally:
                self.disable(*(part or self.name for part in off))
            return
        if not self.merged or None in self._record.merged.values():
            yield
            return
        merged = self._exchange_merged()
        self._activate(True)
        try:
            yield
        finally:
            self._activate(False)
            for path, parameters in merged.items():
                exchange_parameters(self._module(path), parameters)

    def _exchange_merged(self) -> dict[str, dict[str, nn.Parameter | None]]:
        """Put the originals back; returns the merged parameters."""
        merged = self._record.merged
        originals = {path: kept for path, kept in merged.items() if kept is not None}
        if len(originals) < len(merged):
            raise AttachError(
                "the base weights were dropped by handle.merge(keep_base=False), so their bits "
                "cannot come back. Load the base model again."
            )
        return {p: exchange_parameters(self._module(p), kept) for p, kept in originals.items()}

    def _unbind(self) -> None:
        modules = dict(self.model.named_modules())
        for site in self._record.sites:
            self._part(site)[0].unbind(site, modules)
        for delta in parts_of(self.delta).values():
            delta.leave(self.model)
        for path in self._record.frozen:
            unbecome(modules[path])

    def _restore_flags(self) -> None:
        for name, parameter in self.model.named_parameters():
            parameter.requires_grad_(name in self._record.trained_before)


def handle_of(model: nn.Module) -> Handle | None:
    """The handle of what is attached to ``model``, also after ``deepcopy`` or unpickling.

    A copy that was made while the delta was disabled is enabled again.
    """
    record = read(model)
    if record is None:
        return None
    handle = Handle(model, record)
    if record.disabled is not None and not record.disabled.inside:
        handle._enable(record.disabled)
    return handle


def gathered(
    sizes: Mapping[Site, int], label: Callable[[Site], str], skipped: Iterable[tuple[str, str]]
) -> list[Leaf]:
    """Lines of the tree: one for each path, also where several parts meet.

    Args:
        sizes: parameters of each site.
        label: what to call the delta of a site.
        skipped: paths left alone, with the reason; a path that another part took is not.
    """
    by_path: dict[str, list[Site]] = {}
    for site in sizes:
        by_path.setdefault(site.path, []).append(site)
    leaves = []
    for path, sites in by_path.items():
        what = " + ".join(filter(None, map(label, sites)))
        size = sum(sizes[site] for site in sites)
        leaves.append(Leaf(path, f"{describe(sites[0])} {what}".rstrip(), f"+{size:,}"))
    return leaves + [Leaf(p, f"left alone: {why}", "") for p, why in skipped if p not in by_path]


def describe(site: Site) -> str:
    """A site's class and size."""
    if site.place == MODEL:
        return f"shared by all, {site.in_features}→{site.out_features}"
    if site.place in (NORM, STACK):
        return f"{site.kind} {site.in_features}"
    if site.place in BY_PARAMETER:
        sizes = f"{site.in_features}→{site.out_features}"
        return f"{site.kind} {sizes} {', '.join(site.parameters)}"
    return f"{site.kind} {site.in_features}→{site.out_features}"
