// Vertical marks on charts: restarts, checkpoints, alerts, skipped steps.

const SYMBOLS = { milestone: "◆", snapshot: "●", final: "■", best: "★", failed: "✕", restart: "↻", alert: "▲" };

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
    ])
    .filter((item) => item !== null);
}

function mark(run, step, kind, colour, text) {
  const x = isNumber(step) ? xOfStep(run, step) : null;
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
