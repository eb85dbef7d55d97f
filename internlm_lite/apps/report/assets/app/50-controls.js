// The bar of controls that all charts obey.

function drawControls() {
  const key = [
    language(),
    payload.runs.map((run) => run.name),
    dark(),
    JSON.stringify(state),
    folderNames().length,
    anyStages(),
  ].join();
  fill(byId("controls"), language(), () => [smoothingControl(), make("div", { class: "rest" })]);
  const [smoothing, rest] = byId("controls").children;
  smoothing.querySelector("input").value = state.smooth;
  smoothing.querySelector("output").textContent = state.smooth.toFixed(2);
  fill(rest, key, () => [
    group(
      "x_axis",
      choices(
        "x",
        ["step", ...(payload.runs.some((run) => run.epoch_tokens) ? ["epoch"] : []), "tokens", "time"].map((value) => [value, t(`x_${value}`)]),
        state.x,
        (x) => choose({ x }),
      ),
    ),
    group(
      "y_axis",
      choices(
        "y",
        ["linear", "log"].map((value) => [value, t(`y_${value}`)]),
        state.y,
        (y) => choose({ y }),
      ),
    ),
    group(
      "marks",
      ["restart", "checkpoint", "alert", ...(anyStages() ? ["stage"] : [])].map((kind) =>
        checkbox(`mark:${kind}`, t(`mark_${kind}`), state.marks.includes(kind), () =>
          choose({ marks: toggled(state.marks, kind) }),
        ),
      ),
    ),
    ...(manyRuns() ? [runList()] : []),
    ...resets(),
  ]);
  byId("controls").hidden = !payload.runs.length;
}

function group(label, items) {
  return make(
    "div",
    { class: `group ${label}`, role: "group", "aria-label": t(label) },
    make("span", { class: "label", "aria-hidden": "true" }, t(label)),
    make("span", { class: "choices" }, ...items),
  );
}

// Made once: a slider that is replaced while it is dragged lets go of the mouse.
function smoothingControl() {
  const input = make("input", { type: "range", min: 0, max: 0.99, step: 0.01 });
  input.addEventListener("input", () => choose({ smooth: Number(input.value) }));
  return make("label", { class: "group" }, make("span", { class: "label" }, t("smoothing")), input, make("output", {}));
}

function runList() {
  return group(
    "runs",
    payload.runs.filter((run) => !isFolded(run)).map(runCheckbox),
  );
}

function runCheckbox(run) {
  return checkbox(
    `run:${run.name}`,
    shortName(run),
    shownRuns().includes(run),
    () => toggleRun(run),
    swatch(cssColour("--ink"), lineDash("", run)),
  );
}

// The last one stays: charts of no run would say nothing.
function toggleRun(run) {
  const runs = toggled(
    shownRuns().map((shown) => shown.name),
    run.name,
  );
  choose({ runs: runs.length ? runs : [run.name] });
}

function resets() {
  const button = (key, changes) =>
    make("button", { type: "button", class: "plain", onclick: () => choose(changes) }, t(key));
  const shown = shownFolders().length;
  return [
    ...(state.zoom.length ? [button("zoom_reset", { zoom: [] })] : []),
    ...(state.only.length
      ? [
          make("span", { class: "label" }, t("only_folders", shown, folderNames().length)),
          button("show_all", { only: [] }),
        ]
      : []),
  ];
}
