// How a chart is given to uPlot: lines, scales, axes, what a drag does.

function plotOptions(chart, drawn) {
  const { small, height } = chart.options;
  return {
    width: Math.max(40, chart.host.clientWidth),
    height,
    legend: { show: false },
    padding: small ? [6, 4, 0, 0] : [8, 10, 0, 0],
    cursor: {
      sync: { key: SYNC, setSeries: false, scales: ["x", null] },
      y: false,
      drag: { x: true, y: false, setScale: false, dist: 4 },
      points: { size: 6, width: 1 },
      focus: { prox: small ? -1 : 18 },
      bind: { dblclick: () => () => choose({ zoom: [] }) },
    },
    focus: { alpha: 0.35 },
    scales: { x: { time: false, range: () => chart.content.xRange?.() ?? xRange() }, y: yScale(chart) },
    axes: [xAxis(small), yAxis(chart), ...(state.x === "epoch" && !small && epochTokens() ? [tokensAxis()] : [])],
    series: [{}, ...drawn.map((line) => lineOptions(line, small, drawn.length > 12))],
    hooks: {
      setSelect: [(plot) => zoomTo(plot)],
      setCursor: [(plot) => chart.plot && chart.caption(plot.cursor.idx ?? null)],
      setSeries: [(plot, index) => chart.comeNear(plot.series[index]?.key)],
      drawClear: [(plot) => paintBands(plot, small)],
      draw: [(plot) => paintMarks(plot, chart.content.marks ?? [])],
    },
  };
}

function lineOptions(line, small, many) {
  return {
    key: line.key,
    label: line.name,
    stroke: line.colour,
    dash: line.dash,
    width: line.width ?? (small || many ? 1.25 : 1.5),
    spanGaps: true, // a folder without tokens in some lines is still one curve
    points: line.points ? { show: true, size: small ? 4 : 6, fill: line.colour } : { size: 5, fill: line.colour },
  };
}

function yScale(chart) {
  const log = () => (chart.content.log ? 3 : 1);
  return {
    distr: log(),
    range: (plot, low, high) => {
      if (chart.content.range) return chart.content.range();
      if (low === null || high === null) return log() === 3 ? [0.1, 1] : [0, 1];
      return padded(low, high, log() === 3);
    },
  };
}

// A little room above and below; a constant gets a range of its own size, not from nothing to double.
function padded(low, high, log) {
  const constant = high - low <= 1e-6 * Math.abs(high); // but for the rounding of an average
  const room = log ? (high / low) ** 0.06 : constant ? Math.abs(high) * 0.02 || 1 : (high - low) * 0.08;
  if (log) return [low / Math.max(room, 1.01), high * Math.max(room, 1.01)];
  return [low >= 0 ? Math.max(0, low - room) : low - room, high + room];
}

// Distances of grid lines on the x axis: whole steps, parts of a pass over the data, round times.
const ROUND = Array.from({ length: 16 }, (_, power) => [1, 2, 5].map((digit) => digit * 10 ** power)).flat();
const PARTS_OF_EPOCHS = [0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, ...ROUND];
const PARTS_OF_DAYS = [1, 2, 5, 10, 20, 30, 60, 120, 300, 600, 1200, 1800, 3600, 7200, 10800, 21600, 43200];
const ROUND_TIMES = [...PARTS_OF_DAYS, ...ROUND.map((days) => 86400 * days)];

function xAxis(small) {
  const text = { step: integer, epoch: tick, tokens: tick, time: duration }[state.x];
  const label = (plot, ticks) => ticks.map((value) => (value === null ? "" : text(value)));
  return {
    ...axisColours(),
    size: small ? 20 : 26,
    space: small ? 56 : 80,
    incrs: { time: ROUND_TIMES, epoch: PARTS_OF_EPOCHS }[state.x] ?? ROUND,
    values: label,
    font: axisFont(small),
    gap: 4,
    ticks: { show: false },
  };
}

// Above a chart over passes: the tokens trained on, at the same places.
function tokensAxis() {
  const text = (value) => (value === null ? "" : compact(value * epochTokens()));
  const values = (plot, ticks) => ticks.map(text);
  return { ...xAxis(false), scale: "x", side: 0, values, grid: { show: false }, label: t("x_tokens"), labelSize: 16 };
}

function yAxis(chart) {
  const { small } = chart.options;
  const format = (value) => (chart.content.format ?? tick)(value); // what is shown may change, the plot stays
  return {
    ...axisColours(),
    size: small ? 38 : 54,
    space: small ? 28 : 36,
    gap: 4,
    font: axisFont(small),
    values: (plot, ticks) => ticks.map((value) => (value === null ? "" : format(value))),
    ticks: { show: false },
    ...(chart.content.log
      ? { splits: (plot, axis, low, high) => logTicks(low, high, small ? 3 : 8), filter: (plot, ticks) => ticks }
      : {}),
  };
}

// Losses seldom span a power of ten, so 1, 10, 100 will not do: evenly spread within one, else 1, 2, 5, 10, 20, ...
function logTicks(low, high, most) {
  if (high / low < 10) {
    const step = ROUND_PARTS.find((size) => (high - low) / size <= most);
    const first = Math.ceil(low / step);
    return Array.from({ length: Math.floor(high / step) - first + 1 }, (_, index) => (first + index) * step);
  }
  const powers = ROUND_PARTS.filter((value) => value >= low && value <= high);
  const tens = powers.filter((value) => Number.isInteger(Math.log10(value)));
  return powers.length <= most ? powers : tens;
}

const ROUND_PARTS = Array.from({ length: 24 }, (_, index) =>
  [1, 2, 5].map((digit) => Number(`${digit}e${index - 12}`)),
).flat();

function axisFont(small) {
  return `${small ? 10 : 11}px system-ui, -apple-system, "Segoe UI", sans-serif`;
}

function axisColours() {
  return { stroke: cssColour("--muted"), grid: { stroke: cssColour("--grid"), width: 1 } };
}

function zoomTo(plot) {
  if (plot.select.width < 4) return;
  const low = plot.posToVal(plot.select.left, "x");
  const high = plot.posToVal(plot.select.left + plot.select.width, "x");
  plot.setSelect({ left: 0, width: 0, top: 0, height: 0 }, false);
  zoomOn(low, high);
}

function zoomOn(low, high) {
  const digits = { time: 1, epoch: 4 }[state.x] ?? 0;
  const range = [low, high].map((value) => Number(value.toFixed(digits)));
  if (range[0] < range[1]) choose({ zoom: range });
}
