"""The recipe's section of the method: its name, and beside it the hyperparameters of that method alone."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Discriminator, Field, Tag

from bellwether.recipe.section import Section, ours_or_own

_NAMES = (
    *("fedavg", "uniform", "fedprox", "fedavgm", "fedadam", "fedyogi", "fedadagrad", "scaffold"),
    *("ffa_lora", "rolora", "flora", "fedex_lora", "flexlora", "hetlora", "fedsa_lora", "ditto", "feddpa"),
)
_NAME = "the method; the fields beside it are its own"
_SERVER_RATE = "the server's step size, eta"
_BETA1, _BETA2 = "decay of the server's first moment", "decay of the server's second moment"
_TAU = "degree of adaptivity, tau, added to the root of the second moment, which begins with its square"


class Tunable(Section):
    """A method after whose rounds clients may tune what they serve."""

    name: str  # stands first, and is each method's own
    fine_tune: bool = Field(
        False,
        description="whether in the last round all clients tune what they serve on their own rows and keep it, and "
        "nothing is averaged",
    )


class FedAvg(Tunable):
    """FedAvg: the mean of the clients' adapters, weighted by rows, as FedIT has it."""

    name: Literal["fedavg"] = Field("fedavg", description=_NAME)


class Uniform(Tunable):
    """The mean of the clients' adapters, every client alike."""

    name: Literal["uniform"] = Field("uniform", description=_NAME)


class FedProx(Tunable):
    """FedAvg, and at the clients a pull back to the adapter that the round began with."""

    name: Literal["fedprox"] = Field("fedprox", description=_NAME)
    mu: float = Field(0.01, gt=0, description="FedProx's mu, how strongly a client's adapter is drawn back")


class FedAvgM(Tunable):
    """FedAvg with momentum at the server."""

    name: Literal["fedavgm"] = Field("fedavgm", description=_NAME)
    learning_rate: float = Field(1.0, gt=0, description=_SERVER_RATE)
    momentum: float = Field(0.9, ge=0, lt=1, description="decay of the server's momentum")


class FedAdam(Tunable):
    """Adam at the server."""

    name: Literal["fedadam"] = Field("fedadam", description=_NAME)
    learning_rate: float = Field(1e-2, gt=0, description=_SERVER_RATE)
    beta1: float = Field(0.9, ge=0, lt=1, description=_BETA1)
    beta2: float = Field(0.99, ge=0, lt=1, description=_BETA2)
    tau: float = Field(1e-3, gt=0, description=_TAU)


class FedYogi(Tunable):
    """Yogi at the server."""

    name: Literal["fedyogi"] = Field("fedyogi", description=_NAME)
    learning_rate: float = Field(1e-2, gt=0, description=_SERVER_RATE)
    beta1: float = Field(0.9, ge=0, lt=1, description=_BETA1)
    beta2: float = Field(0.99, ge=0, lt=1, description=_BETA2)
    tau: float = Field(1e-3, gt=0, description=_TAU)


class FedAdagrad(Tunable):
    """Adagrad at the server."""

    name: Literal["fedadagrad"] = Field("fedadagrad", description=_NAME)
    learning_rate: float = Field(1e-2, gt=0, description=_SERVER_RATE)
    beta1: float = Field(0.0, ge=0, lt=1, description=_BETA1)
    tau: float = Field(1e-3, gt=0, description=_TAU)


class Scaffold(Tunable):
    """SCAFFOLD: control variates at the server and at every client."""

    name: Literal["scaffold"] = Field("scaffold", description=_NAME)
    learning_rate: float = Field(1.0, gt=0, description=_SERVER_RATE)


class FfaLora(Tunable):
    """FFA-LoRA: A stays as it was drawn at first, B alone is trained."""

    name: Literal["ffa_lora"] = Field("ffa_lora", description=_NAME)


class RoLora(Tunable):
    """RoLoRA: B is trained in odd rounds, A in even ones."""

    name: Literal["rolora"] = Field("rolora", description=_NAME)


class Flora(Tunable):
    """FLoRA: the mean of the clients' products is folded into the base, and every round begins anew."""

    name: Literal["flora"] = Field("flora", description=_NAME)


class FedExLora(Tunable):
    """FedEx-LoRA: FedAvg, and what its adapter lacks of the mean of products is folded into the base."""

    name: Literal["fedex_lora"] = Field("fedex_lora", description=_NAME)


class FlexLora(Tunable):
    """FlexLoRA: clients of unlike ranks (lora.ranks), whose products are averaged."""

    name: Literal["flexlora"] = Field("flexlora", description=_NAME)


class HetLora(Tunable):
    """HetLoRA: clients of unlike ranks (lora.ranks), whose factors are filled up with zeros and averaged."""

    name: Literal["hetlora"] = Field("hetlora", description=_NAME)
    norm_weights: bool = Field(
        False,
        description="whether clients are weighted by the norm of their products, as in the paper, instead of by rows; "
        "whoever sends large values has a large weight then",
    )


class FedSaLora(Tunable):
    """FedSA-LoRA: A is shared, and every client keeps a B of its own."""

    name: Literal["fedsa_lora"] = Field("fedsa_lora", description=_NAME)


class Ditto(Tunable):
    """FedAvg, and beside it at every client an adapter of its own, drawn to the shared one."""

    name: Literal["ditto"] = Field("ditto", description=_NAME)
    pull: float = Field(
        0.1, ge=0, description="Ditto's lambda, how strongly a client's own adapter is drawn to the shared one"
    )


class FedDpa(Section):
    """FedAvg, and beside it at every client a local adapter, of which and of the shared one a mix is served."""

    name: Literal["feddpa"] = Field("feddpa", description=_NAME)
    mix: float = Field(0.5, ge=0, le=1, description="the share of the local adapter in what a client serves")
    variant: Literal["F", "T"] = Field(
        "T", description="T: the local adapter is trained in every round; F: in the last one, in which all clients do"
    )


class OwnMethod(Section):
    """A person's own method: a function that returns one."""

    name: Annotated[str, AfterValidator(ours_or_own(*_NAMES))] = Field(description="package.module:function")
    parameters: Mapping[str, bool | int | float | str] = Field({}, description="what the function is called with")


# Of ours by their names; any other name is a person's own function.
METHODS: dict[str, type[Section]] = {
    section.model_fields["name"].default: section
    for section in (
        *(FedAvg, Uniform, FedProx, FedAvgM, FedAdam, FedYogi, FedAdagrad, Scaffold),
        *(FfaLora, RoLora, Flora, FedExLora, FlexLora, HetLora, FedSaLora, Ditto, FedDpa),
    )
}
OWN = "own"


def _tag(value: Any) -> str:
    """Return which section a value of the field ``method`` is of."""
    name = value.get("name", "fedavg") if isinstance(value, Mapping) else getattr(value, "name", OWN)
    return name if isinstance(name, str) and name in METHODS else OWN


MethodSection = Annotated[
    Annotated[FedAvg, Tag("fedavg")]
    | Annotated[Uniform, Tag("uniform")]
    | Annotated[FedProx, Tag("fedprox")]
    | Annotated[FedAvgM, Tag("fedavgm")]
    | Annotated[FedAdam, Tag("fedadam")]
    | Annotated[FedYogi, Tag("fedyogi")]
    | Annotated[FedAdagrad, Tag("fedadagrad")]
    | Annotated[Scaffold, Tag("scaffold")]
    | Annotated[FfaLora, Tag("ffa_lora")]
    | Annotated[RoLora, Tag("rolora")]
    | Annotated[Flora, Tag("flora")]
    | Annotated[FedExLora, Tag("fedex_lora")]
    | Annotated[FlexLora, Tag("flexlora")]
    | Annotated[HetLora, Tag("hetlora")]
    | Annotated[FedSaLora, Tag("fedsa_lora")]
    | Annotated[Ditto, Tag("ditto")]
    | Annotated[FedDpa, Tag("feddpa")]
    | Annotated[OwnMethod, Tag(OWN)],
    Discriminator(_tag),
]
