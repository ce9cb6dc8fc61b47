"""Values of irrCAC 0.4.4 on made-up votes and on K-QA's, written to irrcac.json.

irrCAC cannot be a dependency (it pins pandas below 3 and an old scipy), so its values are kept:

    pip install --no-deps irrCAC==0.4.4
    python tests/data/make_irrcac_golden.py
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))


def cases() -> dict[str, tuple[np.ndarray, int]]:
    """Name → (labels [items, columns], −1 for no vote; number of labels)."""
    from promedical.bench.agreement import votes
    from promedical.demo.kqa import load_kqa

    rng = np.random.default_rng(7)
    found: dict[str, tuple[np.ndarray, int]] = {}
    for name, shape, k, missing in (
        ("two_readers", (40, 2), 3, 0.0),
        ("three_readers", (40, 3), 3, 0.0),
        ("some_missing", (60, 5), 3, 0.5),
        ("five_point", (50, 3), 5, 0.2),
        ("skewed", (80, 2), 2, 0.0),
    ):
        truth = rng.integers(0, k, shape[0]) if name != "skewed" else (rng.random(shape[0]) < 0.05)
        noise = rng.integers(0, k, shape)
        labels = np.where(rng.random(shape) < 0.7, np.asarray(truth, dtype=int)[:, None], noise)
        labels = np.where(rng.random(shape) < missing, -1, labels)
        found[name] = labels[(labels >= 0).any(axis=1)], k
    cast = votes(load_kqa().physicians)
    found["kqa"] = cast.labels, len(cast.names)
    found["kqa_entailed"] = cast.binary().labels, 2
    return found


def values(labels: np.ndarray, n_labels: int) -> dict[str, float]:
    """Coefficients by irrCAC."""
    import pandas as pd
    from irrCAC.raw import CAC

    frame = pd.DataFrame(np.where(labels < 0, np.nan, labels.astype(float)))
    scale = [float(k) for k in range(n_labels)]

    def value(coefficient: str, weights: str = "identity") -> float:
        rater = CAC(frame, weights=weights, categories=scale, digits=12)
        return float(getattr(rater, coefficient)()["est"]["coefficient_value"])

    return {
        "fleiss": value("fleiss"),
        "gwet": value("gwet"),
        "krippendorff": value("krippendorff"),
        "fleiss_linear": value("fleiss", "linear"),
        "fleiss_quadratic": value("fleiss", "quadratic"),
    }


def main() -> None:
    """Write irrcac.json."""
    from importlib.metadata import version

    golden = {
        "made_with": f"irrCAC {version('irrCAC')}",
        "command": "python tests/data/make_irrcac_golden.py",
        "values": {name: values(*case) for name, case in cases().items()},
    }
    (HERE / "irrcac.json").write_text(json.dumps(golden, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
