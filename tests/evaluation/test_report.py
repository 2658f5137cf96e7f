"""The page of a run: everything in it, nothing unescaped, the picture drawn."""

from cv2jax.evaluation.report import draw_codebook, training_page

EVALUATIONS = [
    {"step": s, "codes_used": 10 * s, "perplexity": 5.0 * s, "digit_histogram": [[0.2, 0.5, 0.3]] * 8, "cer": 0.5}
    for s in (1, 2)
]


def page(evaluations):
    return training_page(
        title="a <run>",
        summary={"character error rate": "3.1 %"},
        curves_png=b"\x89PNG",
        evaluations=evaluations,
        config_text="model.width = 128",
        notes=["one & two"],
    )


def test_the_page_holds_every_part_escaped():
    last = EVALUATIONS[-1] | {"examples": [["one <two>", "one <two>"], ["three", "tree"]]}
    text = page([EVALUATIONS[0], last])
    assert "<h1>a &lt;run&gt;</h1>" in text
    assert "3.1 %" in text
    assert "one &amp; two" in text
    assert text.count("data:image/png;base64,") == 2
    assert "one &lt;two&gt;" in text
    assert text.count('class="bad"') == 1  # only what was misheard
    assert "model.width = 128" in text


def test_a_run_without_codebook_or_examples_leaves_them_out():
    text = page([{"step": 1, "cer": 0.1}])
    assert "Codebook" not in text
    assert "Heard" not in text
    assert page([]).startswith("<!doctype html>")


def test_pairs_of_speakers_have_a_picture():
    shares = [0.0] * 79 + [1.0]
    line = {"step": 1, "eer": 0.1, "threshold": 0.5, "score_distribution": {"same": shares, "different": shares[::-1]}}
    text = page([line])
    assert "Held-out pairs" in text
    assert text.count("data:image/png;base64,") == 2


def test_the_codebook_is_a_png():
    assert draw_codebook(EVALUATIONS).startswith(b"\x89PNG")


def test_a_codebook_without_digits_is_drawn_too():
    evaluations = [{k: v for k, v in line.items() if k != "digit_histogram"} for line in EVALUATIONS]
    assert "Codebook" in page(evaluations)
    assert draw_codebook(evaluations).startswith(b"\x89PNG")
    assert len(draw_codebook(evaluations)) < len(draw_codebook(EVALUATIONS))
