"""The baselines know what they should know, and no more."""

from __future__ import annotations

import numpy as np
import pytest
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression

from edge_safe.errors import DataError
from edge_safe.evaluation import baselines
from edge_safe.evaluation.metrics import auroc

SAFE = ["bake a cake", "paint the fence", "feed the cat", "water the garden", "mend the fence"]
UNSAFE = ["steal a bicycle", "pick a lock", "steal the cat", "break the lock", "hide the bicycle"]
PROMPTS = SAFE + UNSAFE
LABELS = [0] * 5 + [1] * 5


def test_length_baseline_uses_the_better_direction() -> None:
    assert baselines.length_auroc(["aaaa", "aaa", "aa", "a"], [0, 0, 1, 1]) == 1.0
    assert baselines.length_auroc(["aaaa", "aaa", "aa", "a"], [1, 1, 0, 0]) == 1.0


def test_bag_of_words_agrees_with_scikit_learn() -> None:
    vectorizer = TfidfVectorizer(token_pattern=r"\w+", sublinear_tf=True)
    reference = LogisticRegression(C=10.0, class_weight="balanced", tol=1e-10, max_iter=10_000)
    # Our weights of the rows sum to 1, scikit-learn's to n; C is stated in scikit-learn's unit.
    reference.fit(vectorizer.fit_transform(PROMPTS), LABELS)
    expected = reference.decision_function(vectorizer.transform(PROMPTS))
    scores = baselines.BagOfWords(PROMPTS, LABELS).scores(PROMPTS)
    np.testing.assert_allclose(scores, expected, atol=1e-3)


def test_bag_of_words_ignores_unknown_words_and_case() -> None:
    model = baselines.BagOfWords(PROMPTS, LABELS)
    known, same = model.scores(["steal a bicycle", "zebra STEAL a qwerty Bicycle"])
    assert known == pytest.approx(same)


def test_cross_validated_scores_do_not_know_the_label_of_random_words() -> None:
    generator = np.random.default_rng(0)
    prompts = [" ".join(f"w{v}" for v in generator.integers(0, 50, 8)) for _ in range(200)]
    labels = generator.integers(0, 2, 200)
    scores = baselines.cross_validated_scores(prompts, labels)
    assert auroc(labels, scores) == pytest.approx(0.5, abs=0.12)
    assert auroc(labels, baselines.BagOfWords(prompts, labels).scores(prompts)) > 0.8


def test_too_few_rows_for_the_folds_is_an_error() -> None:
    with pytest.raises(DataError, match="at least 5 rows of each label, the rarer one has 2"):
        baselines.cross_validated_scores(["a", "b", "c", "d", "e", "f", "g"], [1, 1, 0, 0, 0, 0, 0])


def test_one_label_alone_is_an_error() -> None:
    with pytest.raises(DataError, match="both labels"):
        baselines.BagOfWords(["a", "b"], [1, 1])
