"""The metrics of classification, as an `evaluate` module that is loaded without asking the Hub.

Its configurations are the problem types of transformers. It covers what GLUE reports: accuracy, F1,
Matthews correlation, and the correlations of Pearson and Spearman.
"""

import math

import datasets
import evaluate
import numpy as np
from scipy.stats import pearsonr, spearmanr
from sklearn.metrics import accuracy_score, f1_score, matthews_corrcoef, mean_squared_error


class Classification(evaluate.Metric):
    """Scores of class numbers, of rows of 0 and 1, or of numbers."""

    def _info(self) -> evaluate.MetricInfo:
        label = {
            "single_label_classification": datasets.Value("int64"),
            "multi_label_classification": datasets.List(datasets.Value("int64")),
            "regression": datasets.Value("float64"),
        }[self.config_name]
        return evaluate.MetricInfo(
            description="Accuracy, F1 and Matthews correlation of class numbers (F1 is that of "
            "class 1 if there are two classes, else the mean over the classes). Of several labels "
            "to an example: micro F1, and accuracy, the share of examples with all labels right. "
            "Regression: the correlations of Pearson and Spearman, 0 if all predictions or all "
            "references are equal, and the mean squared error.",
            citation="",
            inputs_description="predictions, references: one of each per example.",
            features=datasets.Features({"predictions": label, "references": label}),
        )

    def _compute(self, *, predictions, references) -> dict[str, float]:
        if self.config_name == "regression":
            if not np.isfinite(predictions).all():  # a model that has diverged
                return dict.fromkeys(("pearson", "spearman", "mse"), math.nan)
            is_constant = 1 in (len(set(predictions)), len(set(references)))
            return {
                "pearson": 0.0 if is_constant else float(pearsonr(predictions, references)[0]),
                "spearman": 0.0 if is_constant else float(spearmanr(predictions, references)[0]),
                "mse": float(mean_squared_error(references, predictions)),
            }
        scores = {"accuracy": float(accuracy_score(references, predictions))}
        if self.config_name == "multi_label_classification":
            return scores | {
                "f1": float(f1_score(references, predictions, average="micro", zero_division=0.0))
            }
        is_binary = max(*predictions, *references) < 2
        average = "binary" if is_binary else "macro"
        return scores | {
            "f1": float(f1_score(references, predictions, average=average, zero_division=0.0)),
            "matthews_correlation": float(matthews_corrcoef(references, predictions)),
        }
