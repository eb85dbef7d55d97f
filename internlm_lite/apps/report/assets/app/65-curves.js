// The other charts: training and validation, speed, optimizer, memory.

const CURVES = [
  {
    section: "speed",
    title: "chart_tgs",
    keys: [
      ["tgs", "line_tgs"],
      ["tgs_sma", "line_tgs_sma"],
    ],
    format: integer,
  },
  { section: "speed", title: "chart_tflops", keys: [["tflops", "tflops"]] },
  {
    section: "speed",
    title: "chart_mfu",
    keys: [["mfu", "mfu"]],
    ticks: percentTick,
    format: (value) => percent(value),
  },
  { section: "speed", title: "chart_time", keys: [["fwd_bwd_time", "chart_time"]] },
  {
    section: "speed",
    title: "chart_fill",
    keys: [["pack_fill", "pack_fill"]],
    ticks: percentTick,
    format: (value) => percent(value),
  },
  { section: "optimizer", title: "chart_lr", keys: [["lr", "chart_lr"]], exact: true },
  { section: "optimizer", title: "chart_scale", keys: [["loss_scale", "chart_scale"]], exact: true, skipped: true },
  {
    section: "optimizer",
    title: "chart_norm",
    keys: [
      ["grad_norm/0_default", "0_default"],
      ["grad_norm/1_fp32", "1_fp32"],
    ],
    skipped: true,
  },
  { section: "memory", title: "chart_memory", keys: [["memory_bytes", "chart_memory"]], exact: true, part: 2 ** 30 },
];

const curves = new Map(); // title -> chart

function curve(section, title, options = {}) {
  if (!curves.has(title)) {
    const figure = make("figure", { class: "chart" });
    byId(section).querySelector(".charts").append(figure);
    curves.set(title, new Chart(figure, options));
  }
  return curves.get(title);
}

function drawCurves() {
  drawTraining();
  for (const spec of CURVES) {
    curve(spec.section, spec.title, { height: 190, hides: true }).show({
      title: t(spec.title),
      lines: keyLines(spec),
      format: spec.ticks ?? tick,
      single: spec.keys.length === 1,
      unsmoothed: spec.exact,
      marks: [...currentMarks(), ...(spec.skipped ? skippedMarks() : [])],
      notes: spec.skipped && skippedMarks().length ? [make("span", { class: "key bad" }, t("line_overflow"))] : [],
    });
  }
  for (const id of ["training", "speed", "optimizer", "memory"]) sayWhenEmpty(byId(id));
}

function sayWhenEmpty(section) {
  const text = section.querySelector(".empty-section");
  text.textContent = t("no_values");
  text.hidden = [...section.querySelectorAll(".chart")].some((figure) => !figure.hidden);
}

// Of several runs the first key that has numbers: a line for every key and run would be too much to read.
function keyLines(spec) {
  const keys = spec.keys.filter(([key]) => shownRuns().some((run) => hasNumber(drawnValues(run, key))));
  return (manyRuns() ? keys.slice(0, 1) : keys).flatMap(([key, name], index) =>
    shownRuns().map((run) => ({
      key: `${key} ${run.id}`,
      name: manyRuns() ? shortName(run) : t(name),
      x: xOf(run),
      values: drawnValues(run, key, spec.part),
      ...runLook(run, index),
      format: spec.format ?? ((v) => significant(v, 5)),
    })),
  );
}

// A norm that is always zero says only that no parameter is kept in that dtype.
function drawnValues(run, key, part) {
  const values = seriesOf(run)[key] ?? [];
  if (part) return values.map((value) => (isNumber(value) ? value / part : null));
  return key.startsWith("grad_norm/") && !values.some((value) => value) ? [] : values;
}

// Charts without folders have colours to spare: over several runs each has its own, besides its dash.
function runLook(run, index) {
  if (!manyRuns()) return { colour: plainColour(index), dash: [] };
  return { colour: plainColour(runNumber(run) % 8), dash: lineDash("", run) };
}

function runName(name, run) {
  return manyRuns() ? `${name} · ${shortName(run)}` : name;
}

function skippedMarks() {
  return shownRuns()
    .flatMap((run) => (run.series.skipped ?? []).map((step) => mark(run, step, "skipped", "--bad", t("skipped_step"))))
    .filter(Boolean);
}

function drawTraining() {
  const runs = shownRuns();
  drawTotals("chart_loss", "loss", FORMATS.loss, (loss) => loss);
  drawTotals("chart_ppl", "perplexity", FORMATS.ppl, perplexity);
  curve("training", "chart_val_loss", { height: 260, hides: true }).show({
    title: t("chart_val_loss"),
    log: isLog("loss"),
    marks: currentMarks(),
    unsmoothed: true,
    lines: shownFolders().flatMap((name) =>
      runs.map((run) =>
        validationLine(
          run,
          runName(name, run),
          folderColour(name),
          (item) => own(item.folders, name)?.[1],
          lineDash(name, run),
        ),
      ),
    ),
  });
}

// Training and evaluations of each run in one chart; `read` makes its values of losses.
function drawTotals(title, key, format, read) {
  const evaluated = (run, name, place, loss) => {
    const colour = manyRuns() ? runLook(run, 0).colour : plainColour(place);
    const line = validationLine(run, runName(t(name), run), colour, (item) => read(loss(item)), [6, 3]);
    return { ...line, key: `${key} ${line.key}`, format };
  };
  curve("training", title, { height: 260, hides: true }).show({
    title: t(title),
    log: isLog("loss"),
    marks: currentMarks(),
    lines: shownRuns().flatMap((run) => [
      {
        key: `${key} ${run.id}`,
        name: runName(t("line_train"), run),
        x: xOf(run),
        values: seriesOf(run)[key] ?? [],
        ...runLook(run, 0),
        format,
      },
      evaluated(run, "line_val", 1, (item) => item.loss),
      evaluated(run, "line_checked", 2, (item) => item.train_loss),
    ]),
  });
}

function validationLine(run, name, colour, read, dash = []) {
  const placed = run.validation.filter((item) => xOfStep(run, item.step) !== null);
  return {
    key: `val ${name} ${run.id}`,
    name,
    colour,
    dash,
    points: true,
    format: FORMATS.loss,
    x: placed.map((item) => xOfStep(run, item.step)),
    values: placed.map((item) => read(item) ?? null),
  };
}

// The validation points in a folder's small chart; over several runs they would hide the lines.
function validationLines(name) {
  if (manyRuns()) return [];
  const read = {
    loss: (item) => item?.[1],
    acc: (item) => item?.[2],
    ppl: (item) => perplexity(item?.[1]),
    share: () => null,
  }[state.tab];
  return shownRuns().map((run) =>
    validationLine(run, runName(t("line_val"), run), cssColour("--muted"), (item) => read(own(item.folders, name))),
  );
}
