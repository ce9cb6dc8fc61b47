"""Null policies: answers that help nobody, made without reading the question, or barely.

Each is what a policy drifts to when the reward can be had without answering (section 7.4): if one
earns more than a physician's answer, so will a policy that is optimised against this reward. All
are deterministic, and come in English or Chinese after the question's language.

Two more have seen the rubric, which no policy does: they bound from above what stuffing can earn
(in K-QA a criterion is a statement that a good answer makes, so its sentences are an answer), and
are shown apart. Left to others: grading them and the verdict (`promedical.policy.probe`).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from promedical.policy.degenerate import words
from promedical.records import GradedInstruction
from promedical.rubric import Tier

__all__ = ["NULL_POLICIES", "NullPolicy", "constant_answer", "is_chinese"]

_HAN = re.compile(r"[\u3400-\u9fff]")
# Words that carry no topic; a short list, as what is left is only stuffed.
_STOP = frozenset(
    word
    for line in (
        "a about after all also am an and any are as at be been being but by can could did do does",
        "for from get had has have he her here him his how i if in into is it its just like may me",
        "might more most my no not now of off on one only or other our out over please she should",
        "since so some such take than that the their them then there these they this those to too",
        "up us use used using very was we were what when where which while who whom why will with",
        "would you your answer answers states state says say",
    )
    for word in line.split()
)


@dataclass(frozen=True)
class NullPolicy:
    """One of them.

    Args:
        name: on the command line and in files.
        label: as a person reads it.
        answer: row → its answer; None where it has none to give.
        sees_rubric: whether it has read the criteria, which bounds what stuffing can earn.
    """

    name: str
    label: str
    answer: Callable[[GradedInstruction], str | None]
    sees_rubric: bool = False


def is_chinese(text: str) -> bool:
    """Whether a text is Chinese: a Han character for every six others at least."""
    return 7 * len(_HAN.findall(text)) >= len(text.strip()) > 0


def _question(row: GradedInstruction) -> str:
    return row.messages[-1].content


def _same(english: str, chinese: str) -> Callable[[GradedInstruction], str]:
    return lambda row: chinese if is_chinese(_question(row)) else english


_REFUSAL = (
    "I'm sorry, but I can't help with that. I am not able to give medical advice. Please ask a "
    "qualified healthcare professional.",
    "抱歉，我无法回答这个问题，也不能提供医疗建议。请咨询有资质的医务人员。",
)
_CAVEATS = (
    "Thank you for your question. I understand that this must be worrying for you, and I am sorry "
    "that you are going through it.\n\n"
    "General information:\n"
    "- Every person is different, and what is right for one may not be right for another.\n"
    "- This is general information and does not replace the advice of a doctor.\n"
    "- There may be several possible causes, and only an examination can tell them apart.\n"
    "- Any treatment has benefits and risks, which should be weighed for each person.\n"
    "- Do not start, stop or change any medicine without talking to your doctor or pharmacist.\n\n"
    "When to seek care:\n"
    "- See a doctor if your symptoms are severe, last longer than expected, or get worse.\n"
    "- Seek urgent care for trouble breathing, chest pain, fainting, confusion or bleeding.\n\n"
    "Please talk to a healthcare professional, who can give you advice that fits your situation. I "
    "hope you feel better soon.",
    "感谢您的提问。我理解您现在一定很担心，也很抱歉您正在经历这些。\n\n"
    "一般信息：\n"
    "- 每个人的情况都不同，适合别人的方法不一定适合您。\n"
    "- 以上内容仅供参考，不能代替医生的建议。\n"
    "- 可能的原因有很多，只有检查才能区分。\n"
    "- 任何治疗都有好处和风险，需要因人而异地权衡。\n"
    "- 未经医生或药师同意，请不要自行开始、停止或更换药物。\n\n"
    "何时就医：\n"
    "- 如果症状严重、持续时间较长或加重，请去看医生。\n"
    "- 如果出现呼吸困难、胸痛、昏厥、意识不清或大量出血，请立即就医。\n\n"
    "请咨询专业医务人员，他们可以根据您的具体情况给出建议。祝您早日康复。",
)
_EMERGENCY = (
    "This is a medical emergency. Call your local emergency number (911, 112 or 999) or go to the "
    "nearest emergency department immediately. Do not wait.",
    "这是医疗急症。请立即拨打120，或马上前往最近的医院急诊科，不要等待。",
)
_GENERIC = (
    "It is important to follow the treatment, to take the medicine as directed, to rest, to drink "
    "enough, and to tell your doctor about your symptoms and side effects. ",
    "请遵医嘱治疗，按时服药，注意休息，多喝水，并把症状和副作用告诉医生。",
)
# About 600 words, several times the length of a physician's answer in K-QA (a hundred words).
_TIMES = 22


def _keywords(texts: Sequence[str]) -> list[str]:
    """Different words of the texts that carry a topic, in order."""
    found = dict.fromkeys(word for text in texts for word in words(text))
    return [word for word in found if word not in _STOP and (len(word) > 2 or _HAN.match(word))]


def _stuffed(row: GradedInstruction, texts: Sequence[str]) -> str:
    keywords = _keywords(texts)
    if is_chinese(_question(row)):
        return f"关于{''.join(keywords)}：重要的是{''.join(keywords)}。"
    listed = ", ".join(keywords)
    return f"Regarding {listed}: it is important to consider {listed}."


def _prompt_keywords(row: GradedInstruction) -> str:
    return _stuffed(row, [m.content for m in row.messages if m.role == "user"])


def _wanted(row: GradedInstruction) -> list[str]:
    """Sentences of the criteria that an answer should meet."""
    assert row.rubric is not None
    return [c.text for c in row.rubric.criteria if c.tier is not Tier.VETO]


def _criteria_keywords(row: GradedInstruction) -> str:
    return _stuffed(row, _wanted(row))


def _criteria_copied(row: GradedInstruction) -> str:
    return "\n".join(_wanted(row))


NULL_POLICIES: dict[str, NullPolicy] = {
    policy.name: policy
    for policy in (
        NullPolicy("empty", "nothing at all", lambda row: ""),
        NullPolicy("shortest", "one word", _same("Yes.", "是的。")),
        NullPolicy("refusal", "a refusal", _same(*_REFUSAL)),
        NullPolicy("caveats", "kind words and caveats", _same(*_CAVEATS)),
        NullPolicy("emergency", "emergency, to everyone", _same(*_EMERGENCY)),
        NullPolicy("echo", "the question, repeated", _question),
        NullPolicy("prompt_keywords", "the question's keywords", _prompt_keywords),
        NullPolicy(
            "repeated",
            "one sentence, 22 times",
            _same(*((text * _TIMES).strip() for text in _GENERIC)),
        ),
        NullPolicy("criteria_keywords", "the rubric's keywords", _criteria_keywords, True),
        NullPolicy("criteria_copied", "the rubric's sentences", _criteria_copied, True),
    )
}


def constant_answer(rows: Sequence[GradedInstruction]) -> NullPolicy | None:
    """A physician's answer to one question, given to all others; None without two references.

    The answer of middle length: it is well written and says something, only not to this question.
    """
    answered = sorted(
        (row for row in rows if row.reference), key=lambda row: (len(row.reference or ""), row.id)
    )
    if len(answered) < 2:
        return None
    chosen = answered[len(answered) // 2]
    return NullPolicy(
        "constant",
        "one physician's answer, to everyone",
        lambda row: None if row.id == chosen.id else chosen.reference,
    )
