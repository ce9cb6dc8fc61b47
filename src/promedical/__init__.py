"""ProMedical: aligning medical language models with physicians' criteria."""

from promedical.rubric import (
    Criterion,
    Preference,
    RewardSpec,
    Rubric,
    RubricError,
    Scores,
    Tier,
    Unresolved,
    Verdict,
    VetoKind,
    compare,
    reward,
    score,
)

__all__ = [
    "Criterion",
    "Preference",
    "RewardSpec",
    "Rubric",
    "RubricError",
    "Scores",
    "Tier",
    "Unresolved",
    "Verdict",
    "VetoKind",
    "compare",
    "reward",
    "score",
]
__version__ = "0.1.0"
