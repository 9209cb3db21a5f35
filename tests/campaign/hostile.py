"""Run folders that attack whoever reads them, links out of them, and secrets on a command line."""

import json
import os
import pickle
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from random import Random
from typing import Any

import commands
import yaml
from commands import MARK, SECRET, Ended
from damage import READERS
from overrides import SCORED, SMALL

EVIL = """
import pathlib
pathlib.Path({mark!r}).touch()
from transformers import LlamaConfig as EvilConfig, LlamaForCausalLM as Evil
from transformers import PreTrainedTokenizerFast as EvilTokenizer
"""
SPELLED = ("${oc.env:HF_TOKEN}", "${oc.decode:${oc.env:HF_TOKEN}}", "x ${oc.env:HF_TOKEN} y")


def _edit(file: Path, change: Callable[[Any], object]) -> None:
    """Change what a JSON or YAML file says."""
    text = file.read_text()
    held = json.loads(text) if file.suffix == ".json" else yaml.safe_load(text)
    change(held)
    file.write_text(json.dumps(held) if file.suffix == ".json" else yaml.safe_dump(held))


def _stages(run: Path) -> list[Path]:
    return [folder for folder in (run / "contrastive", run / "sft") if folder.is_dir()]


def _sealed(folder: Path) -> None:
    """Whoever changes a folder can compute its checksums anew."""
    from dcr.core import storage

    if (folder / "checksums.json").exists():
        storage.write_checksums(folder)


def _code(run: Path, mark: str, rng: Random) -> str:
    """Code beside the weights, and a configuration that trusts it."""
    named = {"AutoConfig": "evil.EvilConfig", "AutoModelForCausalLM": "evil.Evil"}
    tokens = {"AutoTokenizer": [None, "evil.EvilTokenizer"]}
    for folder in _stages(run):
        (folder / "evil.py").write_text(EVIL.format(mark=mark))
        if (folder / "config.json").exists():
            _edit(folder / "config.json", lambda c: c.update(auto_map=named, model_type="evil"))
        _edit(
            folder / "tokenizer_config.json",
            lambda c: c.update(auto_map=tokens, tokenizer_class="EvilTokenizer"),
        )
        _sealed(folder)
    _edit(run / "config.yaml", lambda c: c["model"].update(trust_remote_code=True))
    return "code beside the weights"


class _Payload:
    def __init__(self, mark: str) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Callable[[str], int], tuple[str]]:
        return os.system, (f"touch '{self.mark}'",)


def _pickles(run: Path, mark: str, rng: Random) -> str:
    held = pickle.dumps(_Payload(mark))
    for folder in _stages(run):
        name = "pytorch_model.bin" if (folder / "config.json").exists() else "adapter_model.bin"
        (folder / name).write_bytes(held)
        for file in folder.glob("*.safetensors"):
            file.unlink()
        _sealed(folder)
    for file in run.rglob("*.ckpt"):
        file.write_bytes(held)
    return "pickles in place of weights and checkpoints"


def _yaml_tag(run: Path, mark: str, rng: Random) -> str:
    text = (run / "config.yaml").read_text()
    tag = f'!!python/object/apply:os.system ["touch {mark}"]'
    (run / "config.yaml").write_text(text.replace("seed: 0", f"seed: {tag}", 1))
    return "a YAML tag that calls os.system"


def _target(run: Path, mark: str, rng: Random) -> str:
    node = {"_target_": "os.system", "command": f"touch {mark}", "_args_": [f"touch {mark}"]}
    key = rng.choice(["model", "data", "sft", "dcr", "trainer"])
    _edit(run / "config.yaml", lambda c: c.update({key: node | c[key]}))
    return f"_target_ in {key}"


def _template(run: Path, mark: str, rng: Random) -> str:
    call = f"cycler.__init__.__globals__.os.popen('touch {mark}').read()"
    made = "{{ ''.__class__.__mro__[1].__subclasses__() }}" * (rng.random() < 0.5)
    made += f"{{{{ {call} }}}}"
    for folder in _stages(run):
        _edit(folder / "tokenizer_config.json", lambda c: c.update(chat_template=made))
        for file in folder.glob("*.jinja"):
            file.write_text(made)
        _sealed(folder)
    if rng.random() < 0.5:
        _edit(run / "config.yaml", lambda c: c["model"].update(template=made))
    return "a template that leaves its sandbox"


def _interpolated(run: Path, mark: str, rng: Random) -> str:
    leaves = [
        (node, key)
        for node in ("model", "data", "trainer", "wandb")
        for key in yaml.safe_load((run / "config.yaml").read_text()).get(node, {})
    ]
    node, key = rng.choice([("model", "system_prompt")] * 5 + leaves)
    spelled = rng.choice(SPELLED)
    _edit(run / "config.yaml", lambda c: c[node].update({key: spelled}))
    return f"{node}.{key}: {spelled}"


def _elsewhere(run: Path, mark: str, rng: Random) -> str:
    """An adapter whose base lies outside, with code."""
    outside = run.parent / "outside"
    shutil.copytree(run / "contrastive", outside)
    (outside / "evil.py").write_text(EVIL.format(mark=mark))
    _edit(outside / "config.json", lambda c: c.update(auto_map={"AutoConfig": "evil.EvilConfig"}))
    for name, key in (("adapter_config.json", "base_model_name_or_path"), ("dcr.json", "base")):
        if (file := run / "sft" / name).exists():
            _edit(file, lambda c, key=key: c.update({key: str(outside)}))
    for folder in _stages(run):
        _sealed(folder)
    _edit(run / "config.yaml", lambda c: c["model"].update(trust_remote_code=True))
    return "an adapter on a base that lies elsewhere"


ATTACKS = (_code, _code, _pickles, _yaml_tag, _target, _template, _interpolated, _elsewhere)


def attacker_case(rng: Random, place: Path, base: Path) -> tuple[str, Ended, list[tuple[str, str]]]:
    """A run folder made to run code or to read secrets, read by one command."""
    name = rng.choice(list(READERS))
    reader, mark = READERS[name], str(place / MARK)
    shutil.copytree(base / ("half" if reader.half else "run"), place / "run")
    run = place / "run"
    did = rng.choice(ATTACKS)(run, mark, rng)
    ended = commands.run(reader.arguments, place)
    return f"{did}; {commands.spell(reader.arguments)}", ended, ended.faults()


# --- links --------------------------------------------------------------------------------------


def link_case(rng: Random, place: Path, base: Path) -> tuple[str, Ended, list[tuple[str, str]]]:
    """A file or folder of a run in whose place stands a link, a device or a pipe."""
    name = rng.choice(list(READERS))
    reader = READERS[name]
    shutil.copytree(base / ("half" if reader.half else "run"), place / "run")
    found = [p for p in sorted((place / "run").rglob("*")) if p.name != ".lock"]
    kind = rng.choice(sorted({p.name for p in found}))
    path = rng.choice([p for p in found if p.name == kind])
    outside = place / "outside"
    outside.mkdir()
    precious = outside / path.name
    shutil.move(path, precious)
    target = rng.choice(
        ["/dev/zero", "/dev/full", "/dev/stdin", "/proc/self/mem", "/", "nowhere", str(precious)]
    )
    if rng.random() < 0.15:
        os.mkfifo(path)
        target = "a pipe"
    else:
        path.symlink_to(target)
    before = commands.contents(outside)
    ended = commands.run(reader.arguments, place)
    faults = ended.faults()
    if target != str(precious) and commands.contents(outside) != before:
        faults.append(("files left", f"{name}: wrote outside of its run, {path.name}"))
    done = f"{path.relative_to(place)} -> {target}; {commands.spell(reader.arguments)}"
    return done, ended, faults


# --- secrets ------------------------------------------------------------------------------------

ADDRESSES = (
    *(
        "http://u:{}@127.0.0.1:9/v1",
        "http://127.0.0.1:9/v1?api_key={}",
        "http://127.0.0.1:9/{}?k={}",
    ),
    *("https://{}@hub.invalid/x", "{}"),
)
ASKED: tuple[Sequence[str], ...] = (
    ("eval.py", "endpoint=@", "endpoint_model=m", "output=said", *SCORED),
    ("eval.py", "run=run", "judge=[llm]", "llm.url=@", "llm.model=m", *SCORED),
    ("eval.py", "run=run", "judge=[moderation]", "moderation.url=@", *SCORED),
    ("dcr.augment", "source=demo_seemingly_toxic", "out=a.jsonl", "endpoint=@",
     "endpoint_model=m", "count=2", *SCORED),
    ("train.py", *SMALL, "run=new", "model.name=@"),
    ("train.py", *SMALL, "run=new", "data.toxic.source=@"),
    ("train.py", *SMALL, "run=new", "wandb.entity=@", "plan=true"),
    ("dcr.dashboard", "entity=@"),
    ("dcr.export", "run=run", "out=@"),
    ("dcr.chat", "run=@"),
)  # fmt: skip


def secret_case(rng: Random, place: Path, base: Path) -> tuple[str, Ended, list[tuple[str, str]]]:
    """A command that is told an address with a secret in it, where nothing listens."""
    shutil.copytree(base / "run", place / "run")
    address = rng.choice(ADDRESSES).replace("{}", SECRET)
    arguments = [word.replace("@", address) if word.endswith("=@") else word
                 for word in rng.choice(ASKED)]  # fmt: skip
    ended = commands.run(arguments, place)
    return commands.spell(arguments), ended, ended.faults()
