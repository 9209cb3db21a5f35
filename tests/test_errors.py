"""A user's error is one line with key, value and cure; the exit code is 2, and nothing is left.

One table for every command. What is wrong inside a file or a model is tested with what reads it.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

TRAIN = {
    "dcr.epoch=3": "dcr.epoch: no such setting; did you mean dcr.epochs?",
    "epochs=3": "epochs: no such setting; did you mean dcr.epochs or model.epochs or sft.epochs?",
    "gen.max_new_tokens=3": "gen.max_new_tokens: no such setting; --cfg job lists what there is",
    "+foo=1": "foo: no such setting; --cfg job lists what there is",
    "+dcr.epochs=1": "+dcr.epochs: exists already; leave out the +",
    "~dcr.margin": "~dcr.margin: a setting cannot be taken away; give it a value",
    "data.toxic=[a]": "data.toxic=[a]: it is a group of settings; set one of those inside",
    "sft.lora.targets={a:1}": "sft.lora.targets={a:1}: give a list, as in key=[a,b]",
    "wandb.tags=${oc.env:N,1}": "wandb.tags=1: give a list, as in wandb.tags=[a,b]",
    'model.label="${"': "its ${ opens no ${name}; write \\${ for the characters themselves",
    "model.label=${nope}": "model.label=${nope}: there is no such setting to take a value from",
    "model=qwen3": "model=qwen3: choose one of llama3_8b, qwen2_5_1_5b, qwen2_5_7b, smollm2_135m, "
    "tiny; any other: model.name=<folder or hub id>",
    "sweep=seeds": "sweep=seeds: choose one of arms, epochs, layer_margin, methods, ratio",
    "dcr.margin=abc": "dcr.margin=abc: give a number",
    "dcr.epochs=1.5": "dcr.epochs=1.5: give a whole number",
    "dcr.epochs=null": "dcr.epochs=null: it needs a value",
    "sft.train_on_prompt=maybe": "sft.train_on_prompt=maybe: give true or false",
    "wandb.tags=a": "wandb.tags=a: give a list, as in key=[a,b]",
    "method=foo": "method=foo: choose one of dcr, stl",
    "stage=contrastve": "stage=contrastve: choose one of all, contrastive, sft",
    "dcr.sampler=x": "dcr.sampler=x: choose one of balanced, proportional",
    "trainer.accelerator=npu": "trainer.accelerator=npu: choose one of auto, cpu, gpu, ",
    "dcr.margin=nan": "dcr.margin=nan: give a number inside (0, 1)",
    "dcr.layer=3": "dcr.layer=3: the model has blocks 1 to 2",
    "data.toxic.count=8": "data.toxic.count: no such setting; did you mean data.normal.count",
    "dcr.ratio=50": "dcr.ratio=50.0 asks for 2000 rows: only ",
    "dcr.batch_size=2": "dcr.batch_size=2: a prompt needs one of its own class and one of the "
    "other beside it; give 3 or more",
    "sft.lora.targets=[]": "sft.lora.targets=[]: name modules, or [all-linear]",
    "data.normal.count=100000": "data.normal.count asks for 100000 rows: only ",
    "data.toxic.source=demo_toxc": "data.toxic.source: no data source is called 'demo_toxc'; did "
    "you mean demo_toxic",
    "data.evaluation.safety=[nosuch]": "data.evaluation.safety: no data source is called 'nosuch'",
    "sft.readout.steps=1 sft.readout.toxic=[demo_normal]": "sft.readout.toxic: demo_normal holds "
    "normal prompts, not toxic",
    "data.toxic.source=no/such.jsonl": "no/such.jsonl: No such file or directory; check the path",
    "data.toxic.source=alpaca": "alpaca holds normal prompts, not toxic; choose another source",
    "model.name=../../etc/x": "model.name=../../etc/x: cannot be opened",
    "sft.lora.targets=[nope]": "sft.lora.targets=[nope]: nope match nothing in the model's blocks; "
    "choose from down_proj, ",
    "model.lora_targets=[lm_head]": "sft.lora.targets=[lm_head]: lm_head match nothing",
    "sft.max_len=8": "sft.max_len=8: no training pair fits; raise it",
    "sft.max_len=4096": "sft.max_len=4096: the model's context is 2048 tokens; lower it",
    "dcr.adapter=lora dcr.lora.targets=[lm_head]": "dcr.lora.targets=[lm_head]: lm_head match",
    "tracking.quantities=[kernel] tracking.entk.top_k=261": "top_k=261: the model has 260 tokens",
    "trainer.strategy=nope": "trainer.strategy=nope: choose one of auto, ddp, fsdp",
    "trainer.devices=100000": "trainer.devices=100000: this machine has ",
    "trainer.num_nodes=2": "trainer.num_nodes=2: no launcher says which node this is",
    "wandb.tags=['']": "wandb.tags=['']: give 1 to 64 characters each",
    f"wandb.tags=[{'x' * 65}]": "x]: give 1 to 64 characters each",
    f"wandb.project={'x' * 129}": "use letters, digits, '.', '_' and '-' only, 128 at most",
    "run=/proc/x": "/proc/x: ",
    "stage=sft": "holds no contrastive/ to start from; run stage=contrastive or stage=all",
    "dcr.margin=1,2": "dcr.margin=1,2: several values; add -m to try each, or write key=[a,b]",
    "dcr.margin": "dcr.margin: cannot be read; settings are written key=value",
    "=3": "model=, data=, preset= and sweep= take the name of a file in conf/",
    "--model": "--model: settings are written key=value",
    "--experimental-rerun=job.pickle": "--experimental-rerun: it would unpickle a file",
    "--config-dir=elsewhere": "--config-dir: its files could name code to run",
    "model.name=???": "model.name: it needs a value",
    "model.architecture.num_attention_heads=0": "model.architecture: ",
    "--config-name": "argument --config-name/-cn: expected one argument",
}

WHOLE = {
    "eval.py model=tiny data=final": "data.evaluation: coconot_contrast_final is reserved",
    "eval.py model=tiny data=final final.plan=none.yaml": "none.yaml: cannot be read (No such file",
    "eval.py model=tiny data=demo final.plan=a.yaml": "none of the sets is reserved for a plan",
    "dcr.frontier plan=none.yaml here": "none.yaml: cannot be read (No such file",
    "eval.py endpoint=[http://a/v1,http://b/v1]": "one text, not a list",
    "eval.py llm.url=[http://a/v1,http://b/v1]": "one text, not a list",
    "dcr.augment out=a.jsonl": "source: nothing given",
    "dcr.augment source=demo_seemingly_toxic out=a.jsonl": "who answers",
    "dcr.augment source=demo_seemingly_toxic out=a.jsonl run=outputs/x": "dcr.export",
    "dcr.augment source=demo_toxic out=a.jsonl endpoint=http://127.0.0.1:1/v1": "say which model",
    "dcr.augment source=demo_toxic out=a.jsonl endpoint=http://127.0.0.1:1/v1 endpoint_model=m "
    "gen.self_cd=1": "gen.self_cd=1.0: an endpoint shows no logits to contrast",
    "dcr.export run=x": "out: nothing given; it is a new folder for the export",
    "dcr.export out=x": "run: nothing given; it is the run folder",
    "dcr.export run=x out=y trust_remote_code=maybe": "trust_remote_code=maybe: give true or false",
    "train.py model=tiny stage=contrastive method=stl": "method=stl: it has no contrastive stage; "
    "use method=dcr",
    "train.py model=tiny data=paper data.root=nowhere": "data.root=nowhere: not a folder",
    "train.py model=tiny dcr.precision=bf16 dcr.optim.lr=1e-7": "dcr.optim.lr=1e-07: too small to "
    "move bf16",
    "train.py model=tiny seed=-1 run=some/where/deep": "seed=-1: ",
    "train.py model=tiny trainer.strategy=fsdp tracking.quantities=[kernel]": "trainer.strategy="
    "fsdp tracking.quantities=[kernel]: is measured by one process, which holds a part",
    "train.py model=tiny trainer.strategy=fsdp dcr.train_embeddings=true": "trainer.strategy=fsdp "
    "dcr.train_embeddings=true: the embeddings are the head as well",
    "train.py model=tiny trainer.strategy=ddp trainer.accelerator=mps": "trainer.strategy=ddp "
    "trainer.accelerator=mps: it trains in one process",
    "train.py model=tiny trainer.accelerator=cpu trainer.devices=4 dcr.batch_size=3": "dcr."
    "batch_size=3: is the batch of all 4 processes",
    "train.py -m model=tiny dcr.margin=0.1,abc": "dcr.margin=abc: give a number",
    "train.py -m model=tiny dcr.margin=2": "dcr.margin=2.0: give a number inside (0, 1)",
    "train.py dcr.scale=2 -m dcr.margin=0.1": "dcr.margin=0.1: options come first, as in -m",
    "eval.py": "nothing to evaluate: give run=<folder>, model=<name> or endpoint=<url>",
    "eval.py run=not/there": "run=not/there: no config.yaml there; name a run folder",
    "eval.py model=tiny tasks=[]": "tasks=[]: nothing to evaluate; name at least one task",
    "eval.py model=tiny tasks=[claims] claims.layer=3": "claims.layer=3: the model has blocks",
    "eval.py model=tiny tasks=[kernel] entk.params=[tail:4]": "entk.params=[tail:4]: the model has",
    "eval.py model=tiny tasks=[foo]": "tasks=[foo]: choose one of over_refusal, safety",
    "eval.py model=tiny judge=[[a]]": "judge=[['a']]: give names, as in judge=[a,b]",
    "eval.py model=tiny gen.max_new_tokens=auto judge=[llm]": "gen.max_new_tokens=auto "
    "judge=[llm]: answers end where XSTest's keywords have decided; give a number of tokens",
    "eval.py model=tiny gen.max_new_tokens=all": "gen.max_new_tokens=all: give a number of tokens",
    "eval.py model=tiny calibrate=2": "calibrate=2: give a share of toxic prompts",
    "eval.py model=tiny limit=0": "limit=0: give 1 or more, or null for whole sets",
    "eval.py model=tiny dcr.margin=0.3": "dcr.margin: no such setting",
    "eval.py model=tiny stage=sft": "stage=sft: is a stage of a run; add run=<folder>, or leave",
    "eval.py model=tiny snapshots=true": "snapshots=true: are those of a run; add run=<folder>",
}
EXPORT = {
    "uot=y": "uot=y: no such setting",
    "stage=last": "stage=last: choose one of contrastive, sft, readout, base",
    "precision=int8": "precision=int8: choose one of auto, bf16, fp32",
    "run=nowhere": "no config.yaml there",
}
AUGMENT = {
    "out=a.json": "end in .jsonl",
    "attempts=4": "attempts=4: give 1 to 3",
    "endpoint=http://127.0.0.1:1/v1": "who answers",
    "sorce=x": "sorce: no such setting; did you mean source",
    "judge=moderation": "judge=moderation: does not say",
    "steering=scans": "steering=scans: not done here",
    "source=demo_toxic": "holds toxic prompts, not seemingly_toxic",
    "count=999": "999 rows asked for, 84",
}
CHOICE = {
    "limit=3": "limit=3: give 10 prompts of each class or more",
    "pairs=demo_toxic": "pairs=demo_toxic: give <seemingly toxic>:<toxic>",
    "pairs=demo_seemingly_toxc:demo_toxic": "did you mean demo_seemingly_toxic",
    "tests=demo_toxic:demo_toxic": "demo_toxic holds toxic prompts, not seemingly_toxic",
    "tests=demo_seemingly_toxic:demo_toxic": "tests: no set of another origin than demo_",
    "dcr.leyer=1": "dcr.leyer: no such setting; did you mean dcr.layer?",
    "out=notes.txt": "out=notes.txt: name a .json file",
    "model.name=/not/here": "model.name=/not/here: cannot be opened",
}
STUDY = {
    "study=epoch": "study=epoch: choose one of epochs, ratio",
    "run=here": "run=here: a study sets it itself",
    "limti=5": "limti=5: no setting of train.py or eval.py; did you mean limit",
    "seeds=0": "seeds=0: give 1 or more",
    "seeds=2 seed=0,1": "seeds=2 seed=0,1: give the first seed alone",
    "trainer.devices=2": "trainer.devices: a study runs job after job",
    "dcr.epochs=[": "dcr.epochs=[",
}
SEARCH = {
    "dcr.margin=0.4..0.1": "dcr.margin=0.4..0.1: give low..high with low below high",
    "dcr.margin=0..0.4:log": "low..high:log with both above 0",
    "dcr.margin=0.1..x": "dcr.margin=0.1..x: give low..high",
    "dcr.layer=1..3": "dcr.layer=3: the model has blocks 1 to 2",
    "dcr.margni=0.1..0.2": "dcr.margni",
    "gen.max_new_tokens=3,4": "gen.max_new_tokens: not searched",
    "seed=0,1": "seed: not searched",
    "method=stl": "method=stl: only dcr has a stage one",
    "objectives=auroc,speed": "objectives=auroc,speed: choose from auroc",
    "objectives=nll data.validation=0": "data.validation=0",
    "validation=contrasts_seemingly_toxic:contrasts_toxic "
    "data.evaluation.safety=[contrasts_toxic]": "data.evaluation tests on",
    "validation=xstest_safe": "give <seemingly toxic>:<toxic>",
    "trials=0": "trials=0: give 1 or more",
    "model.name=/not/here": "model.name=/not/here: cannot be opened",
    "trainer.devices=2": "trainer.devices",
}
SPACES = "dcr.layer=1..2 dcr.margin=0.1..0.4 dcr.epochs=1,2"
BAD = [
    (start, given, says)
    for start, table in {
        "": WHOLE,
        "train.py model=tiny": TRAIN,
        "dcr.export run=x out=y": EXPORT,
        "dcr.augment model=tiny source=demo_seemingly_toxic out=a.jsonl": AUGMENT,
        "dcr.choice model=tiny": CHOICE,
        "dcr.study model=tiny study=epochs out=none": STUDY,
        f"dcr.search model=tiny out=none {SPACES}": SEARCH,
    }.items()
    for given, says in table.items()
]


@pytest.mark.parametrize(("start", "given", "says"), BAD, ids=lambda value: value[:60])
def test_a_bad_command_is_one_line_and_leaves_nothing(
    command: Callable[..., Any], tmp_path: Path, start: str, given: str, says: str
) -> None:
    again = {word.partition("=")[0] for word in given.split()}  # is left out before
    kept = (word for word in start.split() if word.partition("=")[0] not in again)
    ended = command(*kept, *given.split())
    assert ended.code == 2
    assert says in ended.error
    assert all(line.startswith("[") for line in ended.out.splitlines())  # log lines
    assert list(tmp_path.iterdir()) == []
