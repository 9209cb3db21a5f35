"""Talk to a run's result in the terminal.

python -m dcr.chat run=<folder> [stage=sft|contrastive|base] [max_new_tokens=256]

Lines are read from the terminal or a pipe. /reset forgets the dialogue, /quit ends it.
"""

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path

import torch
from transformers import TextStreamer

from dcr import batching, generation, models, prompts, refusal
from dcr.config import ConfigError, ModelConfig, Precision, UserError
from dcr.models import Policy
from dcr.prompts import ChatFormat
from dcr.runs import Run
from dcr.text import single_line

STAGES = ("sft", "contrastive", "base")
DIM, UNDIMMED = "\x1b[2m", "\x1b[0m"


@dataclass(frozen=True)
class Options:
    """What the command line may hold."""

    run: str = ""
    stage: str = ""  # the last one that is done
    max_new_tokens: int = 256


@dataclass
class Dialogue:
    """What was said so far, and who answers."""

    policy: Policy
    chat: ChatFormat
    max_new_tokens: int
    turns: list[dict[str, str]] = field(default_factory=list)

    def prompt_ids(self) -> list[int]:
        """The whole dialogue up to where the assistant begins to speak.

        The oldest exchanges are left out while it does not fit the model's context. Raises
        ConfigError when not even the last message fits.
        """
        room = batching.context_length(self.policy.model.config) - self.max_new_tokens
        turns = self.turns
        while len(ids := self._encoded(turns)) > room:
            if len(turns) < 3:
                raise ConfigError(
                    f"the message has {len(ids)} tokens, {room} fit; shorten it or lower "
                    "max_new_tokens"
                )
            turns = turns[2:]
        self.turns = turns
        return ids

    def _encoded(self, turns: list[dict[str, str]]) -> list[int]:
        system = self.chat.system_prompt
        first = [{"role": "system", "content": system}] if system else []
        tokenizer = self.chat.tokenizer
        text = tokenizer.apply_chat_template(
            [*first, *turns],
            chat_template=self.chat.template,
            tokenize=False,
            add_generation_prompt=True,
        )
        return list(tokenizer(text, add_special_tokens=False)["input_ids"])  # pyright: ignore

    def ask(self, message: str) -> tuple[str, float]:
        """The answer, printed as it comes, and the refusal mass of its first token.

        A message that cannot be answered leaves the dialogue as it was.
        """
        self.turns.append({"role": "user", "content": self.chat.neutralised(message)})
        try:
            ids = self.prompt_ids()
            answer, mass = self._generate(ids)
        except BaseException:  # Ctrl-C as well: a caller may go on with the dialogue
            self.turns.pop()
            raise
        self.turns.append({"role": "assistant", "content": self.chat.neutralised(answer)})
        return answer, mass

    def _generate(self, ids: list[int]) -> tuple[str, float]:
        tokenizer = self.chat.tokenizer
        openings = refusal.refusal_openings(tokenizer)
        (answer,), masses = generation.continued(
            self.policy,
            self.chat,
            [ids],
            self.max_new_tokens,
            score=lambda logits: refusal.refusal_mass(logits, openings),
            streamer=TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True),  # pyright: ignore
        )
        text = tokenizer.decode(answer, skip_special_tokens=True)
        return str(text).strip(), float(masses[0])


def main(arguments: Sequence[str], read: Callable[[str], str] = input) -> None:
    """Converse until /quit or the end of input.

    Raises UserError when there is nothing to talk to.
    """
    options = _options(arguments)
    policy, config = open_stage(Run(Path(options.run)), options.stage)
    if torch.cuda.is_available():
        policy.model.to("cuda")
    chat = prompts.chat_format(policy.tokenizer, config)
    dialogue = Dialogue(policy, chat, options.max_new_tokens)
    if sys.stdin.isatty():
        print(_dim(f"{policy.name}. /reset forgets the dialogue, /quit ends it."))
    while (message := _line(read)) not in (None, "/quit"):
        if message == "/reset":
            dialogue.turns.clear()
        elif message:
            _exchange(dialogue, message)


def _line(read: Callable[[str], str]) -> str | None:
    """One line of the user's, None at the end of input."""
    try:
        return read("> " if sys.stdin.isatty() else "").strip()
    except EOFError:
        return None


def _exchange(dialogue: Dialogue, message: str) -> None:
    try:
        answer, mass = dialogue.ask(message)
    except ConfigError as error:
        print(_dim(str(error)))
        return
    verdict = refusal.outcome(answer, "recommended")
    print(_dim(f"[{verdict}, first-token refusal mass {mass:.2f}]"), flush=True)


def _dim(text: str) -> str:
    return f"{DIM}{text}{UNDIMMED}" if sys.stdout.isatty() else text


def _options(arguments: Sequence[str]) -> Options:
    known = [entry.name for entry in fields(Options)]
    given: dict[str, str] = {}
    for argument in arguments:
        key, equals, value = argument.partition("=")
        if not equals or key not in known:
            raise ConfigError(f"{argument}: no such setting; give {', '.join(known)} as key=value")
        given[key] = value
    length = given.get("max_new_tokens", str(Options.max_new_tokens))
    if not length.isdecimal() or int(length) < 1:
        raise ConfigError(f"max_new_tokens={length}: give 1 or more")
    options = Options(given.get("run", ""), given.get("stage", ""), int(length))
    if not options.run:
        raise ConfigError("nothing to talk to: give run=<folder>")
    if options.stage not in ("", *STAGES):
        raise ConfigError(f"stage={options.stage}: give {', '.join(STAGES)}")
    return options


def open_stage(run: Run, stage: str) -> tuple[Policy, ModelConfig]:
    """The model of a stage (the last done for ""), and the run's model settings.

    Raises ConfigError when the stage is not done or its base cannot be opened.
    """
    made_with = run.config()
    node = made_with["model"]
    keys = ("name", "revision", "trust_remote_code", "system_prompt", "template", "architecture")
    config = ModelConfig(**{key: node[key] for key in keys if key in node})
    precision = Precision(made_with["sft"]["precision"])
    if stage == "base":
        return models.open_policy(config, precision, made_with["seed"]), config
    done = next((name for name in STAGES[:2] if run.done(name)), None)
    stage = stage or done or "sft"
    if not run.done(stage):
        raise ConfigError(f"run={run.folder}: stage {stage} is not done there; train it first")
    return models.open_result(run.stage(stage), precision, config.trust_remote_code), config


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except UserError as error:
        print(f"error: {single_line(error)}", file=sys.stderr)
        sys.exit(error.exit_code)
    except KeyboardInterrupt:
        print()
