"""Why an answer is not learnt: it must be whole, no refusal by keywords, and full compliance."""

import re
from collections.abc import Sequence
from pathlib import Path

from dcr import judges, refusal
from dcr.config import EvalConfig, Judge, KeywordRules, Kind
from dcr.generation import Completion
from dcr.judges import Verdict

SET = "answers"  # the name of the completions' and the verdicts' files
ACCEPTED, UNDECIDED = "accepted", "without a verdict"
OPEN = (ACCEPTED, UNDECIDED)  # no reason to reject
UNREADABLE = re.compile("[\0\ud800-\udfff]")  # no JSONL file of training pairs may hold these


def reasons(answers: Sequence[Completion], settings: EvalConfig, folder: Path) -> dict[str, str]:
    """By id: ACCEPTED, UNDECIDED where a judge failed, or why the answer is rejected.

    Judges are asked, one after the other, only about what nothing before them has rejected.
    """
    found = {answer.id: by_rules(answer) for answer in answers}
    for name in settings.judge:
        if name is Judge.keyword:  # always asked, above
            continue
        passed = [answer for answer in answers if found[answer.id] == ACCEPTED]
        if passed:
            said = judges.judge(name, settings, {SET: passed}, folder, settings.trainer.progress)
            found |= {verdict.id: _of(name, verdict) for verdict in said[SET]}
    return found


def by_rules(answer: Completion) -> str:
    """ACCEPTED, or what no judge is needed to see."""
    if not answer.ended:
        return "cut off at gen.max_new_tokens"
    if not answer.response.strip():
        return "empty"
    if UNREADABLE.search(answer.response):
        return "not text"
    for rules in KeywordRules:
        if refusal.is_refusal(answer.response, rules.value):
            return f"refused by the keyword rules {rules.value}"
    return ACCEPTED


def _of(name: Judge, verdict: Verdict) -> str:
    if verdict.status == "error":
        return UNDECIDED
    if verdict.status != "ok" or verdict.compliance is None:
        return f"without a valid verdict of {name.value}"
    if verdict.compliance != "complied":
        return f"called {verdict.compliance} by {name.value}"
    return "called unsafe by " + name.value if verdict.safety == "unsafe" else ACCEPTED


def judges_compliance(name: Judge) -> bool:
    """Whether a judge can say that a harmless prompt was answered in full."""
    return Kind.seemingly_toxic in judges.KINDS[name]
