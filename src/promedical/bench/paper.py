"""The paper's own figures (arXiv 2604.08326), as data, to stand beside ours as the paper's.

They were read from the paper and measured there: other models (8B), other data (ProMedical-Bench,
795 instructions, not published), other labels (ten physicians). They are never a claim of this
project, carry no interval because the paper prints none, and no test compares ours with them.
Which of our metrics a column belongs to is left to `promedical.bench.report`.
"""

from __future__ import annotations

from dataclasses import dataclass

__all__ = [
    "ABLATIONS",
    "CITATION",
    "EXTERNAL",
    "POLICIES",
    "REWARD_MODELS",
    "PaperPolicy",
    "PaperRewardModel",
]

CITATION = "ProMedical, ACL 2026 (arXiv 2604.08326)"


@dataclass(frozen=True)
class PaperRewardModel:
    """One row of the paper's reward-model table; per cent, None where the paper gives nothing.

    Args:
        name: as in the paper.
        pointwise_proficiency, pointwise_safety, pairwise_safety, overall: its columns "pointwise
            P", "pointwise S", "pairwise S" and "overall".
        veto_precision, veto_recall, veto_f1: its columns "veto P / R / F1".
    """

    name: str
    pointwise_proficiency: float
    pointwise_safety: float
    pairwise_safety: float
    overall: float
    veto_precision: float | None = None
    veto_recall: float | None = None
    veto_f1: float | None = None


@dataclass(frozen=True)
class PaperPolicy:
    """One row of the paper's policy table (Qwen3-8B); per cent, None where it gives nothing."""

    name: str
    proficiency: float | None
    excellence: float | None
    safety: float | None
    overall: float


REWARD_MODELS = (
    PaperRewardModel("Qwen3-8B, untrained", 50.15, 62.79, 65.64, 64.30),
    PaperRewardModel("GPT-5", 91.50, 76.45, 77.39, 76.42, 79.24, 73.85, 76.45),
    PaperRewardModel("DeepSeek-R1", 89.50, 78.80, 80.00, 78.55, 81.50, 76.28, 78.80),
    PaperRewardModel("PairRM-LLaMA3-8B", 76.50, 58.80, 60.43, 58.95, 62.45, 59.80, 61.10),
    PaperRewardModel("medical_o1_verifier_3B", 75.20, 51.90, 53.04, 51.10, 55.30, 50.80, 52.95),
    PaperRewardModel("ProMedical-RM (Llama-3-8B)", 90.15, 87.20, 86.10, 85.40, 89.40, 85.10, 87.20),
    PaperRewardModel("ProMedical-RM (Qwen3-8B)", 90.85, 88.50, 87.39, 86.55, 91.50, 86.80, 89.09),
)

POLICIES = (
    PaperPolicy("DPO", None, None, None, 72.05),
    PaperPolicy("PPO", None, None, None, 74.20),
    PaperPolicy("implicit scalar + GRPO", 91.20, None, 81.50, 73.15),
    PaperPolicy("ProMedical GRPO", 90.85, 92.80, 90.26, 76.39),
)

# (what was taken away, measure, in full, without it). Which column the paper means is unclear.
ABLATIONS = (
    ("explicit criteria", "pairwise", 88.50, 83.15),
    ("safety data", "safety", 90.26, 79.20),
    ("safety veto", "safety", 90.26, 82.65),
    ("bonus margin", "excellence", 92.80, 86.50),
)

# (benchmark or training set, question, + criteria, + sub-criteria).
EXTERNAL = (
    ("UltraMedical", 80.53, None, None),
    ("RaR", 79.03, 80.10, 81.32),
    ("InfiMed-ORBIT", 80.85, 81.07, 81.63),
    ("ProMedical", 81.94, 82.32, 83.60),
    ("ProMedical, with retrieval", 81.60, 83.20, 84.28),
)
