"""Talk to a run's result in the terminal."""

import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from dcr import ending, entry, extensions, keywords, repetition, resolving
from dcr.core import machine, prompts
from dcr.core.config import ConfigError, DataError, ModelConfig, Precision, UserError
from dcr.core.prompts import ChatFormat
from dcr.core.runs import Run
from dcr.core.text import conversation
from dcr.ending import encodable

if TYPE_CHECKING:
    from dcr.core.models import Policy
    from dcr.gating.classifier import Gate

STAGES = ("readout", "sft", "contrastive", "base")  # the last first
DIM, UNDIMMED = "\x1b[2m", "\x1b[0m"


@dataclass
class Options:
    """python -m dcr.chat run=<folder> [stage=readout|sft|contrastive|base] [gen.max_new_tokens=256]

    Talk to a run's result. Lines are read from the terminal or a pipe; /reset forgets the
    dialogue, /quit ends it.
    """

    run: Path = entry.option("the run folder")
    stage: str | None = entry.option(
        "whose result answers, base being the model before training; none: the last that is done",
        None,
        choices=STAGES,
    )
    max_new_tokens: int = entry.option(
        "the longest answer, in tokens", 256, least=1, key="gen.max_new_tokens"
    )
    repetition_penalty: float = entry.option(
        "by what to divide the logits of tokens that the answer holds; 1: nothing",
        1.0,
        least=1,
        key="gen.repetition_penalty",
    )
    gate: Path | None = entry.option(
        "the folder of a gate that python -m dcr.gate trained, which refuses first", None
    )
    threshold: float | None = entry.option(
        "the gate's threshold; none: its own", None, least=0, most=1, key="gating.threshold"
    )
    precision: str = entry.option(
        "of the model; auto: as the run was trained, else what the device does natively",
        "auto",
        choices=("auto", "bf16", "fp32"),
    )
    trust_remote_code: bool = entry.option(
        "run code that comes with the weights; a run's own settings never switch it on", False
    )


@dataclass
class Dialogue:
    """The turns so far, the model that answers, and a gate that refuses above a threshold."""

    policy: "Policy"
    chat: ChatFormat
    max_new_tokens: int
    turns: list[dict[str, str]] = field(default_factory=list)
    gate: "Gate | None" = None
    threshold: float = 1.0
    refusal: str = ""

    def prompt_ids(self) -> list[int]:
        """Token ids of the whole dialogue up to where the assistant begins to speak.

        The oldest exchanges are dropped while it does not fit the model's context. Raises
        ConfigError when not even the last message fits.
        """
        from dcr.core.models import structure

        room = structure.context_length(self.policy.model.config) - self.max_new_tokens
        turns = self.turns
        while len(ids := self.chat.prompt_ids(_spoken(turns))) > room:
            if len(turns) < 3:
                raise ConfigError(
                    f"the message has {len(ids)} tokens, {room} fit; shorten it or lower "
                    "gen.max_new_tokens"
                )
            turns = turns[2:]
        self.turns = turns
        return ids

    def ask(self, message: str) -> tuple[str, float]:
        """The answer, printed as it comes, and the refusal mass of its first token.

        Behind a gate, which reads the whole dialogue, its probability of being toxic is the mass.
        A message without an answer leaves the dialogue as it was.
        """
        self.turns.append({"role": "user", "content": self.chat.neutralised(message)})
        try:
            ids = self.prompt_ids()
            score = self.gate.scores([_spoken(self.turns)])[0] if self.gate else 0.0
            if score > self.threshold:
                print(self.refusal)
                answer, mass = self.refusal, score
            else:
                answer, mass = self._generate(ids)
                mass = score if self.gate else mass
        except BaseException:  # Ctrl-C as well: a caller may go on with the dialogue
            self.turns.pop()
            raise
        self.turns.append({"role": "assistant", "content": self.chat.neutralised(answer)})
        return answer, mass

    def _generate(self, ids: list[int]) -> tuple[str, float]:
        from transformers import TextStreamer

        from dcr.calibration import biases
        from dcr.core import generation
        from dcr.core.refusal import opening
        from dcr.gating import answers

        tokenizer = self.chat.tokenizer
        openings = opening.refusal_openings(self.chat)
        (answer,), masses = generation.continued(
            self.policy,
            self.chat,
            [ids],
            self.max_new_tokens,
            score=lambda logits: opening.refusal_mass(logits, openings),
            streamer=TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True),  # pyright: ignore
            bias=answers.shut(biases.opening_place(self.chat)) if self.gate else None,
        )
        text = tokenizer.decode(answer, skip_special_tokens=True)
        return str(text).strip(), float(masses[0])


def _spoken(turns: list[dict[str, str]]) -> str:
    """The dialogue as one prompt, as evaluations ask a conversation."""
    return conversation((turn["role"], turn["content"]) for turn in turns)


@entry.command(Options)
def main(options: Options) -> None:
    """Converse until /quit or the end of input."""
    policy, model, told = open_stage(
        Run(options.run), options.stage, Precision(options.precision), options.trust_remote_code
    )

    extensions.hand_in_passes()
    machine.use_threads()
    machine.to_gpu(policy.model)
    chat = prompts.chat_format(policy.tokenizer, model)
    if options.repetition_penalty != 1:
        chat = repetition.penalised(chat, options.repetition_penalty)
    dialogue = Dialogue(policy, chat, options.max_new_tokens)
    if options.gate is not None:
        from dcr.gating import classifier

        rule = classifier.record_of(options.gate)
        narrow = policy.model.dtype.itemsize < 4
        dialogue.gate = classifier.open_gate(
            options.gate,
            Precision.bf16 if narrow else Precision.fp32,
            trust_remote_code=options.trust_remote_code,
        )
        given = options.threshold
        dialogue.threshold = rule["threshold"] if given is None else given
        dialogue.refusal = rule["refusal"]
    if sys.stdin.isatty():
        _aside(f"{policy.name}, {told}. /reset forgets the dialogue, /quit ends it.")
    while (message := _line()) not in (None, "/quit"):
        if message == "/reset":
            dialogue.turns.clear()
        elif message:
            try:
                answer, mass = dialogue.ask(message)
            except UserError as error:
                _aside(str(error))
                continue
            verdict = keywords.recommended(answer)
            measured = "toxic by the gate" if dialogue.gate else "first-token refusal mass"
            _aside(f"[{verdict}, {measured} {mass:.2f}]")


def _line() -> str | None:
    """The user's next line, None at the end of input."""
    try:
        return encodable(input("> " if sys.stdin.isatty() else "").strip())
    except EOFError:
        return None
    except UnicodeDecodeError as error:
        raise DataError(f"input: {error.reason} at byte {error.start + 1}; send UTF-8") from None


def _aside(text: str) -> None:
    """Print a line, dimmed on a terminal."""
    terminal = ending.own_output() if sys.stdout.isatty() else None
    if terminal:
        terminal.write(DIM)
    print(text, flush=True)
    if terminal:
        terminal.write(UNDIMMED)
        terminal.flush()


def open_stage(
    run: Run,
    stage: str | None = None,
    asked: Precision = Precision.auto,
    trust_remote_code: bool = False,
) -> "tuple[Policy, ModelConfig, str]":
    """The model of a stage, the run's model settings, and the precision in words.

    Without a `stage`, the last that is done is opened, or a base model that was evaluated. Raises
    ConfigError when the stage is not done or its base cannot be opened.
    """
    made_with = run.config()
    model = resolving.model_of(made_with, trust_remote_code)
    untrained = "base" if made_with["method"] == "base" else "sft"
    stage = stage or next((name for name in STAGES[:-1] if run.done(name)), untrained)
    if stage != "base" and not run.done(stage):
        raise ConfigError(f"run={run.folder}: stage {stage} is not done there; train it first")
    from dcr.core import models
    from dcr.core.models import folders

    arithmetic = machine.settled({"evaluation": asked}, recorded=run.precisions())
    arithmetic.say()
    found = arithmetic.precisions["evaluation"]
    if stage == "base":
        policy = models.open_policy(model, found)
    else:
        # an impossible template is refused before weights are read
        prompts.chat_format(models.result_tokenizer(run.stage(stage), trust_remote_code), model)
        held = model.quantization
        policy = folders.open_result(run.stage(stage), found, trust_remote_code, held)
    return policy, model, arithmetic.told


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
