"""The recipe: the typed, frozen description of a run.

Every field has a default and says its unit. A recipe is read from YAML, takes dotted overrides
(``training.batch_size=4``), reports all its mistakes at once with file and line, and is saved,
resolved, with the results. It travels downwards only: rooms receive the sections they need.
"""

from __future__ import annotations

import codecs
import datetime
from collections.abc import Mapping
from typing import Annotated, Literal

from pydantic import AfterValidator, BeforeValidator, Field

from bellwether.recipe.compare import Arm, Compare, Tune
from bellwether.recipe.method import FedAvg, MethodSection
from bellwether.recipe.privacy import Privacy
from bellwether.recipe.section import Section, folder_name, ours_or_own, whole_numbers
from bellwether.recipe.secure import SecureAggregation
from bellwether.recipe.selection import Selection

__all__ = [
    "Arm",
    "Availability",
    "Columns",
    "Compare",
    "Compression",
    "Data",
    "Engine",
    "Evaluation",
    "Federation",
    "Lora",
    "Model",
    "Output",
    "Partition",
    "Privacy",
    "Recipe",
    "Section",
    "SecureAggregation",
    "Selection",
    "Training",
    "Tune",
]


class Model(Section):
    """The frozen base model."""

    path: str = Field(
        "starter",
        min_length=1,
        description="'starter' (embedded), a model folder, a GGUF file, or a name on the Hugging Face hub",
    )
    revision: str | None = Field(None, description="branch, tag or commit on the hub; null takes the default branch")
    device: str = Field("auto", description="auto, cpu, cuda, cuda:N or mps", pattern=r"^(auto|cpu|cuda(:\d+)?|mps)$")
    dtype: Literal["float32", "bfloat16", "auto"] = Field(
        "float32",
        description="precision of the frozen weights and of computing; adapters stay float32; auto takes bfloat16 "
        "where this machine is found to multiply 1.5 times as fast in it, and the run's own recipe says what was taken",
    )
    quantization: Literal["none", "8bit", "4bit"] = Field(
        "none",
        description="hold the frozen linear layers, but for the output layer, in 8 bits (LLM.int8) or 4 bits (NF4, as "
        "QLoRA); needs bitsandbytes; none keeps them in dtype",
    )
    attention: Literal["auto", "sdpa", "eager"] = Field(
        "auto", description="attention implementation; auto takes sdpa where the architecture has it, else eager"
    )
    threads: int = Field(0, ge=0, le=1024, description="CPU threads; 0 takes what torch finds")
    trust_remote_code: bool = Field(False, description="run Python code that the model's folder brings along")


class Columns(Section):
    """Which column of the source holds what; null finds the usual names, and '' takes none."""

    instruction: str | None = Field(
        None, description="column name; null tries instruction, prompt, question; '' takes none"
    )
    context: str | None = Field(None, description="column name; null tries context, input")
    response: str | None = Field(None, description="column name; null tries response, output, answer, completion")
    category: str | None = Field(None, description="column name; null tries category")
    messages: str | None = Field(
        None, description="column with a chat; null tries messages, conversations; '' takes none"
    )
    chosen: str | None = Field(
        None,
        description="column with the better of two answers to the instruction, or with a chat that ends with it; null "
        "tries chosen, where rows have no response; '' takes none",
    )
    rejected: str | None = Field(
        None, description="column with the other answer, or chat; null tries rejected; '' takes none"
    )
    group: str | None = Field(
        None,
        description="column with a language or domain; null tries language, domain, where they hold few short labels; "
        "'' takes none",
    )


class SourceColumns(Columns):
    """Which column of one source holds what."""

    source: str = Field(min_length=1, description="the file's name, or that of the data set on the hub")


def _known_encoding(name: str) -> str:
    try:
        codecs.lookup(name)
    except LookupError:
        raise ValueError("no encoding of that name is known; give one such as cp1252 or utf-16") from None
    return name


class Data(Section):
    """Which rows there are, how they become text and tokens, and which are held out."""

    sources: tuple[Annotated[str, Field(min_length=1)], ...] = Field(
        ("starter",),
        min_length=1,
        description="files, folders, hub names, or 'starter' and 'starter:lowland' (embedded, in two languages)",
    )
    split: str = Field("train", description="split to take of a data set on the hub")
    revision: str | None = Field(None, description="branch, tag or commit on the hub; null takes the default branch")
    config: str | None = Field(None, description="configuration of a data set on the hub; null takes its default")
    columns: Columns = Columns()
    source_columns: tuple[SourceColumns, ...] = Field(
        (), description="columns of single sources, each with its source; what they leave out is as in columns"
    )
    encoding: Annotated[str, AfterValidator(_known_encoding)] | None = Field(
        None,
        description="encoding of text files, such as cp1252; null takes UTF-8, or the form whose mark they begin with",
    )
    delimiter: str | None = Field(
        None, min_length=1, max_length=1, description="between the fields of CSV files; null finds it out: , ; tab |"
    )
    skip_bad_rows: bool = Field(False, description="whether rows that cannot be read are left out, and counted")
    test_sources: tuple[str, ...] = Field(
        (), description="sources of test rows, instead of holding some of the rows out"
    )
    validation_sources: tuple[str, ...] = Field(
        (), description="sources of validation rows, instead of holding some of the rows out"
    )
    test_rows_per_category: int = Field(
        10,
        ge=0,
        description="rows per category held out for the test; no effect with rows of its own (starter, test_sources)",
    )
    validation_rows_per_category: int = Field(
        0,
        ge=0,
        description="rows per category held out for validation; no effect with rows of its own "
        "(starter, validation_sources)",
    )
    unseen_categories: tuple[str, ...] = Field(
        (), description="categories that no client sees; all their rows may serve the test and validation"
    )
    max_rows: int | None = Field(None, ge=1, description="rows taken of the sources, drawn evenly; null takes all")
    seed: int | None = Field(
        None, ge=0, lt=2**63, description="the number that decides which rows are taken and held out; null: the run's"
    )
    template: Literal["auto", "alpaca", "chat"] = Field(
        "auto", description="prompt format; auto takes the tokenizer's chat template, else Alpaca's"
    )
    reasoning: bool = Field(
        False,
        description="whether answers of a chat begin with their reasoning, <think> ... </think>, and it is trained",
    )
    date: datetime.date = Field(
        datetime.date(2024, 7, 26), description="what a chat template prints that prints today's date"
    )
    loss_on: Literal["response", "all"] = Field("response", description="tokens that are trained")
    max_tokens: int = Field(512, ge=8, description="tokens per row, prompt and response together")


class Partition(Section):
    """How rows are dealt to clients."""

    method: Annotated[
        str,
        AfterValidator(ours_or_own("auto", "iid", "dirichlet", "categories", "shards", "quantity", "column", "files")),
    ] = Field(
        "auto",
        description="auto, iid, dirichlet (by category), categories (k per client), shards (sorted by category), "
        "quantity (unequal sizes), column (a natural one), files (one client each), or package.module:function; "
        "auto: files where there are several, else categories where all clients can share them, else dirichlet, "
        "and iid where rows name none",
    )
    clients: int = Field(10, ge=1, le=100_000, description="number of clients; column and files find their own")
    alpha: float = Field(0.5, gt=0, description="Dirichlet's concentration; small is uneven (dirichlet, quantity)")
    categories_per_client: Annotated[int | tuple[int, int], BeforeValidator(whole_numbers(single=True))] = Field(
        2, description="categories at each client, or [least, most] to draw their number for each (categories)"
    )
    shards_per_client: int = Field(2, ge=1, description="shards at each client (shards)")
    column: str | None = Field(None, description="name of the column that names the client (column)")
    min_rows: int = Field(1, ge=1, description="rows that each client must get")
    copies: int = Field(
        1,
        ge=1,
        le=10_000,
        description="how often the training rows are dealt, so that few rows make many simulated clients; the same row "
        "stands at several of them then",
    )
    rows_per_client: Annotated[tuple[int, int], BeforeValidator(whole_numbers(single=False))] | None = Field(
        None,
        description="[least, most] rows that a client keeps of those it is dealt, their number drawn for each; "
        "null keeps all",
    )
    clients_per_group: Mapping[str, Annotated[int, Field(ge=1, strict=True)]] | None = Field(
        None,
        min_length=1,
        description="how many clients hold rows of each group (data.columns.group) and of no other, such as "
        "{english: 5, french: 5}; null mixes groups",
    )
    client_test_fraction: float = Field(
        0.0, ge=0, lt=1, description="share of its rows that each client holds out and scores itself"
    )


class Lora(Section):
    """The adapter that is trained."""

    rank: int = Field(8, ge=1, description="rows of A and columns of B")
    alpha: float = Field(16.0, gt=0, le=1e6, description="LoRA's alpha; the update is scaled by alpha / rank")
    dropout: float = Field(0.05, ge=0, lt=1, description="probability of dropping an input of an adapted layer")
    target_modules: Annotated[tuple[str, ...], Field(min_length=1)] | Literal["all-linear"] = Field(
        "all-linear", description="names of the adapted modules (last part or whole path), or all-linear"
    )
    rslora: bool = Field(False, description="scale by alpha / sqrt(rank) instead of alpha / rank")
    ranks: Mapping[str, Annotated[int, Field(ge=1, strict=True)]] | tuple[Annotated[int, Field(ge=1)], ...] | None = (
        Field(
            None,
            min_length=1,
            description="ranks of clients, at most rank: {client-01: 4} by name, others have rank; or [2, 4, 8] to "
            "draw one for each client; null gives all the same; only for methods that take unlike ranks (flexlora, "
            "hetlora, flora)",
        )
    )


class Training(Section):
    """What a client does with its rows in a round."""

    loss: Annotated[str, AfterValidator(ours_or_own("cross_entropy", "dpo"))] = Field(
        "cross_entropy",
        description="what is minimised, a mean over the trained tokens of a step: cross_entropy, or "
        "package.module:function, which gets whole logits and so takes more time and memory; or dpo, a mean over the "
        "pairs of a step, for rows with a chosen and a rejected answer",
    )
    beta: float = Field(
        0.1, gt=0, le=100, description="how strongly the model is held to the base, its reference (dpo)"
    )
    optimizer: Literal["adamw", "sgd"] = Field(
        "adamw", description="adamw, or sgd: plain steps along the gradient, without momentum"
    )
    local_epochs: int = Field(1, ge=1, description="passes over the client's rows per round")
    local_steps: int | None = Field(None, ge=1, description="optimizer steps per round, instead of local_epochs")
    batch_size: int = Field(8, ge=1, description="rows per batch")
    accumulation: int = Field(1, ge=1, description="batches per optimizer step")
    learning_rate: float = Field(
        8e-3,
        gt=0,
        description="the optimizer's step size, before the schedule; the default suits AdamW on the embedded base, "
        "3e-4 larger ones",
    )
    weight_decay: float = Field(
        0.0,
        ge=0,
        description="decay of the adapter: AdamW's, decoupled, times the learning rate; of sgd added to the gradient",
    )
    clip_norm: float | None = Field(1.0, gt=0, description="largest norm of a step's gradient; null does not clip")
    schedule: Literal["constant", "linear", "cosine"] = Field(
        "linear", description="learning rate over the steps of all rounds"
    )
    warmup_rounds: int = Field(0, ge=0, description="rounds over which the learning rate rises to its full value")
    group_by_length: bool = Field(True, description="batches of rows of like length, in random order")
    gradient_checkpointing: bool = Field(
        False, description="compute each layer again in the backward pass, which takes less memory and more time"
    )


class Compression(Section):
    """In how few bytes updates and adapters travel; none sends every value in four."""

    up: Literal["none", "8bit", "4bit", "top_k"] = Field(
        "none",
        description="how clients send the change of their adapters: none (as whole tensors), 8bit or 4bit a value, "
        "rounded at random, in blocks of 64 with a scale, or top_k, the largest values alone",
    )
    down: Literal["none", "8bit", "4bit"] = Field(
        "none",
        description="how clients are sent what they train: none, or 8bit or 4bit a value; what a client does not "
        "train, and adapters to be scored, come whole",
    )
    keep: float = Field(0.1, gt=0, le=1, description="share of the values that top_k sends; at least one (up: top_k)")
    error_feedback: bool = Field(
        True, description="whether clients keep what compression left out of an update, and add it to their next one"
    )


class Availability(Section):
    """Simulated resources of clients: who is away, who is slow, who drops out."""

    away: float = Field(0.0, ge=0, lt=1, description="probability that a client is away in a round")
    drop_out: float = Field(0.0, ge=0, lt=1, description="probability that a client that was asked never answers")
    rows_per_second: float = Field(50.0, gt=0, description="median training speed of a client, rows per second")
    speed_spread: float = Field(
        0.0, ge=0, le=5, description="standard deviation of the logarithm of a client's speed; 0 makes all equal"
    )
    trace: str | None = Field(
        None,
        description="JSONL file with client, round, available, rows_per_second: what holds from that round on",
    )


class Engine(Section):
    """How simulated clients are trained on this machine; no site looks at it."""

    fuse: int = Field(
        1,
        ge=0,
        description="clients trained together over one base; 1 trains one by one, byte for byte as a site alone; "
        "0 takes the whole cohort, or a process's share of it",
    )
    tokens: int = Field(
        2048,
        ge=1,
        description="tokens, with padding, that run through the base at once where clients are trained together; less "
        "takes less memory, and a GPU may be faster with more",
    )
    processes: int = Field(
        1,
        ge=0,
        le=1024,
        description="processes that a cohort is split among, each with its own copy of the base: on CUDA devices in "
        "turn, on a CPU with its share of the threads; 1 trains in the one process that runs the rounds; 0 measures "
        "before the run begins what is fastest, and chooses model.threads with it",
    )


class Federation(Section):
    """Rounds: who takes part, how long the server waits, and what it believes of a client."""

    rounds: int = Field(20, ge=1, description="number of rounds")
    sampler: Annotated[str, AfterValidator(ours_or_own("uniform", "poisson", "available"))] = Field(
        "uniform",
        description="how the cohort is drawn: uniform, poisson (each client with the same probability, so that sizes "
        "vary), available, or package.module:function",
    )
    fraction: float = Field(0.5, gt=0, le=1, description="share of the clients in a cohort; at least one is taken")
    cohort_size: int | None = Field(None, ge=1, description="clients in a cohort, instead of fraction")
    quorum: float = Field(
        0.5, gt=0, le=1, description="share of the cohort whose updates a round needs; none where privacy hides clients"
    )
    deadline: float | None = Field(
        None, gt=0, description="simulated seconds after which replies are left out; null waits"
    )
    failed_rounds: int = Field(
        0, ge=0, description="rounds below the quorum that a run survives, its adapter unchanged; one more ends it"
    )
    max_rows: int = Field(1_000_000, ge=1, description="rows that one update may claim; more is rejected")
    max_norm: float = Field(
        1e4, gt=0, description="largest norm of an update's change, and of an array beside it; more is rejected"
    )
    availability: Availability | None = Field(None, description="simulated resources; null: all there, all fast")


class Evaluation(Section):
    """How the adapter is scored on held-out rows, before the first round and after the last."""

    every: int = Field(5, ge=0, description="rounds between evaluations; 0 scores only before and at the end")
    generate: bool = Field(True, description="also generate answers, for ROUGE-L and exact match")
    max_new_tokens: int = Field(48, ge=1, description="tokens generated per answer")
    batch_size: int = Field(
        32, ge=1, description="rows scored together; of a large model fewer answer at a time, as memory allows"
    )
    max_rows_per_category: int | None = Field(
        None, ge=1, description="test rows scored per category (and group, where rows name them); null scores all"
    )
    categories: tuple[str, ...] | None = Field(
        None, min_length=1, description="categories of the test rows that are scored; null scores all"
    )
    part: Literal["test", "validation"] = Field(
        "test", description="held-out rows to score; choose settings on validation, report on test"
    )
    samples: int = Field(8, ge=0, description="scored rows whose answers before and after are shown")


class Output(Section):
    """Where results go."""

    folder: Annotated[str, AfterValidator(folder_name)] | None = Field(
        None, description="run folder; null makes runs/NAME-N"
    )
    keep_checkpoints: int = Field(2, ge=2, description="rounds whose checkpoints are kept")
    trackers: tuple[Literal["tensorboard", "mlflow", "wandb", "trackio"], ...] = Field(
        (), description="experiment trackers to write to as well"
    )


class Recipe(Section):
    """A whole run. ``Recipe()`` holds the defaults of all fields, on the embedded base and rows."""

    name: str = Field("default", description="name of the run", pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$")
    seed: int = Field(0, ge=0, lt=2**63, description="the number that all draws derive from")
    model: Model = Model()
    data: Data = Data()
    partition: Partition = Partition()
    lora: Lora = Lora()
    method: MethodSection = Field(FedAvg(), description="the method of federated learning, and its own hyperparameters")
    training: Training = Training()
    selection: Selection = Selection()
    compression: Compression = Compression()
    privacy: Privacy = Privacy()
    secure_aggregation: SecureAggregation = SecureAggregation()
    engine: Engine = Engine()
    federation: Federation = Federation()
    evaluation: Evaluation = Evaluation()
    output: Output = Output()
    compare: Compare | None = Field(None, description="arms and seeds of bellwether compare; null: nothing to compare")
