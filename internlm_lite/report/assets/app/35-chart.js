// One chart: a uPlot in a figure, with its own legend, empty text, keyboard cursor and synchronised x.
//
// A line is {key, name, x, values, colour, dash, width, format, points}. Lines of several runs have each their own x.

const charts = new Set();
const SYNC = "page";

class Chart {
  // options: height; small: no legend and few labels; onclick: what a click into the chart does
  constructor(figure, options = {}) {
    this.figure = figure;
    this.options = { height: 220, small: false, ...options };
    this.head = make("figcaption", {});
    this.host = make("div", { class: "plot", tabindex: this.options.small ? "-1" : "0", role: "group" });
    this.empty = make("p", { class: "empty" });
    figure.append(...(this.options.small ? [] : [this.head]), this.host, this.empty);
    this.host.addEventListener("keydown", (event) => chartKey(this, event));
    this.host.addEventListener("blur", () => this.point(null));
    this.plot = null;
    this.shape = "";
    charts.add(this);
    new ResizeObserver(() => this.resize()).observe(this.host);
  }

  // content: title, lines, log, range (of y), marks, format (of axis values), unsmoothed
  show(content) {
    this.content = content;
    const lines = content.lines.filter((line) => hasNumber(line.values));
    this.lines = lines;
    this.figure.hidden = !lines.length && Boolean(this.options.hides);
    this.host.hidden = !lines.length;
    this.empty.hidden = lines.length > 0;
    this.empty.textContent = t("no_values");
    this.host.setAttribute("aria-label", t("chart_label", content.title));
    if (!lines.length) return this.clear();
    const drawn = content.unsmoothed ? lines : withSmoothing(lines);
    const shape = JSON.stringify([content.log, dark(), state.x, drawn.map((line) => [line.key, line.colour, line.dash])]);
    const data = aligned(drawn);
    if (this.plot && shape === this.shape) this.plot.setData(data);
    else this.build(shape, drawn, data);
    this.caption();
  }

  build(shape, drawn, data) {
    this.plot?.destroy();
    this.shape = shape;
    this.plot = new uPlot(plotOptions(this, drawn), data, this.host);
    // The crosshair is for the eye; what it reads stands in the legend and the live region.
    this.host.firstChild.setAttribute("aria-hidden", "true");
  }

  clear() {
    this.plot?.destroy();
    this.plot = null;
    this.shape = "";
    if (!this.options.small) this.head.replaceChildren(make("span", { class: "name" }, this.content.title));
    this.options.oncursor?.(null);
  }

  resize() {
    const width = this.host.clientWidth;
    if (this.plot && width > 0 && width !== this.plot.width) this.plot.setSize({ width, height: this.options.height });
  }

  // Title, and the legend with the values at the cursor, or the last ones.
  caption(index = null) {
    if (this.options.small) return;
    const x = index === null ? null : this.plot.data[0][index];
    const items = this.options.legend === false ? [] : this.lines.map((line) => this.key(line, index));
    const where = make("span", { class: "where" }, x === null ? "" : [`${t(`x_${state.x}`)} ${xLabel(x)}`, ...markTexts(this, x)].join(" · "));
    this.head.replaceChildren(make("span", { class: "name" }, this.content.title), ...items, ...(this.content.notes ?? []), where);
    this.options.oncursor?.(index === null ? null : (key) => this.valueOf(this.lines.find((line) => line.key === key), index));
  }

  // A line's name and value in the legend. Where a chart can have but one line its title is name enough.
  key(line, index) {
    const value = make("b", {}, (line.format ?? tick)(this.valueOf(line, index)));
    if (this.content.single && !manyRuns()) return make("span", { class: "key" }, value);
    return make("span", { class: "key" }, swatch(line.colour, line.dash ?? []), line.name, " ", value);
  }

  // The value drawn of a line at an index of the plot's data; where the line has no point there, the one before.
  valueOf(line, index) {
    if (!line || !this.plot) return null;
    const at = this.plot.series.findIndex((series) => series.key === line.key);
    if (at < 0) return null;
    const values = this.plot.data[at];
    return index === null ? lastNumber(values) : values.slice(0, index + 1).findLast(isNumber) ?? null;
  }

  point(index) {
    if (!this.plot) return;
    const left = index === null ? -10 : this.plot.valToPos(this.plot.data[0][index], "x");
    this.plot.setCursor({ left, top: index === null ? -10 : this.plot.over.clientHeight / 2 });
  }
}

// The average in the line's colour, the values themselves faint behind it.
function withSmoothing(lines) {
  if (!state.smooth) return lines;
  const averages = lines.map((line) => ({ ...line, values: smoothed(line.values, state.smooth) }));
  const raw = lines.filter((line) => !line.points);
  return [...raw.map((line) => ({ ...line, key: `raw ${line.key}`, colour: faint(line.colour), dash: [], width: 1 })),
    ...averages.map((line, index) => (lines[index].points ? lines[index] : line))];
}

// Lines with one x stay as they are; others are joined over all x.
function aligned(lines) {
  const tables = new Map();
  for (const line of lines) tables.set(line.x, [...(tables.get(line.x) ?? []), line]);
  if (tables.size === 1) return [lines[0].x, ...lines.map((line) => line.values)];
  const joined = uPlot.join([...tables].map(([x, group]) => uniqueX(x, group.map((line) => line.values))));
  const order = [...tables.values()].flat();
  return [joined[0], ...lines.map((line) => joined[1 + order.indexOf(line)])];
}

// A join takes each x once; of points with the same x the last counts.
function uniqueX(x, columns) {
  const keep = x.map((value, index) => index + 1 === x.length || x[index + 1] !== value);
  return [x, ...columns].map((column) => column.filter((_, index) => keep[index]));
}

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
    scales: { x: { time: false, range: () => xRange() }, y: yScale(chart) },
    axes: [xAxis(small), yAxis(chart)],
    series: [{}, ...drawn.map((line) => lineOptions(line, small, drawn.length > 12))],
    hooks: {
      setSelect: [(plot) => zoomTo(plot)],
      setCursor: [(plot) => chart.plot && chart.caption(plot.cursor.idx ?? null)],
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
    points: line.points ? { show: true, size: 6, fill: line.colour } : { size: 5, fill: line.colour },
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
  const room = log ? (high / low) ** 0.06 : (high - low) * 0.08 || Math.abs(high) * 0.02 || 1;
  if (log) return [low / Math.max(room, 1.01), high * Math.max(room, 1.01)];
  return [low >= 0 ? Math.max(0, low - room) : low - room, high + room];
}

// Distances of grid lines on the x axis: whole steps, round times.
const ROUND = Array.from({ length: 16 }, (_, power) => [1, 2, 5].map((digit) => digit * 10 ** power)).flat();
const ROUND_TIMES = [1, 2, 5, 10, 20, 30, 60, 120, 300, 600, 1200, 1800, 3600, 7200, 10800, 21600, 43200, ...ROUND.map((days) => 86400 * days)];

function xAxis(small) {
  const label = (plot, ticks) => ticks.map((value) => (value === null ? "" : xLabel(value)));
  return { ...axisColours(), size: small ? 20 : 26, space: small ? 56 : 80, incrs: state.x === "time" ? ROUND_TIMES : ROUND, values: label, font: axisFont(small), gap: 4, ticks: { show: false } };
}

function yAxis(chart) {
  const { small } = chart.options;
  const format = chart.content.format ?? tick;
  return {
    ...axisColours(),
    size: small ? 38 : 54,
    space: small ? 28 : 36,
    gap: 4,
    font: axisFont(small),
    values: (plot, ticks) => ticks.map((value) => (value === null ? "" : format(value))),
    ticks: { show: false },
    ...(chart.content.log ? { splits: (plot, axis, low, high) => logTicks(low, high, small ? 3 : 8), filter: (plot, ticks) => ticks } : {}),
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

const ROUND_PARTS = Array.from({ length: 24 }, (_, index) => [1, 2, 5].map((digit) => Number(`${digit}e${index - 12}`))).flat();

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
  const digits = state.x === "time" ? 1 : 0;
  const range = [low, high].map((value) => Number(value.toFixed(digits)));
  if (range[0] < range[1]) choose({ zoom: range });
}
