"""Answers that repeat themselves or refuse: the two ways in which a policy stops answering.

Both are told from the text alone, in English and Chinese, so that they cost nothing in every step
of a training. They are counts for a curve, not verdicts on an answer: a list of patterns misses a
refusal in other words.

    repeated n-grams   1 − different n-grams / n-grams, n = 4 words (or Chinese characters)
    refusal            says that it cannot help, and says little besides

Left to others: whether what an answer says is right (the rubric).
"""

from __future__ import annotations

import re

__all__ = ["REPEATS_FROM", "is_refusal", "repeated_share", "repeats", "words"]

NGRAM = 4
# The highest of 199 physicians' answers in K-QA is 0.07, of 50 language models' 0.15.
REPEATS_FROM = 0.2
# Of a refusal, so many words (or characters) besides may be left.
LITTLE = 12

_WORD = re.compile(r"[\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af]|[^\W_]+(?:['’][^\W_]+)*")
_SENTENCE = re.compile(r"[^.!?。！？\n]+[.!?。！？\n]*")
_CANNOT = (
    r"(?:can(?:no|['’])?t|can not|could ?n['’]t|am not able to|['’]m not able to|am unable to|"
    r"['’]m unable to|will not|won['’]t|must decline to|have to decline to|decline to|"
    r"am not (?:qualified|allowed|authorized|authorised|permitted) to|"
    r"['’]m not (?:qualified|allowed|authorized|authorised|permitted) to)"
)
_HELP = (
    r"(?:help|assist|answer|provide|give|offer|advise|respond|comply|discuss|comment|support|do "
    r"that|fulfil|continue)"
)
_REFUSES = re.compile(
    "|".join(
        (
            rf"\b(?:I|we)\s*{_CANNOT}\s+(?:\w+\s+){{0,2}}{_HELP}\b",
            r"\b(?:I|we)\s*(?:am|are|['’]m|['’]re)\s+(?:(?:very|so|really)\s+)?sorry,?\s+but\b",
            r"\bI\s+apologi[sz]e,?\s+but\b",
            r"\bas an (?:AI|artificial intelligence)\b",
            r"\bI\s*(?:am|['’]m)\s+(?:just |only |merely )?an? (?:AI|language model|chatbot)\b",
            r"\b(?:this|that|it) is (?:beyond|outside|not within) (?:my|the) (?:scope|remit)\b",
            r"(?:抱歉|对不起|很遗憾)[^。！？\n]{0,12}(?:无法|不能|没办法)",
            r"我(?:目前|暂时)?(?:无法|不能|没办法|不便)[^。！？\n]{0,6}"
            r"(?:提供|回答|给出|帮助|协助|解答|诊断|建议|讨论|评论|满足)",
            r"(?:无法|不能)为[您你](?:提供|解答|诊断)",
            r"作为(?:一个|一名)?(?:AI|人工智能|语言模型|大模型)",
            r"我(?:只)?是(?:一个|一名)?(?:AI|人工智能|语言模型|大模型)",
        )
    ),
    re.IGNORECASE,
)
_DEFERS = re.compile(
    r"\b(?:consult|see|contact|call|visit|talk to|talk with|speak to|speak with|ask|seek|reach out)"
    r"\b.*\b(?:doctor|physician|clinician|pharmacist|provider|professional|care|help|advice|"
    r"attention|emergency|services)\b"
    r"|(?:咨询|联系|前往|寻求|请教|拨打|就医|就诊)",
    re.IGNORECASE,
)


def words(text: str) -> list[str]:
    """The words of a text in lower case; a Chinese, Japanese or Korean character is one."""
    return [found.lower() for found in _WORD.findall(text)]


def repeated_share(text: str, n: int = NGRAM) -> float:
    """Share of a text's n-grams that were there before; 0 for a text shorter than n + 1."""
    tokens = words(text)
    grams = [tuple(tokens[i : i + n]) for i in range(len(tokens) - n + 1)]
    return 1 - len(set(grams)) / len(grams) if grams else 0.0


def repeats(text: str) -> bool:
    """Whether so much of it is repeated that no person writes so."""
    return repeated_share(text) >= REPEATS_FROM


def is_refusal(text: str) -> bool:
    """Whether an answer says that it cannot help and, but for "see a doctor", nothing much else."""
    sentences = [s for s in _SENTENCE.findall(text) if s.strip()]
    if not any(_REFUSES.search(s) for s in sentences[:3]):
        return False
    left = [s for s in sentences if not _REFUSES.search(s) and not _DEFERS.search(s)]
    return sum(len(words(s)) for s in left) <= LITTLE
