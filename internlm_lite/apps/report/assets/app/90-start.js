// Puts the page together, and draws it again when the data or the reader's choices change.

let drawing = false;

// Several changes before the next frame are one drawing.
function render() {
  if (drawing) return;
  drawing = true;
  requestAnimationFrame(() => {
    drawing = false;
    drawPage();
  });
}

function drawPage() {
  if (!state.zoom.length && details.size) details = new Map();
  document.documentElement.lang = language() === "zh" ? "zh-CN" : "en";
  document.documentElement.dataset.theme = dark() ? "dark" : "light";
  document.body.classList.toggle("several", manyRuns());
  drawWords();
  drawFreshness();
  drawStrip();
  drawControls();
  drawFolders();
  drawTable();
  drawCurves();
  drawCheckpoints();
  drawSamples();
  drawEvents();
  drawConfig();
  drawEnvironment();
  refine();
  document.documentElement.dataset.drawn = String(Number(document.documentElement.dataset.drawn ?? 0) + 1);
}

function drawWords() {
  for (const element of document.querySelectorAll("[data-t]")) element.textContent = t(element.dataset.t);
  for (const element of document.querySelectorAll("[data-label]"))
    element.setAttribute("aria-label", t(element.dataset.label));
  for (const element of document.querySelectorAll("section[data-title]"))
    element.setAttribute("aria-label", t(element.dataset.title));
  byId("title").textContent = payload.runs.length === 1 ? payload.runs[0].name : "internlm_lite";
  if (payload.live) document.title = [progressText(), byId("title").textContent].filter(Boolean).join(" · ");
  const themes = ["auto", "light", "dark"];
  byId("theme").textContent = t(`theme_${state.theme}`);
  byId("theme").onclick = () => choose({ theme: themes[(themes.indexOf(state.theme) + 1) % 3] });
  fill(byId("language"), language(), () => (language() === "zh" ? t("other_language") : chineseMark()));
  byId("language").setAttribute("aria-label", t("other_language"));
  byId("language").onclick = () => choose({ lang: language() === "zh" ? "en" : "zh" });
  fill(byId("sections"), language(), () =>
    [...document.querySelectorAll("section[data-title]")].map((section) =>
      make(
        "a",
        { href: `#${section.id}`, onclick: (event) => goTo(event, section) },
        t(WORDS[`short_${section.dataset.title}`] ? `short_${section.dataset.title}` : section.dataset.title),
      ),
    ),
  );
}

// The two characters of "Chinese" as strokes: many machines have no font for them.
function chineseMark() {
  const strokes = "M2 4.5h11v6h-11z M7.5 1v14 M25 1v3 M18 4.5h14 M21 4.5c1 5 5 9 10 10.5 M29 4.5c-1 5-5 9-10 10.5";
  return draw(
    "svg",
    { viewBox: "0 0 34 16", width: 34, height: 16, "aria-hidden": "true" },
    draw("path", { d: strokes, fill: "none", stroke: "currentColor", "stroke-width": 1.5 }),
  );
}

// A jump within the page leaves the hash, and so what was chosen, alone.
function goTo(event, section) {
  event.preventDefault();
  section.scrollIntoView();
  section.tabIndex = -1;
  section.focus({ preventScroll: true });
}

function readPayload() {
  const text = byId("payload")?.textContent;
  if (text) usePayload(JSON.parse(text));
}

// Paper is white: charts are drawn once more in light colours, all of them, before it is printed.
function forPrint() {
  const { theme } = state;
  state.theme = "light";
  for (const card of byId("multiples").children) if (!multiples.has(card.dataset.name)) makeMultiple(card);
  drawPage();
  addEventListener(
    "afterprint",
    () => {
      state.theme = theme;
      render();
    },
    { once: true },
  );
}

performance.mark("draw begins");
readPayload();
drawPage();
requestAnimationFrame(() => setTimeout(() => performance.mark("draw ends"))); // after the first frame
startLive();
// A jump to a section ends below the controls, which stay in view.
new ResizeObserver(([entry]) => {
  const height = getComputedStyle(entry.target).position === "sticky" ? entry.target.offsetHeight : 0;
  document.documentElement.style.scrollPaddingTop = `${height}px`;
}).observe(byId("controls"));
addEventListener("hashchange", hashChanged);
addEventListener("keydown", pageKey);
addEventListener("beforeprint", forPrint);
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", render);
