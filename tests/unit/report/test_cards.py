"""The page of the zoo says what the papers state, what was counted and measured, and what differs."""

import sys
from pathlib import Path

from martlet import models
from martlet.report import cards

sys.path.insert(0, str(Path(__file__).parents[1]))
from zoo_results import document, record


def rows(text):
    return {line.split("`")[1]: line for line in text.splitlines() if line.startswith("| `")}


def test_every_model_has_a_row_without_results():
    found = rows(cards.page(None))
    assert set(found) == {models.spec(name) for name in (*models.names(), *models.timm_names())}
    assert found["timm:repvit_m0_9"] == "| `timm:repvit_m0_9` | 224×224 | – (5.1M) | – (0.8G) | 78.7 | – |"


def test_a_card_has_the_paper_and_its_licence():
    text = cards.page(None)
    card = text[text.index("## RepViT") :].partition("\n## ")[0]
    assert "Wang et al., 2023, [arXiv:2307.09283](https://arxiv.org/abs/2307.09283)." in card
    assert "[Code](https://github.com/THU-MIG/RepViT), licence: Apache-2.0." in card
    fastvit = text[text.index("## FastViT") :].partition("\n## ")[0]
    assert "Parameters of `fastvit_t8`, `fastvit_t12`" in fastvit
    assert "not reconciled" in fastvit


def test_counts_times_export_and_techniques_are_those_of_the_results():
    failed = {"openvino": {"error": "no such operator"}, "onnxruntime": {"relative_error": 0.02}}
    results = document(
        record("repvit_m0_9", 5_067_056, 815_617_344, 6.0),
        record("repvit_m1_0", 6_810_000, 1_106_000_000, **failed),
        {
            "name": "convit_tiny",
            "counts": {
                "image_size": [224, 224],
                "params": 5_711_000,
                "macs": 1_252_000_000,
                "macs_without_attention": 1_074_000_000,
            },
        },
    )
    text = cards.page(results)
    found = rows(text)
    assert found["timm:repvit_m0_9"] == (
        "| `timm:repvit_m0_9` | 224×224 | 5.07 M (5.1M) | 816 M (0.8G) | 78.7 | 6.00 / 72.00 | 12.00 | equal (3e-06) |"
    )
    assert found["timm:repvit_m1_0"].endswith("| 80.0 | – | – | openvino can't: no such operator; onnxruntime 2e-02 |")
    blind = record("repvit_m0_9", 5_067_056, 815_617_344, between_images=1e-3)  # no further than 1e-6 would be equal
    found = rows(cards.page(document(blind)))["timm:repvit_m0_9"]
    assert found.endswith("| openvino 2e-06; onnxruntime 3e-06 |")
    found = rows(text)
    assert "| 5.71 M (6M) | 1.07 G (1G) |" in found["timm:convit_tiny"]  # as its paper counts
    assert (
        "Techniques: fuse all; low_rank none; prune none; quantize `int8`; tokens none." in text
    )  # of those that were asked
    assert "a CPU, 2 cores, 2026-01-02; openvino 1.2, torch 9.9, timm 1.0." in text


def test_a_technique_that_came_later_is_not_called_refused():
    results = document(record("repvit_m0_9", 1, 1), record("repvit_m1_0", 1, 1, refused_by=["gptq", "tome"]))
    assert "Techniques: fuse all; quantize `int8`; tokens none." in cards.page(results)


def test_what_is_left_out_is_said_with_the_reason():
    text = cards.page(None).partition("## Left out")[2]
    assert "| [FMViT](https://arxiv.org/abs/2311.05707), Tan et al., 2023 |" in text
    assert "the authors' repository holds a README and a licence |" in text
    assert len([line for line in text.splitlines() if "arxiv.org" in line]) == 3
