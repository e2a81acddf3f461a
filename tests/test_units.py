import pytest

from waterline.units import GIB, MIB, gib_text, parameters_text, seconds_text, usd_text


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (gib_text(61 * GIB), "61.0 GiB"),
        (gib_text(3 * MIB), "3 MiB"),
        (seconds_text(1e-7), "100 ns"),
        (seconds_text(87e-6), "87 us"),
        (seconds_text(0.0123), "12.3 ms"),
        (seconds_text(4.2), "4.2 s"),
        (seconds_text(3.1 * 3600), "3.1 h"),
        (usd_text(0.1234), "$0.123"),
        (usd_text(12.3456), "$12.35"),
        (usd_text(87072), "$87,072"),
        (parameters_text(1_821_888), "1.82M"),
        (parameters_text(7_615_616_512), "7.62B"),
        (parameters_text(1_026_408_209_408), "1.03T"),
    ],
)
def test_numbers_are_said_with_the_unit_people_expect(text: str, said: str) -> None:
    assert text == said
