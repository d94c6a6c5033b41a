"""How the page looks, and the slider of its block maps."""

STYLE = """
:root { --ink: #22282d; --soft: #5c666e; --line: #dde1e4; --sparse: #0b6e99; --dense: #c4570c }
* { box-sizing: border-box }
body { margin: 0; background: #f3f4f5; color: var(--ink);
  font: 16px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "DejaVu Sans", sans-serif }
main { max-width: 1120px; margin: 0 auto; padding: 24px }
header { padding: 8px 4px 16px }
h1 { font-size: 1.7rem; line-height: 1.25; margin: 0 0 6px }
h2 { font-size: 1.2rem; margin: 0 0 4px }
h3 { font-size: 1rem; margin: 0 }
.status { color: var(--soft); margin: 0 }
.summary { font-size: 1.1rem; margin: 12px 0 0; max-width: 62em }
section { background: #fff; border: 1px solid var(--line); border-radius: 8px; padding: 20px 24px; margin: 0 0 18px }
.words { color: var(--soft); margin: 0 0 14px; max-width: 62em }
.missing { background: #fff8ea; border-color: #ecd9a8 }
.missing ul, .notes { margin: 6px 0 0; padding-left: 1.2em }
.notes { color: var(--soft); font-size: .86rem }
.wide { overflow-x: auto }
table { border-collapse: collapse; font-variant-numeric: tabular-nums }
th, td { text-align: left; padding: 7px 18px 7px 0; border-bottom: 1px solid var(--line); vertical-align: top }
thead th { color: var(--soft); font-weight: 600; font-size: .88rem }
tbody th { font-weight: 600 }
.results { width: 100%; font-size: 1.05rem }
.results td:nth-child(4) { font-weight: 600 }
.results thead th:nth-child(2), .key.sparse { color: var(--sparse) }
.results thead th:nth-child(3):not(:last-child), .key.dense { color: var(--dense) }
.key { font-weight: 600 }
.layers { width: 100%; font-size: .9rem }
.layers tbody th { font-family: ui-monospace, "DejaVu Sans Mono", monospace; font-weight: 600 }
.layers small { display: block; font-family: system-ui, sans-serif; font-weight: 400; color: var(--soft) }
.layers td:nth-child(n+4) { width: 19% }
.bar { position: relative; display: flex; align-items: center; gap: 6px; height: 17px; font-size: .82rem }
.bar div { flex: 1; background: #eef0f1; border-radius: 2px }
.bar i { display: block; height: 11px; min-width: 1px; border-radius: 2px; background: var(--sparse) }
.bar.dense i { background: var(--dense) }
.bar.share i { background: #8a959d }
.bar span { white-space: nowrap; width: 3.7em }
.charts { display: grid; grid-template-columns: repeat(auto-fit, minmax(310px, 1fr)); gap: 12px }
figure { margin: 0 }
.charts svg { width: 100%; height: auto; display: block }
.legend { display: flex; flex-wrap: wrap; gap: 4px 20px; margin: 0 0 14px; font-size: .9rem }
.legend i { display: inline-block; width: 13px; height: 13px; margin-right: 6px; border: 1px solid #0002;
  vertical-align: -2px; border-radius: 2px }
.film { border-top: 1px solid var(--line); padding: 14px 0 }
.about { color: var(--soft); font-size: .88rem; margin: 2px 0 10px; max-width: 62em }
.stage { display: flex; flex-wrap: wrap; gap: 28px; align-items: flex-start }
.film img { image-rendering: pixelated; display: block; border: 1px solid var(--line); max-width: 100%; height: auto }
.control { display: flex; gap: 10px; align-items: center; margin-top: 8px }
.control input { flex: 1; accent-color: var(--sparse) }
.control button { font: inherit; width: 38px; height: 30px; border: 1px solid var(--line); border-radius: 6px;
  background: #fff; cursor: pointer }
.caption { margin: 4px 0 0; font-size: .88rem; max-width: 460px; min-height: 3em }
.thumbnails { display: flex; flex-wrap: wrap; gap: 14px; flex: 1 1 300px }
.thumbnails figcaption { font-size: .78rem; color: var(--soft); max-width: 150px }
.stack { display: grid; grid-template-columns: auto 1fr auto; gap: 8px 12px; align-items: center; margin-bottom: 12px }
.stack div { display: flex }
.stack div i { display: block; height: 24px; min-width: 1px }
.stack .whole { background: var(--dense) }
pre { background: #f3f4f5; padding: 10px 14px; border-radius: 6px; font-size: .85rem;
  white-space: pre-wrap; overflow-wrap: anywhere }
.settings { display: grid; grid-template-columns: repeat(auto-fit, minmax(280px, 1fr)); gap: 24px; font-size: .88rem }
.settings th, .settings td { padding: 4px 14px 4px 0; overflow-wrap: anywhere }
.settings thead { display: none }
.settings tbody th { font-weight: 400; color: var(--soft); white-space: nowrap }
@media print { body { background: #fff } .player { display: none } section { break-inside: avoid } }
"""

SCRIPT = """
for (const film of document.querySelectorAll(".film")) {
  const frames = film.querySelectorAll(".frames li"), player = film.querySelector(".player");
  if (frames.length < 2) continue;
  const image = player.querySelector("img"), slider = player.querySelector("input");
  const button = player.querySelector("button"), caption = player.querySelector(".caption");
  let timer = null;
  const show = () => {
    const frame = frames[slider.value];
    image.src = frame.dataset.src;
    image.alt = caption.textContent = frame.textContent;
  };
  const stop = () => { clearInterval(timer); timer = null; button.textContent = "\\u25b6"; };
  slider.addEventListener("input", () => { stop(); show(); });
  button.addEventListener("click", () => {
    if (timer !== null) return stop();
    if (+slider.value === frames.length - 1) slider.value = 0;
    show();
    button.textContent = "\\u275a\\u275a";
    timer = setInterval(() => {
      if (+slider.value === frames.length - 1) return stop();
      slider.value = +slider.value + 1;
      show();
    }, 400);
  });
  player.hidden = false;
  show();
}
"""
