"""How the report looks: one style sheet, for light and dark screens, phones and paper.

The colours keep a contrast of 4.5 for text and 3 for lines and bars against the page (a test computes it), and those
of lines can be told apart by colour-blind readers; they are Okabe and Ito's, darkened or lightened to that contrast.
"""

from __future__ import annotations

from collections.abc import Mapping


def _palette(base: str, lines: str) -> Mapping[str, str]:
    words = base.split()
    return dict(zip(words[::2], words[1::2], strict=True)) | {f"c{k}": colour for k, colour in enumerate(lines.split())}


LIGHT = _palette(
    "page #ffffff panel #f4f6f8 ink #1b1f24 soft #57606a grid #d0d7de link #0050a0 warn #8a4600 warnbg #fff5e5 "
    "idle #e9ecef",
    "#0072b2 #d55e00 #008a66 #b0528a #9a6a00 #3f8fc4 #7f7f7f",
)
DARK = _palette(
    "page #14171b panel #1e2329 ink #eceff2 soft #a9b2bc grid #3a424b link #7cc0ff warn #ffc46b warnbg #33280f "
    "idle #262c33",
    "#4fa8e0 #ff8a3d #2fc79a #e394c2 #e6b43c #9fcdf5 #a8a8a8",
)

KINDS: Mapping[str, tuple[str, str, str]] = {
    "answered": ("c2", "", "answered"),
    "refused": ("c1", "✗", "refused"),
    "spent": ("c3", "ε", "refused, its privacy budget is spent"),
    "missing": ("c3", "?", "no reply before the deadline"),
    "late": ("c4", "l", "late, after the simulated deadline"),
    "dropped": ("c4", "d", "dropped out"),
    "offline": ("c6", "–", "offline, could not be asked"),
    "idle": ("idle", "", "not asked"),
}
"""What can become of a client in a round: colour, mark, words; the worst first but for the first."""


def _variables(colours: Mapping[str, str]) -> str:
    return "".join(f"--{name}:{value};" for name, value in colours.items())


def style_sheet() -> str:
    """All of it."""
    lines = "".join(f".s-c{k}{{stroke:var(--c{k})}}.f-c{k}{{fill:var(--c{k})}}" for k in range(7))
    kinds = "".join(
        f".cell.k-{kind}{{fill:var(--{colour})}}i.k-{kind}{{background:var(--{colour})}}"
        for kind, (colour, *_) in KINDS.items()
    )
    return (
        f":root{{color-scheme:light dark;{_variables(LIGHT)}}}"
        f"@media screen and (prefers-color-scheme:dark){{:root{{{_variables(DARK)}}}}}{_RULES}{lines}{kinds}"
    )


_RULES = """
*{box-sizing:border-box}
html{-webkit-text-size-adjust:100%}
body{margin:0;background:var(--page);color:var(--ink);font:16px/1.5 system-ui,-apple-system,"Segoe UI",Roboto,
"DejaVu Sans",sans-serif;overflow-wrap:anywhere}
header,main,footer{max-width:56rem;margin:0 auto;padding:0 1rem}
h1{font-size:1.7rem;line-height:1.2;margin:1.5rem 0 .3rem}
h2{font-size:1.25rem;margin:2.4rem 0 .4rem;padding-top:.6rem;border-top:1px solid var(--grid)}
h3{font-size:1rem;margin:1.4rem 0 .2rem}
p{margin:.4rem 0;max-width:46rem}
a{color:var(--link)}
.soft,footer,caption,figcaption{color:var(--soft)}
.tiles{display:grid;grid-template-columns:repeat(auto-fit,minmax(9.5rem,1fr));gap:.6rem;margin:1rem 0;padding:0}
.tiles div{background:var(--panel);border-radius:.5rem;padding:.6rem .8rem}
.tiles dt{font-size:.85rem;color:var(--soft)}
.tiles dd{margin:0;font-size:1.35rem;font-weight:650;line-height:1.3}
.tiles dd small{display:block;font-size:.8rem;font-weight:400;color:var(--soft)}
nav ul{display:flex;flex-wrap:wrap;gap:.2rem 1rem;list-style:none;padding:0;margin:.6rem 0;font-size:.92rem}
.warnings{background:var(--warnbg);border-left:4px solid var(--warn);border-radius:.3rem;padding:.3rem 1rem .5rem}
.warnings h2{border:0;padding:0;margin:.5rem 0 .2rem;font-size:1.05rem;color:var(--warn)}
.warnings ul{margin:.2rem 0;padding-left:1.2rem}
figure{margin:.8rem 0 1.2rem}
figcaption{font-size:.88rem;margin-top:.3rem;max-width:46rem}
svg{display:block;max-width:100%;height:auto;overflow:visible}
.narrow{display:none}
svg text{font:12px system-ui,-apple-system,"Segoe UI",Roboto,"DejaVu Sans",sans-serif;fill:var(--ink)}
svg text.soft{fill:var(--soft)}svg text.strong{font-weight:700}
svg text.mark{font-size:11px;font-weight:700;fill:var(--page)}svg text.mark.k-idle{fill:var(--ink)}
.grid{stroke:var(--grid);stroke-width:1;fill:none}.grid.zero{stroke:var(--soft)}
.line,.dots,.lead{fill:none;stroke-linejoin:round;stroke-linecap:round}
.line{stroke-width:1.8}.line.s-ink{stroke-width:3}.dots{stroke-width:5}.dots.s-ink{stroke-width:7}.lead{stroke-width:1;opacity:.7}
.s-ink{stroke:var(--ink)}.f-ink{fill:var(--ink)}.band{opacity:.14;stroke:none}
.legend{display:flex;flex-wrap:wrap;gap:.2rem 1.1rem;list-style:none;padding:0;margin:.4rem 0;font-size:.9rem}
.legend i{display:inline-block;width:1rem;height:1rem;line-height:1rem;text-align:center;border-radius:.15rem;
margin-right:.35rem;vertical-align:-.12rem;font-style:normal;font-weight:700;font-size:.7rem;color:var(--page)}
.legend i.wash{background:var(--ink);opacity:.28}
.scroll{overflow-x:auto;max-width:100%}
table{border-collapse:collapse;min-width:min(100%,26rem);font-size:.9rem;margin:.5rem 0;
font-variant-numeric:tabular-nums}
caption{text-align:left;padding-bottom:.3rem}
th,td{padding:.2rem .9rem .2rem 0;text-align:right;vertical-align:top;font-weight:400;overflow-wrap:normal}
th:first-child{text-align:left}
td{white-space:nowrap}.words td{white-space:normal}
thead th{color:var(--soft);border-bottom:1px solid var(--grid)}
tbody tr.main>*{font-weight:700}
.words td,.words th{text-align:left}
details{margin:.5rem 0}
summary{cursor:pointer;color:var(--link)}
.sample{background:var(--panel);border-radius:.5rem;padding:.5rem .9rem;margin:.7rem 0}
.sample dt{font-size:.82rem;color:var(--soft);margin-top:.4rem}
.sample dd{margin:0;white-space:pre-wrap}
code,pre{font-family:ui-monospace,SFMono-Regular,Menlo,Consolas,"DejaVu Sans Mono",monospace;font-size:.9em}
footer{margin:3rem auto 2rem;font-size:.85rem}
@media screen and (max-width:40rem){.wide{display:none}.narrow{display:block}
.narrow svg{width:100%;max-width:30rem}h1{font-size:1.4rem}table{font-size:.85rem}}
@media print{body{font-size:11pt}table{font-size:8.5pt}nav,summary{display:none}header,main,footer{max-width:none}
details::details-content{content-visibility:visible;display:block;block-size:auto}
figure,.sample,.tiles div,tr{break-inside:avoid}h2,h3{break-after:avoid}a{color:inherit;text-decoration:none}
.tiles div,.warnings,.sample{border:1px solid var(--grid)}.scroll{overflow:visible}
*{print-color-adjust:exact;-webkit-print-color-adjust:exact}}
"""
