"""What all fine-tuning tasks share: model and tokenizer of the checkpoint they start from, and how those are loaded."""

import dataclasses
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

from rich.console import Console
from torch import Tensor

from gptdist.checkpoint import layout
from gptdist.checkpoint.restore import load_weights, read_config
from gptdist.checkpoint.template import stored_template
from gptdist.config import Config, ModelConfig
from gptdist.data.templates import Template, load_template
from gptdist.data.tokenizer import Tokenizer, build_tokenizer
from gptdist.errors import DamagedError, UserError
from gptdist.parallel.strategies import Strategy
from gptdist.parallel.world import World
from gptdist.tasks.task import Task


class FineTune(Task):
    """A task on examples. A subclass reads them, calls `start`, and makes `source` (data.examples.ExampleSource)."""

    unit = "examples"
    fixed = (*Task.fixed, "task.freeze", "task.bucket", "train.batch", "data.shuffle")

    def __init__(self, config: Config, world: World):
        super().__init__(config, world)
        self.origin = find_origin(config)
        self._given = config.given  # a configuration that is resolved has lost it
        self._notes: list[str] = []

    def note(self, text: str) -> None:
        """Have a line about data or model printed when the run starts; "" says nothing."""
        if text:
            self._notes.append(text)

    def start(self, texts: Callable[[], Iterable[str]]) -> None:
        """Settle the model's configuration and the tokenizer: those of the checkpoint that the run starts from.

        Without one they are `model` and task.tokenizer; texts() are what a tokenizer is trained on.
        """
        if self.origin is None:
            self.tokenizer = build_tokenizer(self.config.task.tokenizer, texts())
            model = random_model(self.config.model, self.tokenizer)
        else:
            self.tokenizer = Tokenizer.load(self.origin / "tokenizer")
            model = model_of(self.config, self.origin)
        self.config = dataclasses.replace(self.config, model=model)

    def chosen_template(self) -> Template:
        """instruct.template if it was given, else what the starting model was fine-tuned with, else the default."""
        stored = stored_template(self.origin) if self.origin else None
        if stored is not None and "instruct.template" not in self._given:
            return stored
        template = load_template(self.config.instruct.template)
        if stored is not None and template != stored:
            self.note(f"instruct.template={self.config.instruct.template} is used as given, though {self.origin} was "
                      f"fine-tuned with {stored.name}")
        return template

    def check_base(self, checkpoint: Path) -> None:
        """A classifier's weights have no next-word head. (Classify, which can go on from one, has its own check.)"""
        if read_config(checkpoint).task.name == "classify":
            raise UserError(f"{checkpoint} is a classifier, which writes no text: start task.name="
                            f"{self.config.task.name} from a model that does, such as the one it was trained from")

    def may_be_fresh(self, key: str) -> bool:
        """Whether the tensor of this key need not be in checkpoint.init_from: a head or adapters begin untrained."""
        return "lora_" in key

    def load_base(self, checkpoint: Path, tensors: Mapping[str, Tensor]) -> None:
        load_weights(checkpoint, tensors, allow_missing=self.may_be_fresh)

    def started(self, strategy: Strategy) -> None:
        for text in self._notes:
            self.console.print(text)

    @property
    def console(self) -> Console:
        return Console(quiet=not self.world.is_main, highlight=False, soft_wrap=True)


def find_origin(config: Config) -> Path | None:
    """The checkpoint whose model and tokenizer a run has: its own newest one, else the model it is to start from."""
    options = config.checkpoint
    if options.resume not in ("auto", "never"):
        return layout.resolve(options.resume)
    own = layout.scan(Path(config.run.dir) / "checkpoints")[0] if options.resume == "auto" else []
    for checkpoint in reversed(own):
        try:
            read_config(checkpoint)
            return checkpoint
        except DamagedError:  # the trainer sets it aside and takes the one before
            continue
    return layout.resolve(options.init_from) if options.init_from else None


def model_of(config: Config, origin: Path) -> ModelConfig:
    """The model of a checkpoint. Raises UserError where the configuration asks for another.

    It may ask for other dropout and, with rotary positions, for another context.
    """
    theirs = read_config(origin).model
    kept = {}
    for field in dataclasses.fields(ModelConfig):
        name = field.name
        ours, saved = getattr(config.model, name), getattr(theirs, name)
        if f"model.{name}" not in config.given or ours is None or ours == saved:
            continue
        if name == "dropout" or (name == "context" and theirs.positions == "rope"):
            kept[name] = ours
            continue
        raise UserError(f"{origin} has model.{name}={saved}, this run model.{name}={ours}: the model comes from the "
                        f"checkpoint; leave model.{name} out")
    return dataclasses.replace(theirs, **kept)


def random_model(model: ModelConfig, tokenizer: Tokenizer) -> ModelConfig:
    """The configured model, its vocabulary that of the tokenizer."""
    if model.vocab_size is not None and model.vocab_size < tokenizer.vocab_size:
        raise UserError(f"model.vocab_size={model.vocab_size} is below the tokenizer's {tokenizer.vocab_size} ids: "
                        f"leave it null to take the tokenizer's")
    return dataclasses.replace(model, vocab_size=model.vocab_size or tokenizer.vocab_size)
