import re
import shutil
import subprocess

import pytest

from sparsekern.lab.report.html_style import SCRIPT, STYLE
from tests.lab.report.test_html import PAGE, Checker, render


def test_every_rule_is_about_something_in_the_page():
    checker = Checker()
    checker.feed(render(PAGE).replace("<section", '<section class="missing"'))
    named = set(re.findall(r"\.([a-z]+)", re.sub(r"\{.*?\}", "", STYLE, flags=re.DOTALL)))
    assert named - checker.classes == set()


def test_braces_are_balanced():
    assert STYLE.count("{") == STYLE.count("}") and SCRIPT.count("{") == SCRIPT.count("}")


PLAYED = """
const events = {}, ticks = [];
const element = (more) => ({addEventListener: (name, f) => { events[name] = f; }, ...more});
const frames = [0, 1, 2].map(i => ({dataset: {src: "image" + i}, textContent: "caption " + i}));
const image = element({}), slider = element({value: "2"}), button = element({}), caption = element({});
const parts = {img: image, input: slider, button, ".caption": caption};
const player = {hidden: true, querySelector: name => parts[name]};
const film = {querySelectorAll: () => frames, querySelector: () => player};
const document = {querySelectorAll: () => [film]};
const setInterval = f => { ticks.push(f); return ticks.length; }, clearInterval = () => {};
SCRIPT
const seen = [[player.hidden, image.src, caption.textContent]];
slider.value = "1"; events.input(); seen.push([image.src, caption.textContent]);
slider.value = "2"; events.click(); seen.push(image.src);
for (let i = 0; i < 3; i++) { ticks.at(-1)(); seen.push(image.src); }
console.log(JSON.stringify(seen));
"""


@pytest.mark.skipif(shutil.which("node") is None, reason="no node to run the script with")
def test_the_slider_and_the_button_move_the_film():
    done = subprocess.run(["node", "-e", PLAYED.replace("SCRIPT", SCRIPT)], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == (
        '[[false,"image2","caption 2"],["image1","caption 1"],"image0","image1","image2","image2"]'
    )
