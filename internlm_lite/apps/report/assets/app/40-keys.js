// Charts by keyboard: arrows move the cursor, and a live region reads what it points at.

function chartKey(chart, event) {
  if (!chart.plot || event.altKey || event.metaKey) return;
  const move = cursorMove(chart, event.key, event.shiftKey ? 10 : 1);
  if (move !== null) {
    chart.point(move);
    announce(reading(chart, move));
  } else if (event.key === "+" || event.key === "=") zoomAround(chart, 0.5);
  else if (event.key === "-") zoomAround(chart, 2);
  else if (event.key === "0") choose({ zoom: [] });
  else return;
  event.preventDefault();
}

// The index that a key leads to, among the points in view; null for another key.
function cursorMove(chart, key, stride) {
  const { data, scales, cursor } = chart.plot;
  const first = data[0].findIndex((x) => x >= scales.x.min);
  const last = data[0].findLastIndex((x) => x <= scales.x.max);
  const now = cursor.idx ?? null;
  const inView = (index) => Math.min(last, Math.max(first, index));
  switch (key) {
    case "ArrowLeft":
      return inView(now === null ? last : now - stride);
    case "ArrowRight":
      return inView(now === null ? first : now + stride);
    case "PageUp":
      return inView((now ?? last) - 20);
    case "PageDown":
      return inView((now ?? first) + 20);
    case "Home":
      return first;
    case "End":
      return last;
    default:
      return null;
  }
}

function reading(chart, index) {
  const values = chart.lines.map((line) => `${line.name} ${(line.format ?? tick)(chart.valueOf(line, index)) || NONE}`);
  const x = chart.plot.data[0][index];
  return [`${t(`x_${state.x}`)} ${xLabel(x)}: ${values.join(", ")}`, ...markTexts(chart, x)].join("; ");
}

function zoomAround(chart, factor) {
  const { min, max } = chart.plot.scales.x;
  const index = chart.plot.cursor.idx ?? null;
  const middle = index === null ? (min + max) / 2 : chart.plot.data[0][index];
  const half = ((max - min) * factor) / 2;
  const saved = state.zoom;
  state.zoom = []; // xRange() then gives the whole
  const whole = xRange();
  state.zoom = saved;
  const [low, high] = [Math.max(whole[0], middle - half), Math.min(whole[1], middle + half)];
  if (low <= whole[0] && high >= whole[1]) choose({ zoom: [] });
  else zoomOn(low, high);
}

// Escape anywhere shows all folders again.
function pageKey(event) {
  if (event.key === "Escape" && state.only.length) choose({ only: [] });
}
