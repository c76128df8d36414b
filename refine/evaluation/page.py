"""The HTML of the report, for str.format: colours for light and dark, one column on a phone, a few lines of script."""

PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<meta http-equiv="Content-Security-Policy"
 content="default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'unsafe-inline'">
<title>{title}</title>
<style>
:root {{ --text: #1f2328; --muted: #57606a; --page: #ffffff; --soft: #f6f8fa; --rule: #d1d9e0; --good: #1a7f37;
 --bad: #b42318; --even: #57606a; --before: #9a6700; --after: #0969da; --teacher: #8250df; --real: #1a7f37; }}
@media (prefers-color-scheme: dark) {{ :root {{ --text: #e6edf3; --muted: #9198a1; --page: #0d1117; --soft: #161b22;
 --rule: #30363d; --good: #3fb950; --bad: #ff7b72; --even: #9198a1; --before: #d29922; --after: #58a6ff;
 --teacher: #bc8cff; --real: #3fb950; }} }}
body {{ font: 16px/1.5 system-ui, sans-serif; color: var(--text); background: var(--page); max-width: 1080px;
 margin: 2rem auto; padding: 0 1rem; }}
h1 {{ font-size: 1.4rem; overflow-wrap: anywhere; }}
h2 {{ font-size: 1.1rem; margin-top: 2rem; }}
p, figcaption, .verdict {{ overflow-wrap: anywhere; }}
.verdict {{ border-left: 6px solid var(--mood); padding: .4rem 1rem; background: var(--soft); }}
.verdict strong {{ color: var(--mood); font-size: 1.2rem; }}
.good {{ --mood: var(--good); }} .bad {{ --mood: var(--bad); }} .even {{ --mood: var(--even); }}
.note {{ color: var(--muted); font-size: .9rem; }}
figure {{ margin: 0; }}
figcaption {{ font-size: .9rem; margin-bottom: .3rem; }}
img {{ max-width: 100%; height: auto; display: block; }}
.pixels img {{ image-rendering: pixelated; }}
.pictures {{ display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 400px), 1fr)); gap: 1.5rem; }}
.pictures img {{ width: 100%; }}
.rows {{ display: grid; gap: 1rem; align-content: start; }}
.blend {{ position: relative; overflow: hidden; }}
.blend img.after {{ position: absolute; inset: 0; clip-path: inset(0 0 0 var(--cut, 50%)); }}
.blend::after {{ content: ""; position: absolute; top: 0; bottom: 0; left: var(--cut, 50%); width: 2px;
 margin-left: -1px; background: #ff5c8a; }}
.controls {{ display: flex; flex-wrap: wrap; gap: .5rem; align-items: center; margin: .5rem 0; }}
.controls input {{ flex: 1 1 100%; width: 100%; margin: 0; accent-color: var(--after); }}
button {{ font: inherit; font-size: .9rem; color: inherit; background: var(--soft); border: 1px solid var(--rule);
 border-radius: 6px; padding: .25rem .8rem; cursor: pointer; }}
button[aria-pressed=true] {{ border-color: var(--after); color: var(--after); }}
.captions {{ display: flex; flex-direction: column; font-size: .9rem; overflow-wrap: anywhere; }}
.captions span, .legend span {{ display: block; }}
.captions span::before, .legend span::before {{ content: "●"; margin-right: .4rem; color: var(--own); }}
.legend span {{ display: inline-block; margin-right: 1rem; }}
.before {{ --own: var(--before); }} .after {{ --own: var(--after); }} .teacher {{ --own: var(--teacher); }}
.real {{ --own: var(--real); }} .difference {{ --own: var(--text); }}
.line0 {{ --own: var(--after); }} .line1 {{ --own: var(--teacher); }} .line2 {{ --own: var(--real); }}
.line3 {{ --own: var(--before); }}
.plots {{ display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 310px), 1fr)); gap: 1.2rem 2rem; }}
.plots figcaption {{ color: var(--muted); }} .plots b {{ color: var(--text); }}
svg {{ width: 100%; max-width: 430px; height: auto; display: block; }}
svg text {{ font: 11px system-ui, sans-serif; fill: var(--muted); }}
svg g line, svg polyline {{ stroke: var(--own); stroke-width: 2; fill: none; }}
svg g circle, svg rect {{ fill: var(--own); }}
svg .value {{ fill-opacity: .45; }} svg .band {{ fill: var(--own); fill-opacity: .18; }}
svg line.axis, svg line.zero {{ stroke: var(--muted); stroke-width: 1; }}
svg line.grid {{ stroke: var(--rule); stroke-width: 1; }} svg line.mark {{ stroke: var(--text); stroke-width: 1; }}
svg line.level, svg g line.level {{ stroke: var(--own, var(--muted)); stroke-width: 1; stroke-dasharray: 2 3; }}
.strips {{ display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 400px), 1fr)); gap: 1rem 1.5rem; }}
.strips img {{ width: 100%; }}
.scroll {{ overflow-x: auto; }}
table {{ border-collapse: collapse; font-size: .9rem; }}
th, td {{ text-align: left; padding: .3rem .8rem .3rem 0; border-bottom: 1px solid var(--rule); vertical-align: top; }}
td.number {{ font-variant-numeric: tabular-nums; white-space: nowrap; }}
.facts td {{ overflow-wrap: anywhere; }}
.metrics small {{ display: block; color: var(--muted); font-weight: normal; max-width: 17rem; }}
.option {{ white-space: nowrap; }}
pre.command {{ background: var(--soft); padding: .6rem 1rem; white-space: pre-wrap; overflow-wrap: anywhere; }}
@media (max-width: 720px) {{
 body {{ margin-top: 1rem; }}
 th, td {{ padding-right: .4rem; }}
 .metrics, .metrics tbody, .metrics tr, .facts, .facts tbody, .facts tr, .facts th, .facts td {{ display: block; }}
 .metrics tr:first-child {{ display: none; }}
 .metrics tr {{ border-bottom: 1px solid var(--rule); padding: .4rem 0; }}
 .metrics th, .metrics td {{ display: flex; justify-content: space-between; border: 0; padding: .1rem 0; gap: 1rem; }}
 .metrics small {{ text-align: right; }}
 .metrics td[data-label]::before {{ content: attr(data-label); color: var(--muted); }}
 .facts th {{ border: 0; padding-bottom: 0; }}
}}
</style>
</head>
<body>
<h1>{title}</h1>
<div class="verdict {mood}"><strong>{verdict}</strong><br>{summary}</div>
{notes}
<h2>The same latents before and after</h2>
<div class="pictures {pixels}">
<div>
<div class="blend">{before}{after}</div>
<div class="controls">
<input type="range" min="0" max="100" value="50" aria-label="before on the left, after on the right">
<button data-cut="100">before</button><button data-cut="0">after</button><button data-blink>blink</button></div>
<div class="captions">{captions}</div>
</div>
<div class="rows">{rows}</div>
</div>
<h2>Numbers</h2>
<div class="scroll"><table class="metrics">
<tr><th></th>{head}</tr>
{metrics}
</table></div>
<p class="note">Mean ± standard deviation over the seed ranges. {intervals} {space}</p>
<div class="plots">
{plots}
</div>
<p class="note">Large dots are means, bars one standard deviation over the seed ranges, small dots the single ranges.
The change is the difference of after and before with its 95 % interval.</p>
{curve}
{tables}
<div class="{pixels}">{panels}</div>
{run}
<h2>What was measured</h2>
<table class="facts">
{facts}
</table>
<script>
for (const box of document.querySelectorAll(".pictures")) {{
  const blend = box.querySelector(".blend"), range = box.querySelector("input");
  const blink = box.querySelector("[data-blink]");
  let timer = 0;
  const cut = value => {{ range.value = value; blend.style.setProperty("--cut", value + "%"); }};
  const stop = () => {{ clearInterval(timer); timer = 0; blink.setAttribute("aria-pressed", "false"); }};
  range.addEventListener("input", () => {{ stop(); cut(range.value); }});
  for (const button of box.querySelectorAll("[data-cut]"))
    button.addEventListener("click", () => {{ stop(); cut(button.dataset.cut); }});
  blink.addEventListener("click", () => {{
    if (timer) return stop();
    blink.setAttribute("aria-pressed", "true");
    cut(0);
    timer = setInterval(() => cut(range.value > 50 ? 0 : 100), 600);
  }});
}}
</script>
</body>
</html>
"""
