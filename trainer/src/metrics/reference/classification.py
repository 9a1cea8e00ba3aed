"""Values for the tests of ../classification.rs: python classification.py > classification_golden.json (scikit-learn, scipy)."""

import json
import sys

import numpy as np
from scipy.stats import pearsonr, spearmanr
from sklearn.metrics import accuracy_score, f1_score, matthews_corrcoef

rng = np.random.default_rng(5)
classes, values = [], []
for count, kinds, agree in [(40, 2, 0.7), (25, 2, 0.4), (60, 3, 0.6), (9, 2, 0.9)]:
    truth = rng.integers(0, kinds, count)
    predicted = np.where(rng.random(count) < agree, truth, rng.integers(0, kinds, count))
    classes.append(
        {
            "predicted": predicted.tolist(),
            "truth": truth.tolist(),
            "accuracy": float(accuracy_score(truth, predicted)),
            "f1": float(f1_score(truth == 1, predicted == 1)),
            "matthews": float(matthews_corrcoef(truth, predicted)),
        }
    )
for count, noise in [(30, 0.5), (12, 2.0), (50, 0.1)]:
    a = np.round(rng.normal(size=count), 1)
    b = np.round(a + noise * rng.normal(size=count), 1)
    values.append({"a": a.tolist(), "b": b.tolist(), "pearson": float(pearsonr(a, b)[0]), "spearman": float(spearmanr(a, b)[0])})
json.dump({"classes": classes, "values": values}, sys.stdout)
