"""Readers of public datasets, one module a dataset: their rows become graded instructions.

`SOURCES` names the adapters. Each is a generator: `SOURCES[settings.name](settings)` yields a
`Kept` or a `Rejected` for every row. In `healthbench_graded` a row is an answer, several of which
make one instruction.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

from promedical.corpus.sources.chatdoctor import chatdoctor
from promedical.corpus.sources.dahl import dahl
from promedical.corpus.sources.healthbench import healthbench
from promedical.corpus.sources.healthbench_graded import healthbench_graded
from promedical.corpus.sources.kqa import kqa
from promedical.corpus.sources.medical_eval_sphere import medical_eval_sphere
from promedical.corpus.sources.medical_instruction import medical_instruction
from promedical.corpus.sources.medinstruct import medinstruct
from promedical.corpus.sources.medmcqa import medmcqa
from promedical.corpus.sources.medqa import medqa
from promedical.corpus.sources.medquad import medquad
from promedical.corpus.sources.medsafetybench import medsafetybench
from promedical.corpus.sources.pubmedqa import pubmedqa
from promedical.corpus.sources.rar_medicine import rar_medicine
from promedical.corpus.sources.reading import Columns, Kept, Read, Rejected, SourceSettings
from promedical.corpus.sources.table import table
from promedical.corpus.sources.ultramedical_preference import ultramedical_preference

__all__ = ["SOURCES", "Columns", "Kept", "Read", "Rejected", "SourceSettings"]

SOURCES: dict[str, Callable[[SourceSettings], Iterator[Read]]] = {
    "medqa": medqa,
    "medical-eval-sphere": medical_eval_sphere,
    "pubmedqa": pubmedqa,
    "dahl": dahl,
    "medical-instruction-120k": medical_instruction,
    "medinstruct-52k": medinstruct,
    "medquad": medquad,
    "chatdoctor": chatdoctor,
    "medmcqa": medmcqa,
    "kqa": kqa,
    "healthbench": healthbench,
    "healthbench-graded": healthbench_graded,
    "ultramedical-preference": ultramedical_preference,
    "rar-medicine": rar_medicine,
    "medsafetybench": medsafetybench,
    "jsonl": table,
    "csv": table,
    "parquet": table,
}
