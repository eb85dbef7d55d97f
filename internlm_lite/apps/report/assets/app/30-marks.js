// Vertical marks on charts: restarts, checkpoints, alerts, skipped steps; stages as bands behind the curves.

const SYMBOLS = { milestone: "◆", snapshot: "●", final: "■", best: "★", failed: "✕", restart: "↻", stage: "▸", alert: "▲" };

// [{x, kind, colour, text}] of the shown runs, in the unit of the x axis.
function currentMarks() {
  return shownRuns()
    .flatMap((run) => [
      ...(state.marks.includes("restart")
        ? run.restarts.map((item) => mark(run, item.step, "restart", "--muted", t("restart")))
        : []),
      ...(state.marks.includes("checkpoint") ? run.checkpoints.map((item) => checkpointMark(run, item)) : []),
      ...(state.marks.includes("alert")
        ? run.alerts.map((item) => mark(run, item.step, "alert", "--warn", `${item.rule}: ${item.text}`))
        : []),
      ...(commonStages() ? [] : stageMarks(run)),
    ])
    .filter((item) => item !== null);
}

function stagesOf(run) {
  return state.marks.includes("stage") ? (run.stages ?? []) : [];
}

function anyStages() {
  return payload.runs.some((run) => run.stages?.length);
}

// A run whose stages are those of all shown runs that have some: bands of different runs would hide each other.
function commonStages() {
  const runs = shownRuns().filter((run) => stagesOf(run).length);
  const borders = (run) => JSON.stringify(run.stages.map((item) => [item.stage, item.from]));
  return runs.length && runs.every((run) => borders(run) === borders(runs[0])) ? runs[0] : null;
}

function stageMarks(run) {
  const text = (item) => runName(t("stage_number", item.stage), run);
  return stagesOf(run)
    .slice(1)
    .map((item) => markAt(xOfAnyStep(run, item.from), "stage", "--muted", text(item)));
}

// [{from, to, text}] in the unit of the x axis.
function currentBands() {
  const run = commonStages();
  const found = run ? run.stages.map((item) => ({ x: xOfAnyStep(run, item.from), number: item.stage })) : [];
  const known = found.filter((item) => item.x !== null);
  return known.map((item, index) => ({
    from: item.x,
    to: known[index + 1]?.x ?? Infinity,
    text: t("stage_number", item.number),
  }));
}

function paintBands(plot, small) {
  const { ctx, bbox } = plot;
  const ratio = devicePixelRatio;
  const place = (x) => Math.min(bbox.left + bbox.width, Math.max(bbox.left, plot.valToPos(x, "x", true)));
  ctx.save();
  ctx.fillStyle = cssColour("--muted");
  ctx.font = `${11 * ratio}px system-ui, sans-serif`;
  ctx.textAlign = "left";
  for (const [index, band] of currentBands().entries()) {
    const left = place(band.from);
    const width = place(Math.min(band.to, plot.scales.x.max)) - left;
    if (width <= 0) continue;
    ctx.globalAlpha = index % 2 ? 0.14 : 0.04;
    ctx.fillRect(left, bbox.top, width, bbox.height);
    ctx.globalAlpha = 1;
    const room = width - 8 * ratio;
    if (!small && ctx.measureText(band.text).width < room)
      ctx.fillText(band.text, left + 4 * ratio, bbox.top + 24 * ratio);
  }
  ctx.restore();
}

function mark(run, step, kind, colour, text) {
  return markAt(isNumber(step) ? xOfStep(run, step) : null, kind, colour, text);
}

function markAt(x, kind, colour, text) {
  return x === null ? null : { x, kind, colour, text };
}

function checkpointMark(run, item) {
  if (item.failed) return mark(run, item.step, "failed", "--bad", `${t("failed")}: ${item.failed}`);
  return mark(run, item.step, item.kind, "--good", `${t("checkpoint")} ${item.name}`);
}

// What the marks at a place of a chart say; near enough is five pixels.
function markTexts(chart, x) {
  const at = chart.plot.valToPos(x, "x");
  const near = (chart.content.marks ?? []).filter(
    (item) => item.text && Math.abs(chart.plot.valToPos(item.x, "x") - at) <= 5,
  );
  return [...new Set(near.map((item) => `${SYMBOLS[item.kind] ?? "×"} ${item.text}`))];
}

// Draws them onto a uPlot. Checkpoints come often: the symbol alone, on the bottom. The rest: a line, symbol on top.
function paintMarks(plot, marks) {
  const { ctx, bbox } = plot;
  const ratio = devicePixelRatio;
  ctx.save();
  ctx.beginPath();
  ctx.rect(bbox.left - 6 * ratio, bbox.top, bbox.width + 12 * ratio, bbox.height);
  ctx.clip();
  ctx.font = `${11 * ratio}px system-ui, sans-serif`;
  ctx.textAlign = "center";
  for (const item of marks) {
    if (item.x < plot.scales.x.min || item.x > plot.scales.x.max) continue;
    const x = plot.valToPos(item.x, "x", true);
    ctx.fillStyle = ctx.strokeStyle = cssColour(item.colour);
    const low = ["milestone", "snapshot", "final", "best", "skipped"].includes(item.kind);
    if (!low) paintLine(ctx, x, bbox, ratio);
    ctx.fillText(SYMBOLS[item.kind] ?? "×", x, low ? bbox.top + bbox.height - 4 * ratio : bbox.top + 11 * ratio);
  }
  ctx.restore();
}

function paintLine(ctx, x, bbox, ratio) {
  ctx.globalAlpha = 0.6;
  ctx.lineWidth = ratio;
  ctx.setLineDash([3 * ratio, 3 * ratio]);
  ctx.beginPath();
  ctx.moveTo(x, bbox.top + 14 * ratio);
  ctx.lineTo(x, bbox.top + bbox.height);
  ctx.stroke();
  ctx.globalAlpha = 1;
  ctx.setLineDash([]);
}
