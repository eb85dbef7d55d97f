// One chart: a uPlot in a figure, with its own legend, empty text, keyboard cursor and synchronised x.
//
// A line is {key, name, x, values, colour, dash, width, format, points}. Lines of several runs have each their own x.

const charts = new Set();
const SYNC = "page";
const MOST_NAMES = 12; // more lines are named at the cursor alone
const FEWEST_TO_SMOOTH = 30;

class Chart {
  // options: height; small: no legend and few labels; legend: false for none; hides: no figure without values;
  // oncursor: told how to read the line at the cursor; onclick: told the line at the mouse
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
    this.near = null; // the line that the mouse is at
    charts.add(this);
    new ResizeObserver(() => this.resize()).observe(this.host);
  }

  // content: title, lines, log, range (of y), xRange (where it is not that of all), marks, format (of axis values), unsmoothed
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
    const shape = JSON.stringify([
      content.log,
      dark(),
      state.x,
      drawn.map((line) => [line.key, line.colour, line.dash]),
    ]);
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
    if (this.options.onclick)
      this.plot.over.addEventListener("click", (event) => this.near && this.options.onclick(this.near, event));
  }

  clear() {
    this.plot?.destroy();
    this.plot = null;
    this.shape = "";
    if (!this.options.small) this.head.replaceChildren(make("span", { class: "name" }, this.content.title));
    this.options.oncursor?.(() => null, null);
  }

  resize() {
    const width = this.host.clientWidth;
    if (this.plot && width > 0 && width !== this.plot.width) this.plot.setSize({ width, height: this.options.height });
  }

  // Title, and the legend with the values at the cursor, or the last ones.
  caption(index = null) {
    if (this.options.small) return;
    const x = index === null ? null : this.plot.data[0][index];
    const named = this.options.legend !== false && this.lines.length <= MOST_NAMES;
    const items = named ? this.lines.map((line) => this.key(line, index)) : [];
    const where = make("span", { class: "where" }, x === null ? "" : this.whereText(x, index));
    this.head.replaceChildren(
      make("span", { class: "name" }, this.content.title),
      ...items,
      ...(this.content.notes ?? []),
      where,
    );
    this.options.oncursor?.((key) => this.valueOf(this.line(key), index), index);
  }

  line(key) {
    return this.lines.find((line) => line.key === key) ?? null;
  }

  comeNear(key) {
    this.near = this.line(key);
  }

  // What the cursor is at: a line, x, marks.
  whereText(x, index) {
    const near =
      this.near && this.lines.length > 1
        ? [`${this.near.name} ${(this.near.format ?? tick)(this.valueOf(this.near, index))}`]
        : [];
    return [...near, `${t(`x_${state.x}`)} ${xLabel(x)}`, ...markTexts(this, x)].join(" · ");
  }

  // A line's name and value in the legend. Where a chart can have but one line its title is name enough.
  key(line, index) {
    const value = make("b", {}, (line.format ?? tick)(this.valueOf(line, index)));
    if (this.content.single && !manyRuns()) return make("span", { class: "key" }, value);
    return make("span", { class: "key" }, swatch(line.colour, line.dash ?? []), line.name, " ", value);
  }

  // The value of a line, not its average, at an index of the plot's data; where it has no point there, the one before.
  valueOf(line, index) {
    if (!line || !this.plot) return null;
    const at = this.plot.series.findIndex((series) => series.key === line.key);
    if (at < 0) return null;
    const values = this.plot.data[at];
    return index === null ? lastNumber(values) : (values.slice(0, index + 1).findLast(isNumber) ?? null);
  }

  point(index) {
    if (!this.plot) return;
    const left = index === null ? -10 : this.plot.valToPos(this.plot.data[0][index], "x");
    this.plot.setCursor({ left, top: index === null ? -10 : this.plot.over.clientHeight / 2 });
  }
}

// The average in the line's colour, the values themselves faint behind it, first, so that they are what is read.
function withSmoothing(lines) {
  const averaged = lines.filter(
    (line) => state.smooth && !line.points && line.values.filter(isNumber).length >= FEWEST_TO_SMOOTH,
  );
  return [
    ...averaged.map((line) => ({ ...line, colour: faint(line.colour, averaged.length), dash: [], width: 1 })),
    ...lines.map((line) =>
      averaged.includes(line) ? { ...line, values: smoothed(line.values, state.smooth) } : line,
    ),
  ];
}

// Lines with one x stay as they are; others are joined over all x.
function aligned(lines) {
  const tables = new Map();
  for (const line of lines) tables.set(line.x, [...(tables.get(line.x) ?? []), line]);
  if (tables.size === 1) return [lines[0].x, ...lines.map((line) => line.values)];
  const columns = (group) => group.map((line) => line.values);
  const joined = uPlot.join([...tables].map(([x, group]) => uniqueX(x, columns(group))));
  const order = [...tables.values()].flat();
  return [joined[0], ...lines.map((line) => joined[1 + order.indexOf(line)])];
}

// A join takes each x once; of points with the same x the last counts.
function uniqueX(x, columns) {
  const keep = x.map((value, index) => index + 1 === x.length || x[index + 1] !== value);
  return [x, ...columns].map((column) => column.filter((_, index) => keep[index]));
}
