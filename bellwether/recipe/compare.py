"""The recipe's section of a comparison: its arms, its seeds, and the trials before it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field

from bellwether.recipe.section import Section, arm_name


class Arm(Section):
    """One arm of a comparison: who trains, and how long."""

    trains: Literal["nobody", "alone", "together", "federation", "most frequent answer", "nearest row"] = Field(
        "federation",
        description="nobody (untuned), alone (each client on its own rows), together (all rows in one place), "
        "federation, or a rule that needs no model: most frequent answer (of a category), nearest row (its answer)",
    )
    clients: tuple[str, ...] | None = Field(None, min_length=1, description="clients that train alone; null: all")
    learning_rate: float | None = Field(None, gt=0, description="the optimizer's step size; null takes the recipe's")
    learning_rates: tuple[Annotated[float, Field(gt=0)], ...] | None = Field(
        None, min_length=1, description="step sizes that its trials try, as many as others' (compare.tune); null: those"
    )
    passes: int | None = Field(
        None, ge=1, description="passes over each client's rows, on average; null: as many as the recipe's rounds make"
    )
    steps: int | None = Field(None, ge=1, description="optimizer steps, instead of passes (alone, together)")
    set: Mapping[str, Any] = Field({}, description="dotted fields of the recipe that are others in this arm")

    @property
    def learns(self) -> bool:
        """Whether anything is trained."""
        return self.trains in ("alone", "together", "federation")

    @property
    def counts_steps(self) -> bool:
        """Whether its own settings count optimizer steps instead of passes."""
        return self.steps is not None or self.set.get("training.local_steps") is not None


class Tune(Section):
    """Trials on validation rows, equally many for each arm that trains."""

    seeds: tuple[Annotated[int, Field(ge=0, lt=2**63)], ...] = Field(
        (0, 1, 2), min_length=1, description="seeds of the trials"
    )
    learning_rates: tuple[Annotated[float, Field(gt=0)], ...] = Field(
        (2e-3, 4e-3, 8e-3, 16e-3), min_length=1, description="the optimizer's step sizes to try"
    )
    passes: tuple[Annotated[int, Field(ge=1)], ...] | None = Field(
        (10, 20, 40), min_length=1, description="passes over each client's rows to try; null: each arm says its own"
    )
    choose_by: Literal["loss", "rouge_l", "exact", "preferred", "clients_loss"] = Field(
        "loss",
        description="macro score that chooses; preferred, of preference rows: the share of pairs decided right; "
        "clients_loss: the mean over clients of the loss of what each serves on "
        "rows that it holds out itself, where methods let them serve adapters of their own",
    )

    @property
    def answers(self) -> bool:
        """Whether answers choose, so that trials must generate some."""
        return self.choose_by in ("rouge_l", "exact")

    @property
    def less_is_better(self) -> bool:
        """Whether the smallest score is the best."""
        return self.choose_by in ("loss", "clients_loss")


class Compare(Section):
    """What ``bellwether compare`` compares; a single run does not look at it."""

    seeds: tuple[Annotated[int, Field(ge=0, lt=2**63)], ...] = Field(
        (0, 1, 2, 3, 4), min_length=1, description="seeds of the runs"
    )
    arms: Mapping[Annotated[str, AfterValidator(arm_name)], Arm] = Field(
        {
            "base": Arm(trains="nobody"),
            "local": Arm(trains="alone"),
            "centralized": Arm(trains="together"),
            "federated": Arm(trains="federation"),
        },
        min_length=1,
        description="the arms by name",
    )
    tune: Tune | None = Field(None, description="trials for learning rate and passes; null takes the arms' own")

    @property
    def tuned(self) -> dict[str, Arm]:
        """The arms that take part in the trials: those that train and do not count steps."""
        return {name: arm for name, arm in self.arms.items() if self.tune and arm.learns and not arm.counts_steps}
