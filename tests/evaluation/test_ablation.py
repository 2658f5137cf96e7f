"""The ablation's table: means, spreads, a variant without codes."""

from cv2jax.evaluation.ablation import VariantResult, draw_table, markdown_table, table_rows


def result(name, size, cer, used=(10,), perplexity=(5.0,)):
    return VariantResult(
        name=name,
        codebook_size=size,
        character_error_rates=cer,
        word_error_rates=tuple(2 * x for x in cer),
        codes_used=used,
        perplexities=perplexity,
        num_speech_tokens=100,
    )


RESULTS = [result("fsq", 6561, (0.02, 0.04), (100, 300), (50.0, 70.0)), result("none", 0, (0.01,))]


def test_rows_show_mean_and_spread_over_seeds():
    fsq, none = table_rows(RESULTS)
    assert fsq == ("fsq", "6,561", "200 ± 141", "3.0 %", "60 ± 14", "3.00 ± 1.41", "6.00 ± 2.83")
    assert none == ("none", "–", "–", "–", "–", "1.00", "2.00")


def test_markdown_has_a_line_a_variant():
    lines = markdown_table(RESULTS, "Caption.").splitlines()
    assert lines[0] == "Caption."
    assert len(lines) == 4 + len(RESULTS)
    assert all(line.count("|") == 8 for line in lines[2:] if line)


def test_the_picture_is_a_png():
    assert draw_table(RESULTS, "Caption.").startswith(b"\x89PNG")
