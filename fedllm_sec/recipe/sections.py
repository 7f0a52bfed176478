"""What a recipe may say: one class for each block, one recipe class for each kind of task.

Blocks that name a method (partition, algorithm, attacks, defenses, small models) hold its settings as plain values:
`fedllm_sec.build.names` checks them against the method's signature.
"""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field

from fedllm_sec.recipe.adversary import Malicious, Observe, Spread
from fedllm_sec.recipe.classifier import Classifier, LabelledEvaluate, LabelledText
from fedllm_sec.recipe.defense import DefenseBlock
from fedllm_sec.recipe.language_model import Model
from fedllm_sec.recipe.machines import Compute, Deploy, Output
from fedllm_sec.recipe.section import MOST_CLASSES, BelowOne, Count, Place, Positive, Rate, Schedule, Section, Word


class Columns(Section):
    """Which column of the data set plays which part."""

    text: Word = "text"  # what the model reads
    context: Word | None = None  # more of what it reads, such as the input of an instruction
    response: Word = "response"  # what it is to answer
    label: Word | None = None  # its class; None: no accuracy is measured, answers are compared whole
    system: Word | None = None  # its system prompt; not given: the column "system" beside turns or Alpaca's columns
    history: Word | None = None  # turns before, as [asked, said] or {role, content}; not given: Alpaca's "history"


class Canaries(Section):
    """Made-up secrets that take the place of some of a client's rows; the privacy attack `canary` looks for them."""

    client: int = Field(0, ge=0)  # whose rows
    repetitions: list[Count] = Field([1, 4, 16], min_length=1, max_length=50)  # rows of each secret
    digits: int = Field(3, ge=2, le=4)  # of a secret: 3 make a thousand guesses


class Data(Section):
    name: Place = "builtin:topic"  # "builtin:FAMILY", a local folder or file, or a hub name
    config: str | None = None  # of a hub set
    train: Place = "train"  # a split of a hub set, or a file inside the folder `name`
    test: Place = "test"  # the same for the held-out rows
    train_where: dict[Word, Word] = {}  # keep the rows whose columns have these values, e.g. {split: train}
    test_where: dict[Word, Word] = {}  # the same for the held-out rows
    test_share: float | None = Field(None, gt=0.0, lt=1.0)  # held out where train and test are one table; None: 0.1
    encoding: str | None = None  # of text files; None: UTF-8, or what their byte-order mark says
    format: Literal["columns", "alpaca", "prompt_completion", "messages", "sharegpt"] | None = None  # None: as found
    columns: Columns = Columns()  # which column plays which part
    rename: dict[Word, Word] = {}  # answers and labels to be written differently, e.g. {Sci/Tech: Tech, 0: World}
    text_chars: Count | None = None  # cut the text to so many characters before anything else
    template: str = "{text}"  # may use {text} and {context}; "chat": the model's own chat template
    template_with_context: str | None = None  # used for rows whose context is not empty
    answer: str = " {response}"  # what follows the prompt; must contain {response}
    system: str | None = None  # the system prompt of conversations that have none; with template: chat
    chat_template: Place | None = None  # a file with a template in place of the tokenizer's; with template: chat
    max_length: int = Field(256, ge=8)  # tokens of prompt and answer together
    too_long: Literal["cut_prompt", "cut_answer", "drop", "error"] = "cut_prompt"  # rows that are longer than that
    loss_on: Literal["response", "last_response", "all"] = "response"  # every answer, the last one, or all tokens
    train_rows: Count | None = None  # use only so many, drawn by the seed
    test_rows: Count | None = None  # the same for the held-out rows
    canaries: Canaries | None = None  # secrets planted in one client's rows, whether or not anybody looks


class Clients(Section):
    """Who takes part, and how they train."""

    total: int = Field(10, ge=1, le=1_000_000)  # clients of the federation
    per_round: Count | None = None  # clients drawn for each round; None: all of them
    local_steps: Count | None = None  # optimizer steps of a client in a round; give these or epochs
    local_epochs: Count | None = None  # passes over its rows
    batch_size: Count = 16  # rows of a step
    optimizer: Literal["adamw", "sgd"] = "adamw"  # of the clients; the server's is the FL method's
    lr: Rate = 1e-3  # learning rate
    betas: tuple[BelowOne, BelowOne] | None = None  # adamw's decay of first and second moments; None: 0.9, 0.999
    momentum: BelowOne = 0.0  # of sgd, begun anew by every client in every round
    nesterov: bool = False  # look ahead by the momentum
    lr_schedule: Schedule = "constant"  # over the rounds, down to a tenth
    lr_in_round: Schedule = "constant"  # the same over a client's steps in each round
    weight_decay: float = Field(0.0, ge=0.0, le=1e6)  # of the optimizer
    max_grad_norm: Positive | None = 1.0  # longer gradients are cut to this length; None: never
    partition: dict[str, Any] = {"name": "iid"}  # how rows are dealt to clients, with its settings
    ranks: dict[Count, Count] = {}  # how many clients train an adapter of this rank, first to last


class Attack(Section):
    """Who attacks, when, knowing what, and with which methods; acts where `enable_attack` is true."""

    malicious: Malicious = Malicious()  # who; nobody needs to be for `privacy`
    spread: Spread | None = None  # instead of them: `data` poisons rows of honest clients
    start: Count = 1  # first round of the attack
    stop: Count | None = None  # last round of the attack
    every: Count = 1  # attack in every k-th round from `start`
    probability: float = Field(1.0, gt=0.0, le=1.0)  # of attacking in such a round; drawn by the seed, for all at once
    collude: bool = True  # false: each attacker forges alone, from its own row
    knowledge: Literal["own", "cohort", "cohort+defense"] = "own"  # rows they see, and whether they know the defense
    data: list[dict[str, Any]] = []  # methods that poison their rows; success of the first is measured, of text of each
    local: list[dict[str, Any]] = []  # methods that change their training
    update: list[dict[str, Any]] = []  # methods that forge what they send
    privacy: list[dict[str, Any]] = []  # methods by which an observer, no client, learns from what clients send
    observe: Observe | None = None  # what that observer sees; needed by `privacy`

    @property
    def curious(self) -> bool:
        """Whether somebody looks and nobody is malicious."""
        return bool(self.privacy) and not (self.data or self.local or self.update)


class Harness(Section):
    """lm-evaluation-harness on the model before the first round and after the last; needs pip install lm-eval."""

    tasks: list[str] = Field(min_length=1)  # names of its tasks or groups
    limit: Count | None = None  # rows of each task; None: all
    include_path: Place | None = None  # a folder with task files (YAML) of your own
    num_fewshot: int | None = Field(None, ge=0)  # examples before each row; None: as the task has it
    chat_template: bool = False  # put requests into the tokenizer's chat template
    batch_size: Count = 8  # requests at a time


class Evaluate(Section):
    every: Count = 1  # rounds; the last round is always evaluated
    start: bool = False  # also measure the model before the first round, as round 0
    rows: Count = 300  # held-out rows for quality
    attack_rows: Count = 200  # held-out prompts for attack success and false triggers
    answer_rows: int = Field(50, ge=0)  # free text: rows answered and compared (exact match, token overlap)
    max_new_tokens: int = Field(8, ge=1, le=10_000)  # of an answer
    batch_size: Count = 64  # rows at a time
    judge: dict[str, Any] | None = None  # what counts as the attacker's answer; None: what the attack itself says
    second_judge: dict[str, Any] | None = None  # runs beside the first: its rates, and how far the two agree
    temperature: float = Field(0.0, ge=0.0, le=100.0)  # of answers to an attack's prompts; 0: greedy
    draws: int = Field(1, ge=1, le=1000)  # answers to each of them; one success is enough
    generalise: bool = False  # also try the trigger at other positions, in other case, and half of it
    paraphrases: list[str] = []  # with generalise: other words for the trigger, put in its place
    transcripts: int = Field(8, ge=0, le=10_000)  # answers of each kind kept in answers.jsonl, of the last round all
    harness: Harness | None = None  # also measure the model by public tasks


class ArrayData(Section):
    """Images and other arrays with class labels."""

    name: Place = "digits"  # "digits", a file .npz, a folder of images, a short name (fashion_mnist), or a hub name
    config: str | None = None  # of a hub set
    train: str = "train"  # split of a hub set, or a folder in the folder
    test: str = "test"  # the same for the held-out rows
    test_share: float | None = Field(None, gt=0.0, lt=1.0)  # held out of a set in one part; None: 0.1
    size: int | None = Field(None, gt=0, le=4096)  # bring images to size x size pixels
    image: str | None = None  # column of a hub set; None: the only image column it has
    label: str | None = None  # column of a hub set; None: the only label column it has
    classes: int | None = Field(None, ge=2, le=MOST_CLASSES)  # None: the largest training label + 1
    train_rows: Count | None = None  # use only so many, drawn by the seed
    test_rows: Count | None = None  # the same for the held-out rows
    flip: bool = False  # mirror training images left to right at random
    crop: int = Field(0, ge=0, le=16)  # shift training images by up to so many pixels


class CharData(Section):
    """A text file, cut into sequences of characters."""

    name: Place = ""  # the file, which may be packed by gzip
    encoding: str | None = None  # of the text; None: UTF-8, or what its byte-order mark says
    length: int = Field(80, ge=2)  # characters of a sequence
    test_share: float = Field(0.1, gt=0.0, lt=1.0)  # the end of the text, or of each speaker's part
    by_speaker: bool = False  # a play: a sequence holds one speaker's words; "NAME:" after a blank line starts a speech
    train_rows: Count | None = None  # use only so many sequences, drawn by the seed
    test_rows: Count | None = None  # the same for the held-out sequences


class ArrayEvaluate(Section):
    every: Count = 1  # rounds; the last round is always evaluated
    start: bool = False  # also measure the model before the first round, as round 0
    rows: Count | None = None  # held-out rows for quality; None: all
    attack_rows: Count | None = None  # held-out rows for attack success and false triggers; None: all
    batch_size: Count = 500  # rows at a time


class GanEvaluate(Section):
    every: Count = 1  # rounds; the last round is always evaluated
    start: bool = False  # also measure the model before the first round, as round 0
    samples: int = Field(1000, ge=100)  # generated images that are compared with as many held-out ones
    batch_size: Count = 500  # images at a time


class Pretrain(Section):
    """Attack-free, defense-free rounds before the first, done once for all variants of a recipe and cells of a grid."""

    rounds: int = Field(ge=1, le=1_000_000_000)  # so many; `rounds` and the attack are counted after them


class Recipe(Section):
    """One complete experiment; the classes below say what `model`, `data` and `evaluate` hold for each task."""

    seed: int = 0  # of everything that is drawn
    rounds: int = Field(10, ge=1, le=1_000_000_000)  # of the federation
    pretrain: Pretrain | None = None  # rounds of a clean federation before them, from which all is measured
    model: Any  # what is trained
    task: str  # which kind of task; decides what model, data and evaluate may say
    data: Any  # what it is trained and measured on
    clients: Clients = Clients()  # who takes part and how they train
    algorithm: dict[str, Any] = {"name": "fedavg"}  # the FL method, with its settings
    enable_attack: bool = False  # whether the attack block acts
    attack: Attack | None = None  # who attacks and how
    enable_defense: bool = False  # whether the defense block acts; else rows are averaged
    defense: DefenseBlock | None = None  # what the server does with the rows
    evaluate: Any  # what is measured, and how often
    compute: Compute = Compute()  # how it is computed
    output: Output = Output()  # where results go
    deploy: Deploy = Deploy()  # how real devices are asked; a simulation has no use for it
    variants: dict[str, dict[str, Any]] | None = None  # name -> overrides: a comparison of several runs

    @property
    def before(self) -> int:
        """How many rounds come before the first one: its draws go on from theirs."""
        return self.pretrain.rounds if self.pretrain is not None else 0

    @property
    def attacked(self) -> bool:
        """Whether clients are malicious, or hold poisoned rows: an observer is none of them."""
        return self.enable_attack and self.attack is not None and not self.attack.curious


class TextRecipe(Recipe):
    """Instruction tuning of a language model: a LoRA adapter, or the whole model."""

    task: Literal["causal_lm"] = "causal_lm"
    model: Model = Model()
    data: Data = Data()
    evaluate: Evaluate = Evaluate()


class LabelledTextRecipe(Recipe):
    """A model of transformers that tells classes of texts apart."""

    task: Literal["classify_text"]
    model: Classifier = Classifier()
    data: LabelledText = LabelledText()
    evaluate: LabelledEvaluate = LabelledEvaluate()


class ClassifyRecipe(Recipe):
    """A small model that tells classes apart."""

    task: Literal["classify"]
    model: dict[str, Any] = {"name": "lenet"}  # with its settings, buffers (average, local, batch) and start
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
    "classify_text": LabelledTextRecipe,
    "classify": ClassifyRecipe,
    "next_char": CharRecipe,
    "gan": GanRecipe,
    "nas": NasRecipe,
}
