// The state strip: for each run what it does, how far it is, and its main figures.

const PHASE_ICONS = {
  starting: "◌",
  training: "▶",
  saving: "⤓",
  evaluating: "◎",
  done: "✓",
  stopped: "■",
  failed: "✕",
  silent: "?",
  log: "≡",
  unreadable: "✕",
};

const STALE_SECONDS = 300;
const STALE_LINES = 5;

// Ages are those of this moment, also in a report that was written long ago.
function now() {
  return Date.now() / 1000;
}

// For how many seconds nobody has rewritten the report of a run that had not ended; null while that is no wonder.
function stale(run) {
  if (payload.live || ENDED.includes(run.state.phase)) return null;
  const age = now() - seconds(payload.generated);
  return age > Math.max(STALE_SECONDS, STALE_LINES * (run.state.line_seconds ?? 0)) ? age : null;
}

function drawStrip() {
  const host = byId("state");
  fill(host, `${version} ${language()} ${state.runs} ${state.fold} ${Math.floor(now() / 5)}`, () =>
    payload.runs.length
      ? [...shownRuns().map((run) => runStrip(run)), ...foldedRuns(payload.runs.filter(isFolded))]
      : make("p", { class: "empty" }, t("no_runs")),
  );
}

function foldedRuns(runs) {
  if (!runs.length) return [];
  const details = make(
    "details",
    { open: state.fold === "1" },
    make("summary", { "data-focus": "fold" }, t("runs_without_step", runs.length)),
    ...runs.map((run) => runStrip(run, runCheckbox(run))),
  );
  details.addEventListener("toggle", () => {
    if (details.open !== (state.fold === "1")) choose({ fold: details.open ? "1" : "" });
  });
  return [details];
}

// Several runs have a line each, one run has room. Of one without a step the reason is all there is to say.
function runStrip(run, title = shortName(run)) {
  const facts = factsNow(run);
  const phase = make(
    "p",
    { class: `phase ${facts.phase}` },
    make("span", { class: "icon", "aria-hidden": "true" }, PHASE_ICONS[facts.phase] ?? "•"),
    make("strong", {}, t(`phase_${facts.phase}`)),
    facts.why ? make("span", { class: "why", title: facts.why }, facts.why) : null,
    run.bad_lines ? make("span", { class: "label" }, t("bad_lines", integer(run.bad_lines))) : null,
  );
  const bare = manyRuns() && !hasSteps(run);
  return make(
    "article",
    { class: bare ? "run slim bare" : manyRuns() ? "run slim" : "run", "aria-label": run.name },
    make("div", { class: "who" }, manyRuns() ? make("h2", { title: run.name }, title) : null, phase),
    ...(bare ? [] : [progress(facts, run.name), make("dl", { class: "figures" }, ...figures(facts))]),
  );
}

// Those of the report; of one that nobody rewrites any more the phase is no longer true.
function factsNow(run) {
  const age = run.state.phase === "silent" ? null : stale(run);
  if (age === null) return run.state;
  const why = t("not_rewritten", duration(age), t(`phase_${run.state.phase}`));
  return { ...run.state, phase: "silent", why, eta_seconds: null };
}

function progress(facts, name) {
  const total = facts.total_steps;
  const done = isNumber(facts.step);
  const text = !done
    ? t("no_step")
    : total
      ? t("step_of", integer(facts.step), integer(total))
      : t("step_only", integer(facts.step));
  const bar = total ? make("progress", { max: total, value: facts.step ?? 0, "aria-label": name }) : null;
  const part = total && done ? make("span", { class: "percent" }, percent(facts.step / total)) : null;
  return make("div", { class: "progress" }, make("span", {}, text), part, bar);
}

// For the title of the browser's tab: 42 % of the first run.
function progressText() {
  const facts = shownRuns()[0]?.state;
  return facts?.total_steps && isNumber(facts.step) ? percent(facts.step / facts.total_steps, 0) : "";
}

function figures(facts) {
  const saved = facts.last_checkpoint;
  const age = saved ? t("ago", duration(Math.max(0, Math.round(now() - seconds(saved.time))))) : "";
  return [
    ["loss", fixed(facts.loss, 4)],
    ["eta", duration(facts.eta_seconds)],
    ["tokens", compact(facts.tokens)],
    ["tgs", integer(facts.tgs)],
    ["tflops", significant(facts.tflops, 4)],
    ["mfu", percent(facts.mfu)],
    ["pack_fill", percent(facts.pack_fill)],
    ["restarts", integer(facts.restarts)],
    ["last_checkpoint", saved ? t("step_only", integer(saved.step)) : NONE, age],
  ].map(([key, value, detail]) =>
    make(
      "div",
      { class: key },
      make("dt", {}, t(key)),
      make("dd", {}, value, detail ? make("small", {}, detail) : null),
    ),
  );
}
