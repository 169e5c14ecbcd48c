"""Writes mixed_models.json: what statsmodels finds in simulated differences. python tests/golden/mixed_models.py

Runs where statsmodels is installed, which nothing else needs. MixedLM by REML with crossed random effects of seeds and
items; the mean squares of the two-way analysis of variance; Holm's p values.
"""

import json
from importlib.metadata import version
from pathlib import Path

import numpy as np
import pandas as pd
import statsmodels.formula.api as smf
from statsmodels.stats.anova import anova_lm
from statsmodels.stats.multitest import multipletests

CASES = {"all": (0.5, 0.7, 1.0), "seeds": (1.5, 0.2, 0.4), "items": (0.1, 2.0, 0.5)}  # variances


def simulated(name: str, seeds: int = 5, items: int = 16) -> np.ndarray:
    random = np.random.default_rng([*map(ord, name)])
    seed, item, rest = np.sqrt(CASES[name])
    parts = seed * random.standard_normal((seeds, 1)), item * random.standard_normal(items)
    return np.round(0.4 + sum(parts) + rest * random.standard_normal((seeds, items)), 6)


def found(name: str) -> dict:
    d = simulated(name)
    table = pd.DataFrame([{"seed": s, "item": i, "d": d[s, i]} for s, i in np.ndindex(d.shape)])
    random = {"seed": "0 + C(seed)", "item": "0 + C(item)"}
    model = smf.mixedlm("d ~ 1", table, groups=np.ones(len(table)), vc_formula=random)
    fit = model.fit(reml=True, method="nm", xtol=1e-12, ftol=1e-14, maxiter=5000)
    parts = dict(zip(model.exog_vc.names, map(float, fit.vcomp), strict=True))
    squares = anova_lm(smf.ols("d ~ C(seed) + C(item)", table).fit())["mean_sq"]
    return {
        "differences": d.tolist(),
        "mean": float(fit.fe_params["Intercept"]),
        "stderr": float(fit.bse_fe["Intercept"]),
        "variances": {**parts, "rest": float(fit.scale)},
        "mean_squares": {"seed": squares["C(seed)"], "item": squares["C(item)"], "rest": squares["Residual"]},
    }


if __name__ == "__main__":
    p = [0.2, 0.004, 0.03, 0.011, 0.9, 0.03]
    tree = {
        "statsmodels": version("statsmodels"),
        "models": {name: found(name) for name in CASES},
        "holm": {"p": p, "adjusted": multipletests(p, method="holm")[1].tolist()},
    }
    Path(__file__).with_suffix(".json").write_text(json.dumps(tree) + "\n")
