import math

import numpy as np
import pytest

from martlet.measure.fidelity import CEILING_DB, fidelity, logit_error


def by_hand(reference, test):
    """Plain loops over Python floats."""
    agree, divergences, signal, noise = 0, [], 0.0, 0.0
    for r, t in zip(reference.tolist(), test.tolist(), strict=True):
        agree += r.index(max(r)) == t.index(max(t))
        zr, zt = math.fsum(math.exp(x) for x in r), math.fsum(math.exp(x) for x in t)
        p, q = [math.exp(x) / zr for x in r], [math.exp(x) / zt for x in t]
        divergences.append(math.fsum(a * math.log(a / b) for a, b in zip(p, q, strict=True)))
        signal += math.fsum(x * x for x in r)
        noise += math.fsum((x - y) ** 2 for x, y in zip(r, t, strict=True))
    n = len(divergences)
    return 100 * agree / n, math.fsum(divergences) / n, 10 * math.log10(signal / noise)


@pytest.fixture
def pair():
    rng = np.random.default_rng(0)
    reference = rng.standard_normal((40, 7)).astype(np.float32)
    return reference, (reference + 0.4 * rng.standard_normal((40, 7))).astype(np.float32)


def test_matches_plain_loops(pair):
    found = fidelity(*pair)
    agreement, kl, sqnr = by_hand(*pair)
    assert 50 < agreement < 100
    assert found["top1_agreement_pct"] == pytest.approx(agreement, abs=1e-12)
    assert found["kl_mean"] == pytest.approx(kl, rel=1e-9)
    assert found["logit_sqnr_db"] == pytest.approx(sqnr, rel=1e-9)
    assert found["n_images"] == 40


def test_the_order_of_the_two_matters(pair):
    there, back = fidelity(*pair), fidelity(*pair[::-1])
    assert there["kl_mean"] != pytest.approx(back["kl_mean"], rel=1e-3)
    assert there["logit_sqnr_db"] != pytest.approx(back["logit_sqnr_db"], rel=1e-3)


def test_equal_logits_are_perfect(pair):
    found = fidelity(pair[0], pair[0].copy())
    assert found == {"top1_agreement_pct": 100, "kl_mean": 0, "logit_sqnr_db": CEILING_DB, "n_images": 40}


def test_large_logits_stay_finite():
    found = fidelity(np.array([[1e4, 0.0]]), np.array([[0.0, 1e4]]))
    assert found["kl_mean"] == pytest.approx(1e4)
    assert found["top1_agreement_pct"] == 0


def test_a_shift_of_all_logits_changes_no_probability(pair):
    found = fidelity(pair[0], pair[0] + np.float32(1))
    assert found["kl_mean"] == pytest.approx(0, abs=1e-6)
    assert found["logit_sqnr_db"] < 3


def test_other_shapes_are_refused(pair):
    with pytest.raises(ValueError, match="same images"):
        fidelity(pair[0], pair[1][:-1])


def test_logits_of_two_engines_are_apart_by_what_most_images_are():
    reference = np.array([[1.0, -4.0], [0.5, 2.0], [3.0, 0.0]])
    rounding = np.array([[0.04, 0.0], [0.08, -0.01], [0.0, -0.12]])
    assert logit_error(reference, reference + rounding) == pytest.approx(0.02)
    one_tie = reference + np.array([[0.0, 4.0], [0.0, 0.0], [0.0, 0.0]])
    assert logit_error(reference, one_tie) == 0
    assert logit_error(reference, one_tie[::-1]) > 0.1
