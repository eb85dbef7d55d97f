// The folders: one chart with all of them, its legend, and a small chart of each.

let overlay = null;
const multiples = new Map(); // folder name -> its chart, made when it first comes into view

const FORMATS = {
  loss: (v) => fixed(v, 4),
  acc: (v) => percent(v, 2),
  ppl: perplexityText,
  share: (v) => percent(v, 1),
};
const IN_TABLE = { loss: "loss", acc: "acc", ppl: "perplexity", share: "share" };
const TICKS = { loss: tick, acc: percentTick, ppl: tick, share: percentTick };

// The short name of what the folder charts show.
function metricName(tab = state.tab) {
  return t({ loss: "loss", acc: "acc", ppl: "ppl", share: "share" }[tab]);
}

function isLog(tab = state.tab) {
  return state.y === "log" && (tab === "loss" || tab === "ppl");
}

function folderLines(names, tab = state.tab) {
  return names
    .flatMap((name) =>
      shownRuns().map((run) => {
        const series = seriesOf(run);
        const values = folderValues(series, name, tab);
        return (
          values && {
            key: `${name}\n${run.id}`,
            name: manyRuns() ? `${name} · ${shortName(run)}` : name,
            x: xOf(run),
            values,
            folder: name,
            colour: folderColour(name),
            dash: lineDash(name, run),
            format: FORMATS[tab],
          }
        );
      }),
    )
    .filter(Boolean);
}

function drawFolders() {
  fill(byId("metric"), `${state.tab} ${language()}`, () =>
    choices(
      "tab",
      Object.keys(FORMATS).map((tab) => [tab, metricName(tab)]),
      state.tab,
      (tab) => choose({ tab }),
    ),
  );
  fill(byId("multiples-scale"), `${state.scale} ${language()}`, () =>
    choices(
      "scale",
      ["common", "own"].map((value) => [value, t(`scale_${value}`)]),
      state.scale,
      (scale) => choose({ scale }),
    ),
  );
  drawLegend();
  overlay ??= new Chart(byId("overlay"), {
    height: 380,
    legend: false,
    oncursor: legendValues,
    onclick: (line, event) => isolate(line.folder, event),
  });
  overlay.show({
    title: metricName(),
    lines: folderLines(shownFolders()),
    log: isLog(),
    marks: currentMarks(),
    format: TICKS[state.tab],
  });
  drawMultiples();
}

function drawLegend() {
  const names = folderNames();
  const key = JSON.stringify([names, state.only, state.runs, dark(), language(), payload.runs.length]);
  fill(byId("legend"), key, () => [
    ...names.map((name) => folderButton(name, "legend", null, make("span", { class: "value" }))),
    names.length > 1 ? make("p", { class: "hint" }, t("hint_isolate")) : "",
  ]);
}

// A button with the folder's line and name that shows it alone. Used by the legend, the small charts and the table,
// whose rows are of one run each.
function folderButton(name, where, run = null, ...more) {
  const button = make(
    "button",
    {
      type: "button",
      class: "folder",
      title: name,
      "aria-pressed": String(state.only.includes(name)),
      "data-focus": `${where}:${name}`,
      onclick: (event) => isolate(name, event),
      onkeydown: (event) => {
        // ctrl or shift with Enter adds, as a click does; browsers give the click no modifiers
        if (event.key !== "Enter" || !(event.ctrlKey || event.shiftKey)) return;
        event.preventDefault();
        isolate(name, event);
      },
    },
    swatch(folderColour(name), lineDash(name, run)),
    make("span", { class: "text" }, name),
    ...more,
  );
  if (state.only.length && !state.only.includes(name)) button.classList.add("other");
  return button;
}

// The values at the overlay's cursor in the legend, or those of the table.
function legendValues(read, index) {
  const format = FORMATS[state.tab];
  for (const button of byId("legend").querySelectorAll("button")) {
    const name = button.title;
    const values = shownRuns()
      .map((run) => [run, index === null ? tableValue(run, name) : read(`${name}\n${run.id}`)])
      .filter(([, value]) => isNumber(value));
    button.classList.toggle("near", overlay.near?.folder === name);
    button.lastChild.replaceChildren(
      ...values.map(([run, value]) =>
        make("span", {}, ...(manyRuns() ? [`${shortName(run)} `, make("b", {}, format(value))] : [format(value)])),
      ),
    );
  }
}

function tableValue(run, name) {
  return run.folders.find((folder) => folder.name === name)?.[IN_TABLE[state.tab]];
}

function drawMultiples() {
  const host = byId("multiples");
  const [seen, unseen] = [folderNames().filter(hasTokens), folderNames().filter((name) => !hasTokens(name))];
  fill(host, JSON.stringify([seen, language()]), () => {
    for (const chart of multiples.values()) dropChart(chart);
    multiples.clear();
    return seen.map(multipleCard);
  });
  byId("unseen").textContent = unseen.length ? t("no_tokens", unseen.join(", ")) : "";
  for (const card of host.children) {
    card.classList.toggle("other", state.only.length > 0 && !state.only.includes(card.dataset.name));
    fill(card.firstChild, JSON.stringify([state.only, dark(), payload.runs.length]), () =>
      folderButton(card.dataset.name, "small"),
    );
  }
  for (const name of multiples.keys()) drawMultiple(name);
}

function hasTokens(name) {
  return shownRuns().some((run) => run.folders.some((folder) => folder.name === name && folder.tokens > 0));
}

function multipleCard(name) {
  const card = make("figure", { class: "multiple", "data-name": name }, make("div", {}));
  inView.observe(card);
  return card;
}

// 33 charts cost time; those below the screen are made when the reader gets there.
const inView = new IntersectionObserver(
  (entries) => {
    for (const { isIntersecting, target } of entries) if (isIntersecting) makeMultiple(target);
  },
  { rootMargin: "200px" },
);

function makeMultiple(card) {
  inView.unobserve(card);
  multiples.set(card.dataset.name, new Chart(card, { height: 118, small: true }));
  drawMultiple(card.dataset.name);
}

function drawMultiple(name) {
  const lines = folderLines([name]).map((line) => ({ ...line, dash: manyRuns() ? line.dash : [] }));
  const title = `${name}, ${metricName()}`;
  const range = state.scale === "common" ? () => commonRange() : null;
  multiples
    .get(name)
    .show({ title, lines: [...lines, ...validationLines(name)], log: isLog(), range, format: TICKS[state.tab] });
}

// The smallest and largest value of all folders in view, once for all small charts of a drawing.
let common = { key: "", range: [0, 1] };

function commonRange() {
  const key = JSON.stringify([version, detailVersion, state.tab, state.zoom, state.x, state.runs, isLog()]);
  if (common.key !== key)
    common = {
      key,
      range: paddedRange(folderNames().flatMap((name) => [...folderLines([name]), ...validationLines(name)])),
    };
  return common.range;
}

function paddedRange(lines) {
  const [from, to] = xRange();
  let [low, high] = [Infinity, -Infinity];
  for (const { x, values } of lines) {
    for (let index = 0; index < x.length; index += 1) {
      const value = values[index];
      if (x[index] < from || x[index] > to || !isNumber(value) || (isLog() && value <= 0)) continue;
      low = Math.min(low, value);
      high = Math.max(high, value);
    }
  }
  if (low > high) return [0, 1];
  return padded(low, high, isLog());
}

function dropChart(chart) {
  chart.plot?.destroy();
  charts.delete(chart);
}
