"""A plot of latencies over time, log scale, as an SVG that needs nothing else."""
import math

WIDTH, HEIGHT = 860, 440
LEFT, RIGHT, TOP, BOTTOM = 70, 20, 84, 50
COLOURS = ("#0060a8", "#c25100", "#3d8b37")
LABELS = {0.01: "10 µs", 0.1: "0.1 ms", 1: "1 ms", 10: "10 ms", 100: "100 ms", 1000: "1 s",
          10000: "10 s", 100000: "100 s"}
PAGE = """<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" \
width="{width}" height="{height}" font-family="sans-serif" font-size="12">
<rect width="{width}" height="{height}" fill="#fff"/>
<text x="{left}" y="20" font-size="14" font-weight="bold">{title}</text>
{body}
</svg>
"""
LINE = '<line x1="{0:.1f}" y1="{1:.1f}" x2="{2:.1f}" y2="{3:.1f}" stroke="{4}"{5}/>'
TEXT = '<text x="{0:.1f}" y="{1:.1f}" fill="{2}"{4}>{3}</text>'
CURVE = '<polyline points="{0}" fill="none" stroke="{1}" stroke-width="{2}"{3}/>'
CENTRED = ' text-anchor="middle"'
FAINT = ' stroke-opacity="0.45"'
GREY, DARK = "#ddd", "#333"


class Axes:
    def __init__(self, times, latencies):
        self.begin, self.end = math.floor(min(times)), math.ceil(max(times))
        self.low = math.floor(math.log10(min(latencies)))
        self.high = math.ceil(math.log10(max(latencies)))

    def x(self, seconds):
        share = (seconds - self.begin) / (self.end - self.begin)
        return LEFT + share * (WIDTH - LEFT - RIGHT)

    def y(self, milliseconds):
        share = (math.log10(milliseconds) - self.low) / (self.high - self.low)
        return HEIGHT - BOTTOM - share * (HEIGHT - TOP - BOTTOM)

    def draw(self):
        for power in range(self.low, self.high + 1):
            y = self.y(10.0 ** power)
            yield LINE.format(LEFT, y, WIDTH - RIGHT, y, GREY, "")
            yield TEXT.format(LEFT - 8, y + 4, DARK, LABELS.get(10 ** power, f"1e{power} ms"),
                              ' text-anchor="end"')
        step = 5 if self.end - self.begin > 12 else 1
        for second in range(math.ceil(self.begin / step) * step, self.end + 1, step):
            x = self.x(second)
            yield LINE.format(x, TOP, x, HEIGHT - BOTTOM, GREY, "")
            yield TEXT.format(x, HEIGHT - BOTTOM + 18, DARK, second, CENTRED)
        yield TEXT.format((LEFT + WIDTH - RIGHT) / 2, HEIGHT - 10, DARK,
                          "seconds since the migration's start", CENTRED)
        middle = (TOP + HEIGHT - BOTTOM) / 2
        yield TEXT.format(16, middle, DARK, "a write's latency",
                          f'{CENTRED} transform="rotate(-90 16 {middle:.1f})"')


def curve(axes, points, colour, width, more=""):
    return CURVE.format(" ".join(f"{axes.x(t):.1f},{axes.y(ms):.1f}" for t, ms in points), colour,
                        width, more)


def draw(title, series):
    """series: {name: (windows, when it was committed or None)}; a window is (seconds, answers, p99
    in ms, longest latency in ms)."""
    series = {name: ([w for w in windows if w[1] > 0], committed)
              for name, (windows, committed) in series.items()}
    every = [w for windows, _ in series.values() for w in windows]
    axes = Axes([w[0] for w in every], [w[2] for w in every] + [w[3] for w in every])
    body = list(axes.draw())
    # The first lies on top.
    for i, (name, (windows, committed)) in reversed(list(enumerate(series.items()))):
        colour = COLOURS[i % len(COLOURS)]
        body.append(curve(axes, [(w[0], w[3]) for w in windows], colour, 1, FAINT))
        body.append(curve(axes, [(w[0], w[2]) for w in windows], colour, 2))
        if committed:
            x = axes.x(committed)
            body.append(LINE.format(x, TOP, x, HEIGHT - BOTTOM, colour, ' stroke-dasharray="4 3"'))
        x, said = LEFT + 255 * i, f"committed after {committed:.1f} s" if committed else \
            "never in sync"
        body.append(LINE.format(x, 38, x + 22, 38, colour, ' stroke-width="3"'))
        body.append(TEXT.format(x + 28, 42, DARK, f"{name}: {said}", ""))
    body.append(TEXT.format(
        LEFT, 64, DARK, "Thick: p99 of the writes answered in 100 ms. Thin: the longest of them. "
        "Dashed: committed, the target serves.", ""))
    return PAGE.format(width=WIDTH, height=HEIGHT, left=LEFT, title=title, body="\n".join(body))
