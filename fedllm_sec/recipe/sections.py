"""What a recipe may say: one class for each block, one recipe class for each kind of task.

Blocks that name a method (partition, algorithm, attacks, defenses, small models) hold its settings as plain values:
`fedllm_sec.build.federation` checks them against the method's signature.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, PositiveFloat, PositiveInt

BelowOne = Annotated[float, Field(ge=0.0, lt=1.0)]


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=())


class Lora(Section):
    """LoRA adapters (Hu et al. 2022)."""

    r: PositiveInt = 8
    alpha: PositiveFloat = 16.0
    dropout: float = Field(0.0, ge=0.0, lt=1.0)
    target_modules: Literal["all-linear"] | list[str] = "all-linear"
    train: Literal["both", "A", "B"] = "both"  # B alone is FFA-LoRA (Sun et al. 2024)


class Model(Section):
    name: str = "tiny"  # "tiny", a local folder or a hub name
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"  # of the frozen base model
    load_in_4bit: bool = False  # NF4 through bitsandbytes
    gradient_checkpointing: bool = False
    lora: Lora = Lora()


class Columns(Section):
    """Which column of the data set plays which part."""

    text: str = "text"
    context: str | None = None
    response: str = "response"
    label: str | None = None


class Data(Section):
    name: str = "builtin:topic"  # "builtin:FAMILY", a local folder or file, or a hub name
    config: str | None = None
    train: str = "train"  # a split of a hub set, or a file inside the folder `name`
    test: str = "test"
    train_where: dict[str, str] = {}  # keep the rows whose columns have these values, e.g. {split: train}
    test_where: dict[str, str] = {}
    columns: Columns = Columns()
    rename: dict[str, str] = {}  # answers to be written differently, e.g. {Sci/Tech: Tech}
    text_chars: PositiveInt | None = None  # cut the text to so many characters before anything else
    template: str = "{text}"  # may use {text} and {context}
    template_with_context: str | None = None  # used for rows whose context is not empty
    answer: str = " {response}"
    max_length: int = Field(256, ge=8)  # tokens of prompt and answer together
    loss_on: Literal["response", "all"] = "response"
    train_rows: PositiveInt | None = None  # use only so many, drawn by the seed
    test_rows: PositiveInt | None = None


class Clients(Section):
    total: PositiveInt = 10
    per_round: PositiveInt | None = None  # None: all of them
    local_steps: PositiveInt | None = None
    local_epochs: PositiveInt | None = None
    batch_size: PositiveInt = 16
    optimizer: Literal["adamw", "sgd"] = "adamw"
    lr: PositiveFloat = 1e-3
    betas: tuple[BelowOne, BelowOne] | None = None  # adamw's decay of first and second moments; None: 0.9, 0.999
    lr_schedule: Literal["constant", "linear", "cosine"] = "constant"  # over the rounds, down to a tenth
    weight_decay: float = Field(0.0, ge=0.0)
    max_grad_norm: PositiveFloat | None = 1.0
    partition: dict[str, Any] = {"name": "iid"}


class Malicious(Section):
    """Who is malicious: a number or a share of all clients, drawn by the seed, or a list of client numbers."""

    count: PositiveInt | None = None
    share: float | None = Field(None, gt=0.0, lt=1.0)
    ids: list[int] | None = None
    redraw: bool = False  # draw so many anew for each round; else the same clients for the whole run


class Attack(Section):
    malicious: Malicious
    start: PositiveInt = 1  # first round of the attack
    stop: PositiveInt | None = None  # last round of the attack
    every: PositiveInt = 1  # attack in every k-th round from `start`
    probability: float = Field(1.0, gt=0.0, le=1.0)  # of attacking in such a round; drawn by the seed, for all at once
    collude: bool = True  # false: each attacker forges alone, from its own row
    knowledge: Literal["own", "cohort", "cohort+defense"] = "own"
    data: list[dict[str, Any]] = []
    local: list[dict[str, Any]] = []
    update: list[dict[str, Any]] = []


class DefenseBlock(Section):
    client: list[dict[str, Any]] = []  # what clients that do not attack run in their own training
    before: list[dict[str, Any]] = []
    rule: dict[str, Any] = {"name": "mean"}
    after: list[dict[str, Any]] = []
    root_rows: PositiveInt | None = None  # clean rows the server holds, taken out of the training set


class Evaluate(Section):
    every: PositiveInt = 1  # rounds; the last round is always evaluated
    rows: PositiveInt = 300  # held-out rows for quality
    attack_rows: PositiveInt = 200  # held-out prompts for attack success and false triggers
    answer_rows: int = Field(50, ge=0)  # free text: rows answered and compared (exact match, token overlap)
    max_new_tokens: PositiveInt = 8
    batch_size: PositiveInt = 64


class Compute(Section):
    mixed_precision: Literal["no", "bf16", "fp16"] | None = None  # None: what accelerate is configured for
    gradient_accumulation: PositiveInt | None = None  # None: what accelerate is configured for
    placement: Literal["clients", "data"] = "clients"  # spread clients, or each batch, over the processes
    chunk_mb: PositiveFloat | None = None  # size of a column block in the defense; None: from free memory
    threads: PositiveInt | None = None  # CPU threads of each process


class Output(Section):
    folder: str = "runs/{name}"  # {name} is the recipe's file name
    adapter_every: PositiveInt | None = None  # also keep the adapter of every k-th round
    tracker: Literal["tensorboard", "wandb", "mlflow"] | None = None


class ArrayData(Section):
    """Images and other arrays with class labels."""

    name: str = "digits"  # "digits", a file .npz, a short name such as fashion_mnist, or a hub name
    config: str | None = None
    train: str = "train"  # splits of a hub set
    test: str = "test"
    image: str | None = None  # columns of a hub set; None: the image column and the label column it has
    label: str | None = None
    classes: int | None = Field(None, ge=2)  # None: the largest training label + 1
    train_rows: PositiveInt | None = None  # use only so many, drawn by the seed
    test_rows: PositiveInt | None = None
    flip: bool = False  # mirror training images left to right at random
    crop: int = Field(0, ge=0, le=16)  # shift training images by up to so many pixels


class CharData(Section):
    """A text file, cut into sequences of characters."""

    name: str = ""  # the file
    length: int = Field(80, ge=2)  # characters of a sequence
    test_share: float = Field(0.1, gt=0.0, lt=1.0)  # the end of the text, or of each speaker's part
    by_speaker: bool = False  # a play: a sequence holds one speaker's words; "NAME:" on a line starts a speech
    train_rows: PositiveInt | None = None  # sequences
    test_rows: PositiveInt | None = None


class ArrayEvaluate(Section):
    every: PositiveInt = 1  # rounds; the last round is always evaluated
    rows: PositiveInt | None = None  # held-out rows for quality; None: all
    attack_rows: PositiveInt | None = None  # held-out rows for attack success and false triggers; None: all
    batch_size: PositiveInt = 500


class GanEvaluate(Section):
    every: PositiveInt = 1
    samples: int = Field(1000, ge=100)  # generated images that are compared with as many held-out ones
    batch_size: PositiveInt = 500


class Recipe(Section):
    """One complete experiment; the classes below say what `model`, `data` and `evaluate` hold for each task."""

    seed: int = 0
    rounds: PositiveInt = 10
    model: Any
    task: str
    data: Any
    clients: Clients = Clients()
    algorithm: dict[str, Any] = {"name": "fedavg"}
    enable_attack: bool = False
    attack: Attack | None = None
    enable_defense: bool = False
    defense: DefenseBlock | None = None
    evaluate: Any
    compute: Compute = Compute()
    output: Output = Output()
    variants: dict[str, dict[str, Any]] | None = None  # name -> overrides: a comparison of several runs


class TextRecipe(Recipe):
    """Instruction tuning of a language model with LoRA."""

    task: Literal["causal_lm"] = "causal_lm"
    model: Model = Model()
    data: Data = Data()
    evaluate: Evaluate = Evaluate()


class ClassifyRecipe(Recipe):
    """A small model that tells classes apart."""

    task: Literal["classify"]
    model: dict[str, Any] = {"name": "lenet"}
    data: ArrayData = ArrayData()
    evaluate: ArrayEvaluate = ArrayEvaluate()


class NasRecipe(ClassifyRecipe):
    """The same, with the architecture searched while it trains."""

    task: Literal["nas"]  # type: ignore[assignment]
    model: dict[str, Any] = {"name": "darts"}


class GanRecipe(Recipe):
    """A generator and a discriminator of images."""

    task: Literal["gan"]
    model: dict[str, Any] = {"name": "mlp_gan"}
    data: ArrayData = ArrayData()
    evaluate: GanEvaluate = GanEvaluate()


class CharRecipe(Recipe):
    """A small model of the next character."""

    task: Literal["next_char"]
    model: dict[str, Any] = {"name": "lstm"}
    data: CharData = CharData()
    evaluate: ArrayEvaluate = ArrayEvaluate()


TASKS: dict[str, type[Recipe]] = {
    "causal_lm": TextRecipe,
    "classify": ClassifyRecipe,
    "next_char": CharRecipe,
    "gan": GanRecipe,
    "nas": NasRecipe,
}
