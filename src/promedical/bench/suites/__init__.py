"""The suites of `promedical bench`, by name; each module says what it reads and how it scores."""

from __future__ import annotations

from collections.abc import Mapping

from promedical.bench.metrics import BenchError
from promedical.bench.suites import (
    choice,
    counterfactual,
    healthbench,
    healthbench_meta,
    kqa,
    medbench,
    medsafetybench,
    preference,
    promedical,
    rewardbench2,
)
from promedical.bench.suites.suite import Suite

__all__ = ["SUITES", "suite_named"]

SUITES: Mapping[str, Suite] = {
    suite.name: suite
    for suite in (
        kqa.SUITE,
        kqa.PHYSICIANS,
        counterfactual.SUITE,
        promedical.SUITE,
        *healthbench.SUITES,
        healthbench_meta.SUITE,
        preference.SUITE,
        rewardbench2.SUITE,
        medsafetybench.SUITE,
        medbench.SUITE,
        *choice.SUITES,
    )
}


def suite_named(name: str) -> Suite:
    """A suite.

    Raises:
        BenchError: there is none of that name.
    """
    if name not in SUITES:
        raise BenchError(f"suite: found {name!r}, expected one of {', '.join(SUITES)}")
    return SUITES[name]
