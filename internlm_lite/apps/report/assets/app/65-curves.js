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
  { section: "optimizer", title: "chart_lr", keys: [["lr", "chart_lr"]], exact: true, planned: [["lr", "line_planned"]] },
  {
    section: "optimizer",
    title: "chart_batch",
    keys: [["batch_tokens", "chart_batch"]],
    exact: true,
    planned: [["batch_tokens", "line_planned"]],
    format: compact,
  },
  {
    section: "optimizer",
    title: "chart_beta",
    keys: [
      ["adam_beta2", "beta2"],
      ["momentum", "line_momentum"],
    ],
    exact: true,
    planned: [
      ["beta2", "line_planned_beta2"],
      ["momentum", "line_planned_momentum"],
    ],
  },
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
  drawTasks();
  drawStages();
  for (const spec of CURVES) {
    const planned = plannedLines(spec);
    curve(spec.section, spec.title, { height: 190, hides: true }).show({
      title: t(spec.title),
      lines: [...planned, ...keyLines(spec)],
      format: spec.ticks ?? tick,
      single: spec.keys.length === 1 && !planned.length,
      xRange: planned.length ? () => plannedRange(planned) : null,
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

// The schedule over the whole run, behind what has happened, so that what is to come shows too.
function plannedLines(spec) {
  return (spec.planned ?? []).flatMap(([key, name], index) =>
    shownRuns()
      .filter((run) => planX(run) && hasNumber(own(run.schedule, key)))
      .map((run) => ({
        key: `planned ${key} ${run.id}`,
        name: runName(t(name), run),
        x: planX(run),
        values: own(run.schedule, key),
        colour: runLook(run, index).colour,
        dash: [3, 4],
        width: 1,
        format: spec.format ?? ((v) => significant(v, 5)),
      })),
  );
}

function plannedRange(lines) {
  const [low, high] = xRange();
  if (state.zoom.length) return [low, high];
  return [Math.min(low, ...lines.map((line) => line.x[0])), Math.max(high, ...lines.map((line) => line.x.at(-1)))];
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
  curve("training", "chart_bits", { height: 190, hides: true }).show({
    title: t("chart_bits"),
    marks: currentMarks(),
    unsmoothed: true,
    lines: runs.flatMap((run) => [
      evaluated(run, "line_val", 1, (item) => item.bits_per_byte),
      evaluated(run, "line_ema", 3, (item) => item.ema?.bits_per_byte, [2, 2]),
    ]),
  });
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

// A figure of the evaluations of a run beside others of theirs: over one run each has its colour.
function evaluated(run, name, place, read, dash = [6, 3]) {
  const colour = manyRuns() ? runLook(run, 0).colour : plainColour(place);
  return validationLine(run, runName(t(name), run), colour, read, dash);
}

// Training and evaluations of each run in one chart; `read` makes its values of losses.
function drawTotals(title, key, format, read) {
  const total = (run, name, place, loss, dash) => {
    const line = evaluated(run, name, place, (item) => read(loss(item)), dash);
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
      total(run, "line_val", 1, (item) => item.loss),
      total(run, "line_ema", 3, (item) => item.ema?.loss, [2, 2]),
      total(run, "line_checked", 2, (item) => item.train_loss),
    ]),
  });
}

// One chart for each metric, with a line for each task.
const taskMetrics = new Set();

function drawTasks() {
  const found = shownRuns().flatMap((run) => (run.tasks ?? []).map((item) => item.tasks));
  const names = [...new Set(found.flatMap(Object.keys))];
  for (const figures of found.flatMap(Object.values)) for (const metric of Object.keys(figures)) taskMetrics.add(metric);
  for (const metric of taskMetrics) {
    curve("training", `tasks ${metric}`, { height: 190, hides: true }).show({
      title: t("chart_tasks", metric),
      marks: currentMarks(),
      unsmoothed: true,
      lines: names.flatMap((name, index) => shownRuns().map((run) => taskLine(run, name, metric, index))),
    });
  }
}

function taskLine(run, name, metric, index) {
  const placed = (run.tasks ?? []).filter((item) => xOfStep(run, item.step) !== null);
  return {
    key: `task ${name} ${run.id}`,
    name: runName(name, run),
    colour: plainColour(index % 8),
    dash: manyRuns() ? lineDash("", run) : DASHES[Math.floor(index / 8) % DASHES.length],
    points: true,
    format: (value) => significant(value, 4),
    x: placed.map((item) => xOfStep(run, item.step)),
    values: placed.map((item) => own(own(item.tasks, name), metric) ?? null),
  };
}

// What the bands stand for, in words.
function drawStages() {
  const runs = shownRuns().filter((run) => run.stages?.length);
  const cell = (text) => make("td", {}, text);
  const words = (item) =>
    [
      ...(item.planned ? [t("stage_planned")] : []),
      ...Object.entries(item.values).map(([name, value]) => `${name}: ${value}`),
    ].join(", ");
  const heads = [...(manyRuns() ? [t("run")] : []), t("stage"), t("stage_from"), t("stage_values")];
  const row = (run, item) => [
    ...(manyRuns() ? [cell(shortName(run))] : []),
    cell(integer(item.stage)),
    cell(integer(item.from)),
    cell(words(item) || NONE),
  ];
  fill(byId("stages"), contentKey(["stages"]), () =>
    runs.length
      ? [
          make("h3", {}, t("stages")),
          table(
            t("stages"),
            heads,
            runs.flatMap((run) => run.stages.map((item) => make("tr", {}, ...row(run, item)))),
            true,
          ),
        ]
      : [],
  );
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
