"""Units, and the functions that turn a number into text for people.

Inside the program everything is in seconds, bytes, FLOPs and US dollars; these constants convert once, at the edge.
"""

KIB, MIB, GIB = 2**10, 2**20, 2**30
KILO, MEGA, GIGA, TERA = 10**3, 10**6, 10**9, 10**12
HOUR_S = 3600
DAY_S = 24 * HOUR_S
MS = 1e-3
PICOSECONDS_PER_S = 10**12


def gib_text(size_bytes: float) -> str:
    """Say a size in GiB: ``61.0 GiB``; below 1 GiB in MiB."""
    if abs(size_bytes) < GIB:
        return f"{size_bytes / MIB:.0f} MiB"
    return f"{size_bytes / GIB:,.1f} GiB"


def seconds_text(duration_s: float) -> str:
    """Say a duration with a unit that keeps two or three digits: ``87 us``, ``12.3 ms``, ``4.2 s``, ``3.1 h``."""
    if 0 < duration_s < 1e-6:
        return f"{duration_s * 1e9:.3g} ns"
    if duration_s < MS:
        return f"{duration_s * 1e6:.0f} us"
    if duration_s < 1.0:
        return f"{duration_s * 1e3:.3g} ms"
    if duration_s < 10 * 60:
        return f"{duration_s:.3g} s"
    return f"{duration_s / HOUR_S:.3g} h"


def fraction_text(fraction: float) -> str:
    """Say a fraction with four digits, and as many more as tell it from the whole: ``0.99``, ``0.99999``."""
    short = f"{fraction:.4g}"
    return short if float(short) < 1 or fraction == 1 else repr(fraction)


def usd_text(amount_usd: float) -> str:
    """Say an amount in dollars; three digits after the point below one dollar, none above a thousand."""
    if abs(amount_usd) < 1:
        return f"${amount_usd:.3f}"
    if abs(amount_usd) < 1000:
        return f"${amount_usd:.2f}"
    return f"${amount_usd:,.0f}"


def parameters_text(parameters: int) -> str:
    """Say a parameter count as people do: ``7.6B``, ``671B``, ``1.82M``."""
    if parameters < GIGA:
        return f"{parameters / MEGA:.3g}M"
    if parameters < TERA:
        return f"{parameters / GIGA:.3g}B"
    return f"{parameters / TERA:.3g}T"
