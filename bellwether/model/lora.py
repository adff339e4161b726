"""LoRA layers over a frozen base, for one adapter or for many at once.

The base's module tree stays as it is: a hook at each adapted module adds ``low_rank_update`` to its output, of inputs
of which dropout has set some to zero. A module's adapters stand in K slots, A_KRI and B_KOR, and each row of a batch
belongs to one slot, so that several clients can be trained in one forward pass over the same base. As in PEFT, A and B
are float32 whatever the base's precision, the input is brought to their precision, and the sum is rounded once to the
base's.

Shape legend: K slots, R rank, I inputs, O outputs, M tokens of all rows, S chosen ones of them.
"""

from __future__ import annotations

import contextlib
import math
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.checkpoint import checkpoint

from bellwether.errors import ModelError
from bellwether.exchange.adapter import Adapter, AdapterConfig, Tensors, key_a, key_b
from bellwether.model.base import Base, linear_shapes, output_shape
from bellwether.model.dropout import DropoutMasks
from bellwether.model.facts import LinearShape, ModelFacts
from bellwether.model.low_rank import Routing, add_low_rank
from bellwether.recipe import recipe

# The gradients of stacked adapters are views of one stretch of memory, as the adapters are, on purpose.
warnings.filterwarnings("ignore", message="grad and param do not obey the gradient layout contract")


# Bytes of adapted weights at most of which copies are made to merge an adapter into.
MERGED = 2**28


def low_rank_update(x_MI: torch.Tensor, a_RI: torch.Tensor, b_OR: torch.Tensor, scaling: float) -> torch.Tensor:
    """Return what LoRA adds to the output of a frozen module: ``scaling · x A^T B^T``.

    Hu et al. 2021 (arXiv 2106.09685), section 4.1, which writes one token as a column: h = W x + scaling · B A x. This
    is the definition; layers come to the same faster, for the tokens of many adapters at once by
    ``low_rank.add_low_rank``, and for one adapter that is not trained by ``LoraLayers.merged``, as tests prove.

    Args:
        x_MI: what the module gets, M tokens of I values.
        a_RI: A, which brings I values to R, the rank.
        b_OR: B, which brings R values to the module's O outputs.
        scaling: alpha / rank, or alpha / sqrt(rank) with rsLoRA.

    Returns:
        update_MO.
    """
    return scaling * (x_MI @ a_RI.T @ b_OR.T)


def resolve_targets(
    model: Any | ModelFacts, wanted: Sequence[str] | Literal["all-linear"], rank: int = 1
) -> tuple[str, ...]:
    """Return the full paths of the modules to adapt, in the order of the model.

    Works on a model, also one on the meta device, and on the facts of one that is not loaded yet.

    Args:
        model: a transformers model, or its facts.
        wanted: last parts of paths, ends of paths or whole paths, or ``all-linear`` for every linear
            module but the output layer, as PEFT takes it.
        rank: LoRA's rank, which must fit into every module that is named; with ``all-linear`` it may be above the
            size of single ones, such as a gate of width 1, as in PEFT.

    Raises:
        ModelError: a name is unknown, names no linear module, or the rank is above a module's size.
    """
    shapes = _shapes(model)
    chosen = shapes if wanted == "all-linear" else _named(shapes, wanted, _output_path(model))
    sizes = [min(shape.inputs, shape.outputs) for shape in chosen]
    narrow = max(sizes) if wanted == "all-linear" else min(sizes)
    if rank > narrow:
        shape = chosen[sizes.index(narrow)]
        raise ModelError(
            f"lora.rank is {rank}, but {shape.path} is only {shape.inputs} × {shape.outputs}; give at most {narrow}."
        )
    return tuple(shape.path for shape in chosen)


def short_names(model: Any | ModelFacts, modules: Sequence[str]) -> tuple[str, ...]:
    """Return the last parts of adapted modules' paths where these name exactly them, else whole paths.

    PEFT takes either; other software that serves adapters knows last parts only.
    """
    leaves = dict.fromkeys(path.rpartition(".")[2] for path in modules)
    everything = (*(shape.path for shape in _shapes(model)), _output_path(model))
    named = {path for path in everything if path.rpartition(".")[2] in leaves}
    return tuple(leaves) if named == set(modules) else tuple(modules)


def adapter_config(base: Base | ModelFacts, lora: recipe.Lora) -> AdapterConfig:
    """Return the configuration of the adapter that a recipe describes.

    Raises:
        ModelError: as ``resolve_targets``.
    """
    facts = base if isinstance(base, ModelFacts) else base.facts
    modules = resolve_targets(facts, lora.target_modules, lora.rank)
    transposed = {shape.path: shape.transposed for shape in facts.linears}
    return AdapterConfig(
        rank=lora.rank,
        alpha=lora.alpha,
        dropout=lora.dropout,
        modules=modules,
        rslora=lora.rslora,
        fan_in_fan_out=all(transposed[path] for path in modules),
        base_model=facts.name,
        target_modules=short_names(facts, modules),
    )


def check_lora(base: Base | ModelFacts, lora: recipe.Lora) -> None:
    """Check that the adapter which a recipe describes fits a base model, before its weights are loaded.

    Raises:
        ModelError: as ``resolve_targets``.
    """
    adapter_config(base, lora)


def initial_adapter(base: Base | ModelFacts, lora: recipe.Lora, generator: torch.Generator) -> Adapter:
    """Return the adapter that a run starts from: A uniform within ±1/√I, B zero, as PEFT's.

    Args:
        base: the base model or its facts.
        lora: rank, alpha, dropout and target modules.
        generator: a CPU generator, the only source of A.

    Raises:
        ModelError: as ``resolve_targets``.
    """
    facts = base if isinstance(base, ModelFacts) else base.facts
    config = adapter_config(facts, lora)
    shapes = {shape.path: shape for shape in facts.linears}
    tensors: dict[str, NDArray[Any]] = {}
    for path in config.modules:
        a_RI = torch.empty(lora.rank, shapes[path].inputs)
        torch.nn.init.kaiming_uniform_(a_RI, a=math.sqrt(5), generator=generator)
        tensors[key_a(path)] = a_RI.numpy()
        tensors[key_b(path)] = np.zeros((shapes[path].outputs, lora.rank), np.float32)
    return Adapter(config, tensors)


class LoraLayers(torch.nn.Module):
    """LoRA adapters at modules of a frozen base, in K slots; attached until ``detach`` is called.

    Args:
        model: the base model, whose module tree and weights stay as they are.
        config: which modules are adapted, rank and scaling.
        slots: K.
        dtype: precision of A and B; float64 is for proofs.

    Raises:
        ModelError: a module of the configuration is not in the model.
    """

    def __init__(self, model: Any, config: AdapterConfig, slots: int = 1, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        shapes = {shape.path: shape for shape in linear_shapes(model)}
        unknown = [path for path in config.modules if path not in shapes]
        if unknown:
            raise ModelError(f"The adapter is for {unknown[0]}, which {type(model).__name__} does not have.")
        self.slots = slots
        self._shapes = [shapes[path] for path in config.modules]
        self._dtype, self._device = dtype, next(model.parameters()).device
        self._routing = Routing(None, None, None)
        self._enabled = True
        self._adapted: list[Any] = [model.get_submodule(path) for path in config.modules]
        self._make_room(config)
        self._handles: list[torch.utils.hooks.RemovableHandle] = [
            module.register_forward_hook(self._hook(number, path))
            for number, (path, module) in enumerate(zip(config.modules, self._adapted, strict=True))
        ]

    def _make_room(self, config: AdapterConfig) -> None:
        """Make empty slots for adapters of a configuration."""
        self.config, rank = config, config.rank
        # One stretch of memory per slot, so that an optimizer steps all modules of all slots at once.
        size = sum(rank * (shape.inputs + shape.outputs) for shape in self._shapes)
        self.values_KP = torch.zeros(self.slots, size, dtype=self._dtype, device=self._device)
        self.grads_KP = torch.zeros_like(self.values_KP)
        self.A, self.B, start = torch.nn.ParameterList(), torch.nn.ParameterList(), 0
        for shape in self._shapes:
            self.A.append(self._parameter(start, rank, shape.inputs))
            self.B.append(self._parameter(start + rank * shape.inputs, shape.outputs, rank))
            start += rank * (shape.inputs + shape.outputs)

    def fit(self, config: AdapterConfig) -> None:
        """Take adapters of this rank and scaling from now on; where they are others, what is in the slots is lost.

        Args:
            config: of adapters for the same modules.

        Raises:
            ModelError: it is for other modules.
        """
        if config.modules != self.config.modules:
            raise ModelError("The adapter is for other modules than the LoRA layers.")
        if (config.rank, config.scaling) != (self.config.rank, self.config.scaling):
            self._make_room(config)

    @contextlib.contextmanager
    def room(self, slots: int) -> Iterator[None]:
        """Have another number of slots for what happens inside; all are empty at its beginning and after its end.

        Args:
            slots: how many.
        """
        before, self.slots = self.slots, slots
        self._make_room(self.config)
        try:
            yield
        finally:
            self.slots = before
            self._make_room(self.config)

    @property
    def keys(self) -> tuple[str, ...]:
        """The keys of an adapter's tensors in the order in which their values stand in a slot."""
        return tuple(self._named())

    def where(self, keys: Sequence[str] | None) -> torch.Tensor | None:
        """Return mask_P: 1 at the values of these tensors in a slot, 0 at others; None where all are meant.

        Args:
            keys: of tensors, under PEFT's names.
        """
        if keys is None or set(keys) == set(self.keys):
            return None
        parts = [torch.full((value[0].numel(),), float(key in keys)) for key, value in self._named().items()]
        return torch.cat(parts).to(self.values_KP)

    @contextlib.contextmanager
    def folded(self, update: Adapter | None) -> Iterator[None]:
        """Add an update to the frozen weights for what happens inside; they come back afterwards.

        Args:
            update: its product, in its scaling, is added to each module that it is for; None adds nothing.

        Raises:
            ModelError: a module is no plain matrix, such as one that is quantised.
        """
        if update is None:
            yield
            return
        from transformers.pytorch_utils import Conv1D

        own = dict(zip(self.config.modules, self._adapted, strict=True))
        changed = [(own[path], own[path].weight.data, path) for path in update.config.modules]
        if any(type(module) not in (torch.nn.Linear, Conv1D) for module, _, _ in changed):
            raise ModelError("An update can be folded into plain linear modules only; set model.quantization to none.")
        with torch.no_grad():
            for module, weight, path in changed:
                precision = torch.float32 if weight.device.type == "mps" else torch.float64  # Apple's has no other
                a_RI, b_OR = (
                    torch.from_numpy(update.tensors[key(path)]).to(weight.device, precision) for key in (key_a, key_b)
                )
                change_OI = update.config.scaling * (b_OR @ a_RI)
                stored = change_OI.T if isinstance(module, Conv1D) else change_OI  # as (I, O)
                module.weight.data = (weight + stored).to(weight.dtype)
        try:
            yield
        finally:
            for module, weight, _ in changed:
                module.weight.data = weight

    def _parameter(self, start: int, rows: int, columns: int) -> torch.nn.Parameter:
        """Return a stacked matrix that is a view of the flat values, and its gradient one of the flat gradients."""

        def view(flat_KP: torch.Tensor) -> torch.Tensor:
            return flat_KP[:, start : start + rows * columns].view(self.slots, rows, columns)

        parameter = torch.nn.Parameter(view(self.values_KP))
        parameter.grad = view(self.grads_KP)
        return parameter

    def load(self, slot: int, tensors: Tensors) -> None:
        """Copy an adapter's tensors into a slot.

        Args:
            slot: which of the K.
            tensors: under PEFT's keys; keys and shapes must be those of the layers.

        Raises:
            ModelError: a key is missing or unknown, or a tensor has another shape.
        """
        wanted = self._named()
        if tensors.keys() != wanted.keys():
            odd = sorted(tensors.keys() ^ wanted.keys())[0]
            raise ModelError(f"The adapter does not fit the LoRA layers: {odd} is on one side only.")
        with torch.no_grad():
            for key, parameter in wanted.items():
                value = torch.from_numpy(np.ascontiguousarray(tensors[key]))
                if value.shape != parameter.shape[1:]:
                    raise ModelError(
                        f"{key} has shape {tuple(value.shape)}, but the LoRA layers need {tuple(parameter.shape[1:])}."
                    )
                parameter[slot].copy_(value)

    def read(self, slot: int) -> dict[str, NDArray[Any]]:
        """Return copies of a slot's tensors under PEFT's keys."""
        return {key: parameter[slot].detach().cpu().numpy().copy() for key, parameter in self._named().items()}

    @contextlib.contextmanager
    def routed(
        self,
        slots: Sequence[int] | None,
        masks: DropoutMasks | None = None,
        lengths: Sequence[int] | None = None,
    ) -> Iterator[None]:
        """Say, for forward passes inside, which slot each row of the batch belongs to.

        Args:
            slots: the slot of each row; None puts all rows into slot 0.
            masks: masks for the inputs of A, for the tokens in the order in which modules see them; None drops nothing.
            lengths: tokens of each row as modules see them; None where all rows have equally many.
        """
        before, self._routing = self._routing, Routing(slots, masks, lengths)
        try:
            yield
        finally:
            self._routing = before

    @contextlib.contextmanager
    def chosen(self, index_S: torch.Tensor, lengths: Sequence[int]) -> Iterator[None]:
        """Say that forward passes inside see some of the tokens only.

        Args:
            index_S: their numbers, in rising order.
            lengths: how many of them each row has.
        """
        now = self._routing
        with self.routed(now.slots, now.masks.at(index_S) if now.masks is not None else None, lengths):
            yield

    def recomputed(self, function: Callable[..., Any], *arguments: Any) -> Any:
        """Return what a function gives, keeping nothing of what happens inside: it runs again in the backward pass.

        Gradient checkpointing (Chen et al. 2016, arXiv 1604.06174); rows are routed then as they are now.
        """
        routing = self._routing

        @contextlib.contextmanager
        def again() -> Iterator[None]:
            before, self._routing = self._routing, routing
            try:
                yield
            finally:
                self._routing = before

        return checkpoint(
            function,
            *arguments,
            use_reentrant=False,
            preserve_rng_state=False,  # nothing inside draws: dropout derives from the rows
            context_fn=lambda: (contextlib.nullcontext(), again()),
        )

    @contextlib.contextmanager
    def disabled(self) -> Iterator[None]:
        """Make forward passes inside those of the untuned base."""
        before, self._enabled = self._enabled, False
        try:
            yield
        finally:
            self._enabled = before

    @contextlib.contextmanager
    def merged(self) -> Iterator[None]:
        """Put the adapter in slot 0 into the frozen weights for passes inside, which then cost no more than the base's.

        The weights themselves come back afterwards, since copies of those that are adapted stand in for them; no
        gradient is prepared inside. Where the copies would be larger than ``MERGED`` bytes, in large models that gain
        little, where a module is no plain matrix (quantised ones, GPT-2's), and where the layers are disabled, nothing
        is merged and passes are as elsewhere. The sum is rounded to the precision of the weights, as by PEFT's
        ``merge_and_unload``.
        """
        size = sum(module.weight.nbytes for module in self._adapted)
        plain = all(type(module) is torch.nn.Linear for module in self._adapted)
        with torch.no_grad():
            if not (self._enabled and plain and size <= MERGED):
                yield
                return
            own = [module.weight.data for module in self._adapted]
            try:
                for module, a_KRI, b_KOR, weight_OI in zip(self._adapted, self.A, self.B, own, strict=True):
                    # In the wider of both precisions, and then in that of the weights.
                    wide_OI = weight_OI + self.config.scaling * (b_KOR[0] @ a_KRI[0])
                    module.weight.data = wide_OI.to(weight_OI.dtype)
                with self.disabled():
                    yield
            finally:
                for module, weight_OI in zip(self._adapted, own, strict=True):
                    module.weight.data = weight_OI

    def detach(self) -> None:
        """Take the hooks off the base; the layers have no effect any more."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def _named(self) -> Mapping[str, torch.nn.Parameter]:
        """Return all stacked parameters under PEFT's keys, in the order of the model."""
        named: dict[str, torch.nn.Parameter] = {}
        for number, path in enumerate(self.config.modules):
            named[key_a(path)] = self.A[number]
            named[key_b(path)] = self.B[number]
        return named

    def _hook(self, number: int, path: str) -> Callable[..., torch.Tensor | None]:

        def add(module: torch.nn.Module, args: tuple[torch.Tensor, ...], output: torch.Tensor) -> torch.Tensor | None:
            if not self._enabled:
                return None
            routing, a_KRI, b_KOR = self._routing, self.A[number], self.B[number]
            x_MI = args[0].reshape(-1, args[0].shape[-1]).to(a_KRI.dtype)
            groups = routing.groups(x_MI, self.config.rank, path)
            mask_MI = routing.masks(path, x_MI) if routing.masks is not None else None
            wide_MO = output.reshape(-1, output.shape[-1]).to(a_KRI.dtype)
            summed_MO = add_low_rank(wide_MO, x_MI, a_KRI, b_KOR, self.config.scaling, mask_MI, groups)
            return summed_MO.view(output.shape).to(output.dtype)

        return add


def _shapes(model: Any | ModelFacts) -> tuple[LinearShape, ...]:
    """Return the adaptable modules of a model or of its facts."""
    return model.linears if isinstance(model, ModelFacts) else linear_shapes(model)


def _output_path(model: Any | ModelFacts) -> str:
    return (model.output_layer if isinstance(model, ModelFacts) else output_shape(model)).path


def _named(shapes: Sequence[LinearShape], wanted: Sequence[str], output: str) -> tuple[LinearShape, ...]:
    """Return the modules that any of the wanted names fits."""
    for name in wanted:
        if any(_fits(shape.path, name) for shape in shapes):
            continue
        known = ", ".join(dict.fromkeys(shape.path.rpartition(".")[2] for shape in shapes))
        if _fits(output, name):
            raise ModelError(
                f"lora.target_modules names {name!r}, the output layer, which is not adapted; there are {known}."
            )
        raise ModelError(f"lora.target_modules names {name!r}, which the model does not have; there are {known}.")
    return tuple(shape for shape in shapes if any(_fits(shape.path, name) for name in wanted))


def _fits(path: str, name: str) -> bool:
    """Return whether a name is a path or its end, at a dot."""
    return path == name or path.endswith(f".{name}")
