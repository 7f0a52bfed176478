"""What a recipe may say of a classifier of texts: its model, its data, and how it is measured.

What stands here as a ClassVar is no key: it says how a classifier is, to code that serves language models too.
"""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field, ValidationInfo, field_validator, model_validator

from fedllm_sec.recipe.language_model import Attention, Lora, whole_in_float32
from fedllm_sec.recipe.section import Count, Place, Section, Word


class Classifier(Section):
    """A model of transformers with an output layer that is new, for the classes of the training rows."""

    name: Place = "tiny"  # "tiny", a local folder with its weights as safetensors, or a hub name
    revision: str | None = None  # branch, tag or commit of a hub name; None: its main branch
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"  # of the frozen base model
    attn_implementation: Attention | None = None  # how attention is computed; None: as transformers chooses
    lora: Lora | None = Lora()  # the adapter, trained with the output layer; None: the whole model is
    start: Place | None = None  # a run folder, an adapter folder or a .safetensors file to train on; None: anew

    trust_remote_code: ClassVar[bool] = False
    load_in_4bit: ClassVar[bool] = False
    load_in_8bit: ClassVar[bool] = False
    gradient_checkpointing: ClassVar[bool] = False
    quantized: ClassVar[bool] = False
    changes_base: ClassVar[bool] = True  # it has an output layer of its own

    @field_validator("name")
    @classmethod
    def _no_gguf(cls, value: str) -> str:
        if value.lower().endswith(".gguf"):
            raise ValueError("a GGUF file holds a language model and no classifier. Give the folder of a model")
        return value

    @field_validator("lora")
    @classmethod
    def _trainable(cls, value: Lora | None, info: ValidationInfo) -> Lora | None:
        return whole_in_float32(value, info.data.get("dtype", "float32"))


class LabelColumns(Section):
    """Which column of the data set plays which part."""

    text: Word = "text"  # what the model reads
    context: Word | None = None  # a second text that it reads with it, as of two that are compared
    label: Word = "label"  # its class

    @model_validator(mode="after")
    def _label_unread(self) -> LabelColumns:
        if self.label in (self.text, self.context):
            raise ValueError(f'label: "{self.label}" is what the model reads as well: it would read its answer')
        return self

    system: ClassVar[None] = None
    history: ClassVar[None] = None

    @property
    def response(self) -> str:
        """A classifier answers with the class."""
        return self.label


class LabelledText(Section):
    """Texts with class labels."""

    name: Place = "builtin:topic"  # "builtin:FAMILY", a local folder or file, or a hub name
    config: str | None = None  # of a hub set
    train: Place = "train"  # a split of a hub set, or a file inside the folder `name`
    test: Place = "test"  # the same for the held-out rows
    train_where: dict[Word, Word] = {}  # keep the rows whose columns have these values, e.g. {split: train}
    test_where: dict[Word, Word] = {}  # the same for the held-out rows
    test_share: float | None = Field(None, gt=0.0, lt=1.0)  # held out where train and test are one table; None: 0.1
    encoding: str | None = None  # of text files; None: UTF-8, or what their byte-order mark says
    columns: LabelColumns = LabelColumns()  # which column plays which part
    rename: dict[Word, Word] = {}  # labels to be written differently, e.g. {Sci/Tech: Tech, 0: World}
    text_chars: Count | None = None  # cut the text to so many characters before anything else
    max_length: int = Field(256, ge=8)  # tokens of text and context together, those that the tokenizer sets included
    too_long: Literal["cut_prompt", "drop", "error"] = "cut_prompt"  # rows that are longer than that
    train_rows: Count | None = None  # use only so many, drawn by the seed
    test_rows: Count | None = None  # the same for the held-out rows

    format: ClassVar[str] = "columns"
    template: ClassVar[str] = "{text}{context}"  # both are read
    template_with_context: ClassVar[None] = None
    chat_template: ClassVar[None] = None
    system: ClassVar[None] = None
    canaries: ClassVar[None] = None


class LabelledEvaluate(Section):
    every: Count = 1  # rounds; the last round is always evaluated
    start: bool = False  # also measure the model before the first round, as round 0
    rows: Count = 300  # held-out rows for quality
    attack_rows: Count = 200  # held-out rows for attack success and false triggers
    batch_size: Count = 64  # rows at a time
    generalise: bool = False  # also try the trigger at other positions, in other case, and half of it
    paraphrases: list[str] = []  # with generalise: other words for the trigger, put in its place
    transcripts: int = Field(8, ge=0, le=10_000)  # answers of each kind kept in answers.jsonl, of the last round all

    answer_rows: ClassVar[int] = 0  # the classes of all rows are compared
    max_new_tokens: ClassVar[int] = 1  # a class
    draws: ClassVar[int] = 1
    temperature: ClassVar[float] = 0.0
    judge: ClassVar[None] = None
    second_judge: ClassVar[None] = None
    harness: ClassVar[None] = None
