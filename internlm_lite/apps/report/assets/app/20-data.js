// The payload, and the numbers that charts and tables take from it.

let payload = { version: 1, generated: null, live: false, runs: [] };
let version = 0; // grows with every new payload: what was drawn from an older one is drawn anew

function usePayload(value) {
  payload = { ...payload, ...value };
  version += 1;
}

const RUNS_AT_FIRST = 4;

// Those that the reader chose, else the last active few with a step: a job folder may hold dozens.
function shownRuns() {
  const chosen = payload.runs.filter((run) => state.runs.includes(run.name));
  return chosen.length ? chosen : payload.runs.filter((run) => !isFolded(run)).slice(0, RUNS_AT_FIRST);
}

function hasSteps(run) {
  return run.series.points > 0 || run.state.step > 0;
}

// Starts that failed before their first step are many, and say little about the runs beside them.
function isFolded(run) {
  return !hasSteps(run) && !state.runs.includes(run.name) && payload.runs.some(hasSteps);
}

// The place of a run among all, in the order they were found: it keeps its look while others overtake it.
function runNumber(run) {
  return runsAsFound().indexOf(run);
}

function runsAsFound() {
  return [...payload.runs].sort((a, b) => a.id.localeCompare(b.id, "en", { numeric: true }));
}

// Changes with these parts of the shown runs, not with every step line: what is drawn anew loses the reader's place.
function contentKey(parts, ...more) {
  const content = shownRuns().map((run) => [run.name, ...parts.map((part) => run[part])]);
  return JSON.stringify([language(), dark(), content, ...more]);
}

function manyRuns() {
  return payload.runs.length > 1;
}

// Run names without the folders that all of them share.
function shortName(run) {
  const paths = payload.runs.map((other) => other.name.split("/"));
  const shortest = Math.min(...paths.map((path) => path.length)) - 1;
  let shared = 0;
  while (shared < shortest && paths.every((path) => path[shared] === paths[0][shared])) shared += 1;
  return run.name.split("/").slice(shared).join("/");
}

// All folder names, in the order of the first run that has them: a folder keeps its colour.
function folderNames() {
  return [...new Set(runsAsFound().flatMap((run) => run.folders.map((folder) => folder.name)))];
}

function shownFolders() {
  const names = folderNames();
  const chosen = names.filter((name) => state.only.includes(name));
  return chosen.length ? chosen : names;
}

// Ctrl, shift or command adds to what is shown alone; a plain click shows one, or all again.
function isolate(name, event) {
  const adds = event && (event.ctrlKey || event.shiftKey || event.metaKey);
  if (adds) choose({ only: toggled(state.only, name) });
  else choose({ only: state.only.length === 1 && state.only[0] === name ? [] : [name] });
}

// The series to draw: the finer one of a zoomed range when it is there.
function seriesOf(run) {
  return details.get(run.id) ?? run.series;
}

// x of each point in the chosen unit: steps, passes over the data, tokens, or seconds since the run's first line. Never
// falls.
const xCache = new WeakMap();
const VALUES_OF_X = {
  tokens: (run, series) => series.num_consumed_tokens,
  epoch: (run, series) => run.epoch_tokens && series.num_consumed_tokens?.map((tokens) => tokens / run.epoch_tokens),
  time: elapsed,
};

function xOf(run, series = seriesOf(run)) {
  if (state.x === "step") return series.step;
  let units = xCache.get(series);
  if (!units) xCache.set(series, (units = {}));
  return (units[state.x] ??= rising(VALUES_OF_X[state.x](run, series), series));
}

function elapsed(run, series) {
  const first = run.series.time?.find(isNumber);
  return series.time?.map((value) => (isNumber(value) ? value - first : null));
}

// Seeds and clocks may leave out or turn back a value; a chart needs x that rises.
function rising(values, series) {
  let last = 0;
  return series.step.map((_, index) => (last = Math.max(last, values?.[index] ?? last)));
}

// x of a step, between the two points around it.
function xOfStep(run, step) {
  if (state.x === "step") return Math.max(0, step); // an evaluation before the first step is one after step -1
  return between(run.series.step, xOf(run, run.series), step);
}

function stepOfX(run, x) {
  return state.x === "step" ? x : between(xOf(run, run.series), run.series.step, x);
}

// x of each point of the schedule, also of steps to come; null where it is not known, as the time is.
function planX(run) {
  const plan = run.schedule ?? {};
  const unit = { step: 1, tokens: 1, epoch: run.epoch_tokens }[state.x];
  const values = state.x === "step" ? plan.step : plan.tokens?.map(throughStep);
  if (!plan.step || !unit || !values) return null;
  let last = 0;
  return values.map((value) => (last = Math.max(last, (value ?? 0) / unit)));

  // The schedule counts the tokens before a step, a step line those with it.
  function throughStep(before, index) {
    return before + (plan.batch_tokens?.[index] ?? 0);
  }
}

// x of a step that may lie ahead.
function xOfAnyStep(run, step) {
  if (step <= (lastNumber(run.series.step) ?? -1) || state.x === "step") return xOfStep(run, step);
  const x = planX(run);
  return x && between(run.schedule.step, x, step);
}

function between(from, to, value) {
  if (!from.length) return null;
  const at = from.findIndex((other) => other >= value);
  if (at === 0) return to[0];
  if (at < 0) return to[to.length - 1];
  const part = (value - from[at - 1]) / (from[at] - from[at - 1] || 1);
  return to[at - 1] + part * (to[at] - to[at - 1]);
}

function xLabel(value) {
  if (state.x === "time") return duration(value);
  if (state.x === "epoch") return significant(value, 3);
  return state.x === "tokens" ? compact(value) : integer(value);
}

// Tokens of one pass over the data, if all shown runs have the same number.
function epochTokens() {
  const [first, ...others] = shownRuns().map((run) => run.epoch_tokens);
  return first && others.every((tokens) => tokens === first) ? first : null;
}

// One folder's values for a tab. Perplexity and share are computed here, so that they need no place in the file.
function folderValues(series, name, tab) {
  const folder = own(series.folders, name);
  if (!folder) return null;
  if (tab === "loss" || tab === "acc") return folder[tab];
  if (tab === "ppl") return folder.loss.map(perplexity);
  const totals = tokenTotals(series);
  return folder.tokens.map((value, index) => (totals[index] ? (value ?? 0) / totals[index] : null));
}

// A folder may be called "constructor".
function own(object, key) {
  return object && Object.hasOwn(object, key) ? object[key] : undefined;
}

function perplexity(loss) {
  const value = isNumber(loss) ? Math.exp(loss) : NaN;
  return Number.isFinite(value) ? value : null;
}

const totalsCache = new WeakMap();

function tokenTotals(series) {
  let totals = totalsCache.get(series);
  if (!totals) {
    const all = Object.values(series.folders).map((folder) => folder.tokens);
    totals = series.step.map((_, index) => all.reduce((sum, tokens) => sum + (tokens[index] ?? 0), 0));
    totalsCache.set(series, totals);
  }
  return totals;
}

// Exponential moving average, divided by the weight it has so far, so that it starts at the first value.
function smoothed(values, weight) {
  let sum = 0;
  let missing = 1;
  return values.map((value) => {
    if (!isNumber(value)) return null;
    sum = weight * sum + (1 - weight) * value;
    missing *= weight;
    return sum / (1 - missing);
  });
}

function hasNumber(values) {
  return Boolean(values) && values.some(isNumber);
}

function lastNumber(values) {
  return values?.findLast(isNumber) ?? null;
}

// First and last x over the shown runs; the reader's zoom when there is one.
function xRange() {
  if (state.zoom.length) return state.zoom;
  let [low, high] = [Infinity, -Infinity];
  for (const run of shownRuns()) {
    const x = xOf(run, run.series);
    if (!x.length) continue;
    low = Math.min(low, x[0]);
    high = Math.max(high, x[x.length - 1]);
  }
  if (low > high) return [0, 1];
  return low === high ? [low - 0.5, high + 0.5] : [low, high];
}
