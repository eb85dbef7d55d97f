// The one name that the page leaves on `window`: a look at what is shown, for tests and the console. Nothing to set.

window.page = Object.freeze({
  get state() {
    return structuredClone(state);
  },
  get bands() {
    return currentBands();
  },
  get marks() {
    return currentMarks();
  },
  get charts() {
    return [...charts]
      .filter((chart) => chart.plot)
      .map((chart) => ({
        title: chart.content.title,
        small: chart.options.small,
        x: [chart.plot.scales.x.min, chart.plot.scales.x.max],
        y: [chart.plot.scales.y.min, chart.plot.scales.y.max],
        marks: (chart.content.marks ?? []).map((mark) => ({ ...mark })),
        log: chart.plot.scales.y.distr === 3,
        points: chart.plot.data[0].length,
        lines: chart.plot.series.slice(1).map((series, index) => ({
          name: series.label,
          key: series.key,
          colour: series.stroke(),
          dash: series.dash ?? [],
          x: chart.plot.data[0].slice(),
          values: chart.plot.data[index + 1].slice(),
        })),
      }));
  },
});
